import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.core.errors import CheckpointError, ConfigError, TrainingStopped
from rlhf.engine.checkpoint import CheckpointStore
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.train.loop import Run, fit
from rlhf.train.options import TrainConfig

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
CONFIG = TrainConfig(evaluate_every=2, checkpoint_every=3, tensorboard=False)


class Task:
    """Regression on noise; ``scores`` are what successive evaluations say; ``bad`` steps give a loss of NaN."""

    def __init__(self, engine, scores=(), bad=()):
        self.engine, self.scores, self.bad, self.step = engine, list(scores), bad, 0
        self.evaluations = 0

    def micro_batches(self, step):
        self.step = step
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(4, 3, generator=generator) for _ in range(2)]

    def loss(self, batch):
        loss = (self.engine.forward(batch) ** 2).mean() + 0 * torch.rand(())
        return loss * float("nan") if self.step in self.bad else loss

    def step_metrics(self):
        return {"noise": float(torch.rand(())), "pairs": 8.0}

    def evaluate(self):
        if not self.scores:
            return {}
        self.evaluations += 1
        return {"eval/accuracy": self.scores[self.evaluations - 1]}

    def row_ids(self, batch):
        return [f"rows.jsonl:{self.step + 1}"]

    def state_dict(self):
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state):
        self.evaluations = state["evaluations"]


@pytest.fixture
def start(tmp_path):
    def run(config=CONFIG, total=6, identity=None, folder=tmp_path / "run", **options):
        torch.manual_seed(0)
        engine = LocalEngine(nn.Linear(3, 1), ranks=ALONE, optimizer=OptimizerConfig(learning_rate=0.1), total_steps=6)
        folder.mkdir(exist_ok=True)
        task = Task(engine, **options)
        loop = Run(
            folder=folder,
            store=CheckpointStore(folder / "checkpoints", ALONE, config.keep_checkpoints),
            identity=identity or {"seed": 0},
            max_skipped_steps=2,
            documents={"config.yaml": "a: 1\n"},
        )
        return fit(engine, task, config, loop, total), engine, folder

    return run


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


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
    state, _, folder = start(
        replace(CONFIG, keep_checkpoints=1, checkpoint_every=1), scores=[0.9, 0.7, 0.6]
    )
    assert state.best_step == 2
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]


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
