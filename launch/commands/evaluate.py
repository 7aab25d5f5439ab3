"""``rlhf evaluate``: policies compared by the reward of fresh samples, with their KL from a reference."""

import argparse
from pathlib import Path

from launch.commands.arguments import positive_int
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="compare policies by a reward function on fresh samples for held-out prompts",
        description="Sample from the reference and from every policy, score with a Python function, and print mean "
        "rewards with 95 %% intervals, the gain over the reference for the same prompts, and the KL from it.",
    )
    start = "folder of the model that training started from"
    parser.add_argument("--reference", type=home_path, required=True, help=start)
    parser.add_argument(
        "--policy", action="append", default=[], metavar="NAME=FOLDER", help="a policy to compare; may be given again"
    )
    parser.add_argument("--prompts", type=home_path, required=True, help='jsonl file with a "prompt" in each line')
    parser.add_argument("--reward", required=True, help="module:function(prompts, responses) -> rewards")
    parser.add_argument("--template", help="as data.template of the recipe")
    parser.add_argument("--samples", type=positive_int, default=4, help="responses to a prompt (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, help="(default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--output", type=home_path, required=True, help="folder for samples and tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from policy.evaluation.compare import evaluate_policies, read_prompts
    from policy.evaluation.options import SamplingSettings
    from policy.evaluation.results import evaluation_table
    from reward.function import load_reward

    found = evaluate_policies(
        dict(_named(text) for text in options.policy),
        options.reference,
        read_prompts(options.prompts),
        load_reward(options.reward),
        template=options.template,
        settings=SamplingSettings(
            samples=options.samples,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        ),
        output=options.output,
    )
    Console().print(evaluation_table(found))
    return 0


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder:
        raise UserError(f"--policy {text}: expected NAME=FOLDER, such as dpo=runs/dpo/final")
    return name, Path(folder)
