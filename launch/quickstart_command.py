"""``rlhf quickstart``: a margin reward model on a small real language model, from nothing."""

import argparse
import json
import subprocess
import time
from pathlib import Path

from launch.launcher import default_ranks, launcher, launcher_environment
from rlhf.core.errors import UserError
from rlhf.models.gguf import embedded_model, import_gguf

RECIPE = Path(__file__).parent / "recipes" / "quickstart_reward.yaml"
MODEL = Path("models/SmolLM2-135M-Instruct")
OUTPUT = Path("runs/quickstart/reward")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="train, evaluate and publish a margin reward model on SmolLM2-135M and a small shipped corpus",
        description="Import SmolLM2-135M-Instruct, train a reward model with optimal-transport margins on the shipped "
        "sentiment pairs under the deepspeed launcher, evaluate it on held-out topics and publish it. Started again, "
        "it goes on where it stopped.",
    )
    parser.add_argument("--ranks", type=int, help="processes (default: all GPUs, or 2 on a CPU with 2 or more cores)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the reward recipe to change")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    _say(f"1/2  the backbone: {MODEL}")
    import_gguf(embedded_model(), MODEL)
    ranks = options.ranks or default_ranks()
    command = [*launcher(ranks), "--module", "reward", "--config", str(RECIPE), *options.overrides]
    _say(f"2/2  the reward model: {' '.join(map(_shown, command))}")
    final = OUTPUT / "final" / "margin_rlhf_manifest.json"
    code = subprocess.run(command, check=False, env=launcher_environment()).returncode
    if code != 0 or not final.is_file():  # the deepspeed command can exit 0 although a rank was killed
        raise UserError(f"the reward stage did not finish (exit code {code}); the lines above say why")
    rewards = json.loads(final.read_text())["rewards"]
    print(
        f"\ndone in {time.monotonic() - began:.0f} s. {OUTPUT}/final opens with AutoModelForSequenceClassification; "
        f"held-out rewards: mean {rewards['mean']:.2f}, standard deviation {rewards['standard_deviation']:.2f}.\n"
        "Next, score texts of your own (a JSON line each: prompt and response, or prompt, chosen and rejected):\n"
        f"  .venv/bin/rlhf score --model {OUTPUT}/final --data launch/quickstart/sentiment_pairs_heldout.jsonl "
        "--output runs/quickstart/scores.jsonl"
    )
    return 0


def _shown(part: str) -> str:
    path = Path(part)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return part


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
