"""Runs that go on with another number of ranks, as users start them: real processes, DeepSpeed, files."""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

SETTINGS = {
    "zero1": ["engine.deepspeed=zero1"],
    "zero2, frozen layers": ["engine.deepspeed=zero2", "model.freeze_layers=2"],
    "zero3, LoRA": ["engine.deepspeed=zero3", "model.lora={rank: 4, alpha: 8}"],
}
NAMES = [*list(SETTINGS)[:2], pytest.param("zero3, LoRA", marks=pytest.mark.full)]
WAYS = [(2, 1), (1, 2)]
STOPPED_AT, STEPS = 3, 6


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tiny_model, tiny_pairs) -> Path:
    folder = tmp_path_factory.mktemp("other_ranks")
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}, head_init_scale: 10}}\n"
        f"data: {{train: {tiny_pairs}, eval_share: 0.2, cache_dir: {folder}/cache}}\n"
        "margin: {kind: ot, parameters: {scope: global_batch}}\n"
        "optim: {learning_rate: 3e-3, weight_decay: 0.1}\n"
        f"train: {{global_batch_size: 10, micro_batch_tokens: 300, max_steps: {STEPS}, evaluate_every: {STOPPED_AT},"
        f" checkpoint_every: {STOPPED_AT}, keep_checkpoints: 9, publish: none, tensorboard: false}}\n"
    )
    return path


@pytest.fixture(scope="session")
def folders(recipe, run_ranks):
    """``folders(name, then, now)``: of a run on ``then`` ranks, and of one that went on with ``now`` halfway."""

    def get(name: str, then: int, now: int) -> tuple[Path, Path]:
        straight, moved = (recipe.parent / f"{kind}{then}" / name.split(",")[0] for kind in ("straight", "moved"))
        if not moved.exists():
            train = ["-m", "reward", "--config", str(recipe), *SETTINGS[name]]
            run_ranks([*train, f"output={straight}"], then)
            shutil.copytree(straight, moved)
            shutil.rmtree(moved / "checkpoints" / f"step-{STEPS:08d}")
            said, *_ = run_ranks([*train, f"output={moved}"], now)
            assert f"{then} ranks then, {now} now" in said
            assert f"at step {STOPPED_AT}, written on {then} rank(s)" in said
        return straight, moved

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("then", "now"), WAYS, ids=["2 to 1", "1 to 2"])
@pytest.mark.parametrize("name", NAMES)
def test_the_curve_is_that_of_a_run_that_never_changed(folders, runs, name, then, now):
    straight, moved = folders(name, then, now)
    runs.assert_close(runs.rows(moved), runs.rows(straight), 1e-4)
    runs.assert_close(runs.rows(moved, "eval"), runs.rows(straight, "eval"), 1e-4)
    losses = [row["loss"] for row in runs.rows(straight)]
    assert max(losses) - min(losses) > 0.02, "the curves agree because nothing was trained"


@pytest.mark.parametrize(("then", "now"), WAYS, ids=["2 to 1", "1 to 2"])
def test_the_data_come_in_the_same_order(folders, runs, then, now):
    straight, moved = folders("zero1", then, now)
    tokens = [row["tokens"] for row in runs.rows(straight)]
    assert [row["tokens"] for row in runs.rows(moved)] == tokens and len(set(tokens)) == STEPS


@pytest.mark.parametrize(("then", "now"), WAYS, ids=["2 to 1", "1 to 2"])
@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_that_was_read_is_as_it_was(folders, name, then, now):
    straight, moved = (folder / "checkpoints" / f"step-{STOPPED_AT:08d}" for folder in folders(name, then, now))
    files = {path.relative_to(straight): path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    assert {path.relative_to(moved): path.read_bytes() for path in moved.rglob("*") if path.is_file()} == files
