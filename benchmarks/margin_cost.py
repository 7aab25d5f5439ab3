"""What the optimal-transport margin costs, as a share of a training step.

Trains a slice of a real model for a few steps of 64 pairs and times, inside those steps, all that the margin
adds: gathering rewards and embeddings, the transport problem, telemetry. Then margins alone, plan and telemetry, over
more pairs, beside the step that as many pairs take: a step's work grows with its pairs, a plan's with their square.
CPU seconds: what else the machine does changes little.

    python benchmarks/margin_cost.py --model models/SmolLM2-135M-Instruct --data PAIRS.jsonl
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from reward.building import build_reward_model
from reward.config import MarginConfig, RewardConfig, RewardModelConfig
from reward.margin_maker import MarginMaker
from reward.pairs import Pairs
from reward.task import RewardTask
from rlhf.data.options import DataConfig
from rlhf.data.preferences import load_preferences
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.tokenizer import required_embedding_rows
from rlhf.train.chat import load_chat
from rlhf.train.options import TrainConfig

PAIRS = 64
"""Pairs of the step that is trained."""
ROUNDS = 10


class TimedTask(RewardTask):
    """Counts the seconds spent on margins in every step."""

    margin_seconds = 0.0

    def _observe(self, pairs) -> None:
        began = time.process_time()
        super()._observe(pairs)
        self.margin_seconds += time.process_time() - began

    def step_metrics(self) -> dict[str, float]:
        began = time.process_time()
        metrics = super().step_metrics()
        self.margin_seconds += time.process_time() - began
        return metrics


def measure_step(options: argparse.Namespace, scope: str, folder: Path) -> tuple[float, float]:
    """Median seconds of a step, and of what the margin adds to it."""
    config = RewardConfig(
        output=folder,
        model=RewardModelConfig(path=options.model, layers=options.layers),
        data=DataConfig(train=options.data, eval_share=0.0, max_tokens=options.max_tokens, quarantine_max_share=0.5),
        margin=MarginConfig(kind="ot", parameters={"scope": scope}),
        train=TrainConfig(global_batch_size=PAIRS, micro_batch_tokens=options.micro_batch_tokens),
        engine=EngineConfig(kind="local"),
    )
    chat = load_chat(options.model)
    data = load_preferences(config.data, chat)
    module = build_reward_model(
        config.model,
        dtype=torch.float32,
        pad_token_id=chat.tokenizer.pad_token_id,
        vocabulary=required_embedding_rows(chat.tokenizer),
        seed=0,
    )
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    engine = LocalEngine(module, ranks=ranks, optimizer=OptimizerConfig(), total_steps=options.steps)
    task = TimedTask(engine, config, data.train, data.evals, options.steps)
    steps, margins = [], []
    for step in range(options.steps):
        began, task.margin_seconds = time.process_time(), 0.0
        batches = task.micro_batches(step)
        for place, batch in enumerate(batches):
            engine.backward(task.loss(batch), last=place == len(batches) - 1)
        engine.step()
        task.step_metrics()
        steps.append(time.process_time() - began)
        margins.append(task.margin_seconds)
    return statistics.median(steps[1:]), statistics.median(margins[1:])


def margin_alone(pairs: int, width: int) -> float:
    """Median seconds of margins over so many pairs: cost, plan, telemetry."""
    generator = torch.Generator().manual_seed(0)
    embeddings, rewards = torch.randn(2, pairs, width, generator=generator), torch.randn(2, pairs, generator=generator)
    nothing = torch.full((pairs,), torch.nan)
    made = Pairs(torch.arange(pairs), rewards[0], rewards[1], embeddings[0], embeddings[1], nothing)
    maker, seconds = MarginMaker(MarginConfig(kind="ot"), ROUNDS), []
    for step in range(ROUNDS):
        maker.start_step(step)
        began = time.process_time()
        maker.make(made, pairs)
        maker.transport_metrics()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="preference pairs")
    parser.add_argument("--layers", type=int, default=8, help="first so many layers (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3, help="the first is warm-up (default %(default)s)")
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="of margins alone")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    torch.set_num_threads(options.threads)
    table = Table("what", "CPU seconds", "share of the step of as many pairs")
    with tempfile.TemporaryDirectory() as folder:
        step, margin = measure_step(options, "micro_step", Path(folder))
    table.add_row(f"step of {PAIRS} pairs, margin.parameters.scope=micro_step", f"{step:.2f}", "")
    table.add_row("  of it margins, gathering, telemetry", f"{margin:.4f}", f"{margin / step:.3%}")
    for pairs in options.pairs:
        for width in (576, 4096):
            seconds = margin_alone(pairs, width)
            share = f"{seconds / (step * pairs / PAIRS):.3%}"
            table.add_row(f"margins over {pairs} pairs, D = {width}", f"{seconds:.4f}", share)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
