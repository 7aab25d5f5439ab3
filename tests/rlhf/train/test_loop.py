import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.core.errors import CheckpointError, ConfigError, RunStopped, TrainingStopped
from rlhf.engine.checkpoint import COMPLETE, CheckpointStore
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.engine.stop import STOP_FILE, StopRequests
from rlhf.train.done import Completion, read_completion, write_completion
from rlhf.train.loop import TOTAL_STEPS, Run, fit
from rlhf.train.options import TrainConfig

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
CONFIG = TrainConfig(evaluate_every=2, checkpoint_every=3, tensorboard=False)


class Task:
    """Regression on noise; ``scores`` are what successive evaluations say or raise; ``bad`` steps give a loss of NaN.

    ``ask`` is called with the number of every step that ends.
    """

    def __init__(self, engine, scores=(), bad=(), ask=lambda step: None):
        self.engine, self.scores, self.bad, self.step, self.ask = engine, list(scores), bad, 0, ask
        self.evaluations = 0

    def micro_batches(self, step):
        self.step = step
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(4, 3, generator=generator) for _ in range(2)]

    def loss(self, batch):
        loss = (self.engine.forward(batch) ** 2).mean() + 0 * torch.rand(())
        return loss * float("nan") if self.step in self.bad else loss

    def step_metrics(self):
        self.ask(self.step + 1)
        return {"noise": float(torch.rand(())), "pairs": 8.0}

    def evaluate(self):
        if not self.scores:
            return {}
        self.evaluations += 1
        score = self.scores[self.evaluations - 1]
        if isinstance(score, Exception):
            raise score
        return {"eval/accuracy": score}

    def row_ids(self, batch):
        return [f"rows.jsonl:{self.step + 1}"]

    def state_dict(self):
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state):
        self.evaluations = state["evaluations"]

    @property
    def portions(self):
        return {}


@pytest.fixture
def start(tmp_path):
    def run(config=CONFIG, total=6, identity=None, folder=tmp_path / "run", planned=6, **options):
        torch.manual_seed(0)
        optimizer = OptimizerConfig(learning_rate=0.1)
        engine = LocalEngine(nn.Linear(3, 1), ranks=ALONE, optimizer=optimizer, total_steps=planned)
        folder.mkdir(exist_ok=True)
        task = Task(engine, **options)
        loop = Run(
            folder=folder,
            store=CheckpointStore(folder / "checkpoints", ALONE, config.keep_checkpoints),
            identity=identity or {"seed": 0},
            max_skipped_steps=2,
            extend=config.extend,
            documents={"config.yaml": "a: 1\n"},
        )
        return fit(engine, task, config, loop, total), engine, folder

    return run


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in found]


def test_stopped_and_continued_equals_straight(start, tmp_path):
    scores = [0.5, 0.7, 0.6]
    state, engine, folder = start(scores=scores)
    other = tmp_path / "other"
    start(total=4, scores=scores, folder=other)
    with (other / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 5, "noise": 9}\n{"step": 6, "no')  # what a killed run leaves behind
    again, resumed, _ = start(scores=scores, folder=other)
    assert rows(other) == rows(folder)
    assert torch.equal(resumed.module.weight, engine.module.weight)
    assert (again.best_step, again.best_value) == (state.best_step, state.best_value) == (4, 0.7)


def test_the_best_checkpoint_stays_when_others_rotate(start):
    state, _, folder = start(replace(CONFIG, keep_checkpoints=1, checkpoint_every=1), scores=[0.9, 0.7, 0.6])
    assert state.best_step == 2
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]


def test_the_start_is_a_candidate_that_is_kept_and_judged_once(start, tmp_path):
    config = replace(CONFIG, evaluate_first=True, keep_checkpoints=1, checkpoint_every=1)
    scores = [0.9, 0.7, 0.8, 0.6]
    state, engine, folder = start(config, scores=scores)
    assert (state.best_step, state.best_value) == (0, 0.9)
    assert saved_in(folder) == [0, 6]
    other = tmp_path / "other"
    with pytest.raises(ZeroDivisionError):
        start(config, scores=scores, folder=other, ask=lambda step: 1 / 0)
    assert saved_in(other) == [0]
    again, resumed, _ = start(config, scores=scores, folder=other)
    assert rows(other) == rows(folder) and torch.equal(resumed.module.weight, engine.module.weight)
    assert (again.best_step, again.best_value) == (0, 0.9)


def test_a_start_that_is_beaten_makes_room(start):
    config = replace(CONFIG, evaluate_first=True, keep_checkpoints=1)
    state, _, folder = start(config, scores=[0.5, 0.7, 0.6, 0.6])
    assert state.best_step == 2 and saved_in(folder) == [2, 6]


def test_patience_ends_the_run_and_keeps_it_ended(start):
    config = replace(CONFIG, patience=1)
    state, _, _ = start(config, scores=[0.9, 0.7, 0.6])
    assert state.stopped_early and state.step == 4
    again, _, _ = start(config, scores=[0.9, 0.7, 0.6])
    assert again.step == 4


def test_a_metric_may_be_better_when_lower(start):
    state, _, _ = start(replace(CONFIG, best_metric="-eval/accuracy"), scores=[0.9, 0.7, 0.8])
    assert state.best_step == 4


def test_an_unknown_best_metric_names_those_there_are(start):
    with pytest.raises(ConfigError, match="eval/accurcy: no such metric; there are eval/accuracy"):
        start(replace(CONFIG, best_metric="eval/accurcy"), scores=[0.9])


def test_a_step_that_is_not_finite_is_skipped_and_its_rows_named(start):
    state, engine, folder = start(bad=(1, 3))
    assert state.step == 6 and torch.isfinite(engine.module.weight).all()
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in skipped] == [2, 4]
    assert skipped[0]["rows"] == ["rows.jsonl:2", "rows.jsonl:2"] and skipped[0]["not_finite"] == "loss"
    assert [row["step_skipped"] for row in rows(folder)] == [0, 1, 0, 1, 0, 0]


def test_too_many_in_a_row_stop_the_run_with_advice(start):
    with pytest.raises(TrainingStopped, match=r"2 steps in a row .*lower optim.learning_rate"):
        start(bad=(2, 3))


def test_a_checkpoint_of_another_run_is_refused_by_name(start):
    _, _, folder = start()
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="seed: 0 in the checkpoint, 1 now"):
        start(identity={"seed": 1})
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("resume", "first"), [("never", True), ("required", False)])
def test_resume_never_and_required_hold_what_they_say(start, resume, first):
    if first:
        start()
    with pytest.raises((ConfigError, CheckpointError)):
        start(replace(CONFIG, resume=resume))


@pytest.fixture
def stop_file(tmp_path):
    """``stop_file(folder, step)`` asks for a stop in that step."""

    def ask(folder, wanted):
        return lambda step: (folder / STOP_FILE).touch() if step == wanted else None

    return ask


def saved_in(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("asked_in", [1, 3, 4, 5])
def test_stopped_in_any_step_saves_it_and_goes_on_as_if_never_stopped(start, stop_file, tmp_path, asked_in):
    scores = [0.5, 0.7, 0.6]
    _, engine, folder = start(scores=scores)
    other = tmp_path / "other"
    with pytest.raises(RunStopped, match=f"stopped at step {asked_in} of 6 by the file") as info:
        start(scores=scores, folder=other, ask=stop_file(other, asked_in))
    assert info.value.step == asked_in == saved_in(other)[-1]
    _, resumed, _ = start(scores=scores, folder=other)
    assert rows(other) == rows(folder)
    assert torch.equal(resumed.module.weight, engine.module.weight)


def test_a_step_that_is_saved_anyway_is_not_saved_twice(start, stop_file, tmp_path, monkeypatch):
    saved, save = [], CheckpointStore.save

    def counted(self, step, *rest):
        saved.append(step)
        save(self, step, *rest)

    monkeypatch.setattr(CheckpointStore, "save", counted)
    with pytest.raises(RunStopped):
        start(ask=stop_file(tmp_path / "run", 3))
    assert saved == [3]


def test_asked_in_the_last_step_the_run_is_finished(start, stop_file, tmp_path):
    state, *_ = start(ask=stop_file(tmp_path / "run", 6))
    assert state.step == 6
    again, _, _ = start()
    assert again.step == 6, "what was left of the request stops a finished run"


def test_asked_before_the_first_step_there_is_nothing_to_save(start, monkeypatch, tmp_path):
    monkeypatch.setattr(StopRequests, "agreed", lambda self: "SIGTERM")
    with pytest.raises(RunStopped, match="stopped at step 0 of 6 by SIGTERM") as info:
        start(replace(CONFIG, evaluate_first=True), scores=[0.5])
    assert info.value.step == 0 and saved_in(tmp_path / "run") == []


def test_the_budget_of_time_stops_at_a_step(start, tmp_path):
    """This process is older than any budget: so the first check stops it, and the run of a later one goes on."""
    with pytest.raises(RunStopped, match=r"by train\.max_minutes = 1e-06"):
        start(replace(CONFIG, max_minutes=1e-6))
    state, _, _ = start(replace(CONFIG, max_minutes=1e6))
    assert state.step == 6


def test_a_marker_goes_when_training_goes_on_and_stays_when_there_is_nothing_to_do(start, stop_file, tmp_path):
    folder = tmp_path / "run"
    done = Completion(stage="reward", config="0123", step=6, seconds=1.0)
    with pytest.raises(RunStopped):
        start(ask=stop_file(folder, 2))
    write_completion(folder, done)
    start()
    assert read_completion(folder) is None
    write_completion(folder, done)
    start()
    assert read_completion(folder) == done


def test_a_refused_start_leaves_the_marker(start, tmp_path):
    start()
    done = Completion(stage="reward", config="0123", step=6, seconds=1.0)
    write_completion(tmp_path / "run", done)
    with pytest.raises(CheckpointError):
        start(identity={"seed": 1})
    assert read_completion(tmp_path / "run") == done


def test_another_number_of_ranks_is_no_other_run_and_is_told(start, tmp_path, capsys):
    _, _, folder = start()
    written = folder / "checkpoints" / "step-00000006" / "loop.json"
    entry = json.loads(written.read_text())
    assert entry["ranks"] == 1
    written.write_text(json.dumps(entry | {"ranks": 4}))
    (written.parent / COMPLETE).write_text("{}")  # nothing to compare with
    start()
    assert "at step 6, written on 4 rank(s)" in capsys.readouterr().out


def test_an_evaluation_that_ends_the_run_leaves_a_checkpoint_of_its_step(start, tmp_path):
    with pytest.raises(TrainingStopped, match="held-out rewards"):
        start(config=replace(CONFIG, checkpoint_every=0), scores=[0.5, TrainingStopped("held-out rewards")])
    assert CheckpointStore(tmp_path / "run" / "checkpoints", ALONE, 2).steps() == [2, 4]


def test_a_finished_run_is_extended_only_when_asked_and_follows_the_longer_schedule(start, tmp_path, capsys):
    straight = [row["learning_rate"] for row in rows(start(total=10, planned=10, folder=tmp_path / "straight")[2])]
    short, long = {"seed": 0, TOTAL_STEPS: 4}, {"seed": 0, TOTAL_STEPS: 10}
    start(total=4, planned=4, identity=short)
    with pytest.raises(CheckpointError, match=r"total steps: 4 .* 10 now(.|\n)*train\.extend=true trains on"):
        start(total=10, planned=10, identity=long)
    extending = replace(CONFIG, extend=True)
    with pytest.raises(CheckpointError, match="seed: 0 in the checkpoint, 1 now"):
        start(config=extending, total=10, planned=10, identity=long | {"seed": 1})
    state, _, folder = start(config=extending, total=10, planned=10, identity=long)
    assert state.step == 10
    assert [row["learning_rate"] for row in rows(folder)][4:] == pytest.approx(straight[4:])
    assert "was planned for 4 steps, now 10" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="total steps: 10 in the checkpoint, 4 now"):
        start(config=extending, total=4, planned=4, identity=short)
