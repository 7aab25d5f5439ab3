"""``rlhf evaluate``: policies compared by the reward of fresh samples, with their KL from a reference."""

import argparse

from launch.commands.arguments import Subparsers, chosen, command, positive_int
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

_DESCRIPTION = """\
Sample from the reference and from every policy, score with a Python function, and print mean rewards with 95 %
intervals, the gain over the reference for the same prompts, and the KL from it.
"""


def add_parser(subparsers: Subparsers) -> None:
    about = "compare policies by a reward function on fresh samples for held-out prompts"
    parser = command(subparsers, "evaluate", run, help=about, description=_DESCRIPTION)
    start = "folder of the model that training started from"
    parser.add_argument("--reference", type=home_path, required=True, help=start)
    policy = "a policy to compare; may be given again"
    parser.add_argument("--policy", action="append", default=[], metavar="NAME=FOLDER", help=policy)
    parser.add_argument("--prompts", type=home_path, required=True, help='jsonl file with a "prompt" in each line')
    parser.add_argument("--reward", required=True, help="module:function(prompts, responses) -> rewards")
    parser.add_argument("--template", help="as data.template of the recipe")
    parser.add_argument("--samples", type=positive_int, default=4, help="responses to a prompt (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, help="(default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default %(default)s)")
    likeliest = "draw from so many likeliest tokens; 0 for all (default %(default)s)"
    parser.add_argument("--top-k", type=int, default=0, help=likeliest)
    penalty = "makes tokens that were there before less likely (default %(default)s)"
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help=penalty)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a response; may be repeated")
    precisions = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--precision", choices=precisions, default="auto", help="of all models (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--output", type=home_path, required=True, help="folder for samples and tables")


def run(options: argparse.Namespace) -> int:
    from policy.evaluation.__main__ import evaluate
    from policy.evaluation.config import EvaluationConfig
    from rlhf.config import validate

    settings = chosen(options, ("reward", "template", "precision"))
    for name in ("reference", "prompts", "output"):
        settings[name] = str(getattr(options, name))
    settings["policies"] = dict(_named(text) for text in options.policy)
    sampling = ("samples", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
    settings["sampling"] = chosen(options, sampling)
    config = validate(EvaluationConfig, settings, program="rlhf evaluate", origin="command line")

    from rlhf.engine.ranks import single_rank

    evaluate(config, single_rank())
    return 0


def _named(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not folder:
        raise UserError(f"--policy {text}: expected NAME=FOLDER, such as dpo=runs/dpo/final")
    return name, folder
