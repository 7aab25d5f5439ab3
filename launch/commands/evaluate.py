"""``rlhf evaluate``: reward models by labeled answers, policies by fresh samples, answers by judges."""

import argparse

from launch.commands import judged
from launch.commands.arguments import (
    SAMPLING,
    Subparsers,
    add_columns,
    add_sampling,
    chosen,
    command,
    given_columns,
    group,
    named,
    positive_int,
)
from reward.benchmarks.names import NAMES, PAIRS
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "system",
    "input",
    "better",
    "strength",
    "answers",
    "group",
    "chosen_score",
    "rejected_score",
)

_POLICY = """\
Sample from the reference and from every policy, score with a Python function, and print mean rewards with 95 %
intervals, the gain over the reference for the same prompts, and the KL from it.
"""
_REWARD = """\
Score right and wrong answers and print the numbers of a benchmark by its published formula, with 95 % intervals, beside
those of a model that takes the longer answer, and those under another item's prompt. On several ranks: a stage
"benchmark" of a pipeline, or a launcher with --module policy.benchmark.
"""


def add_parser(subparsers: Subparsers) -> None:
    kinds = group(subparsers, "evaluate", help="judge reward models and policies", of="what")
    _add_policy(kinds)
    _add_reward(kinds)
    judged.add_best_of_n(kinds)
    judged.add_win_rate(kinds)
    judged.add_grades(kinds)
    judged.add_tax(kinds)


def _add_policy(subparsers: Subparsers) -> None:
    about = "compare policies by a reward function on fresh samples for held-out prompts"
    parser = command(subparsers, "policy", run_policy, help=about, description=_POLICY)
    start = "folder of the model that training started from"
    parser.add_argument("--reference", type=home_path, required=True, help=start)
    policy = "a policy to compare; may be given again"
    parser.add_argument("--policy", action="append", default=[], metavar="NAME=FOLDER", help=policy)
    parser.add_argument("--prompts", type=home_path, required=True, help="file of prompts: texts, or messages")
    rewards = "module:function(prompts, responses) -> rewards, the folder of a reward model, or the URL of a server"
    parser.add_argument("--reward", required=True, help=rewards)
    parser.add_argument("--template", help="as data.template of the recipe")
    add_sampling(parser, samples=4, max_new_tokens=128)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of all models (default %(default)s)")
    parser.add_argument("--output", type=home_path, required=True, help="folder for samples and tables")


def run_policy(options: argparse.Namespace) -> int:
    from policy.evaluation.__main__ import evaluate
    from policy.evaluation.config import EvaluationConfig
    from rlhf.config import validate

    settings = chosen(options, ("reward", "template", "precision"))
    for name in ("reference", "prompts", "output"):
        settings[name] = str(getattr(options, name))
    settings["policies"] = dict(named("--policy", text, "FOLDER") for text in options.policy)
    sampling = chosen(options, SAMPLING)
    settings["sampling"] = {name: value for name, value in sampling.items() if value is not None}
    config = validate(EvaluationConfig, settings, program="rlhf evaluate policy", origin="command line")

    from rlhf.engine.ranks import single_rank

    evaluate(config, single_rank())
    return 0


def _add_reward(subparsers: Subparsers) -> None:
    about = "judge a reward model by a benchmark or a file of preference pairs"
    parser = command(subparsers, "reward", run_reward, help=about, description=_REWARD)
    parser.add_argument("--model", type=home_path, required=True, help="final/ folder of a reward run, or of a policy")
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in NAMES.items())
    kinds += "; or a FILE of preference pairs, which needs no --data"
    served = "a server of the model in --model, which scores in its place; may be given again"
    parser.add_argument("--url", action="append", default=[], help=served)
    implicit = "the model that a policy was trained from: judges the reward that the policy implies (DPO)"
    parser.add_argument("--reference", type=home_path, help=implicit)
    told = f"{kinds} (default {PAIRS})"
    parser.add_argument("--benchmark", type=_benchmark, metavar="NAME|FILE", default=(PAIRS, None), help=told)
    data = "file, folder or hub name in the benchmark's format (default: where it is published)"
    parser.add_argument("--data", help=data)
    parser.add_argument("--split", help="split of a hub data set or of a folder")
    parser.add_argument("--output", type=home_path, required=True, help="folder for numbers, table and scores")
    parser.add_argument("--template", help="as data.template of the recipe (default: the model's own)")
    longest = "longer texts lose the beginning of their prompt (default: what the model takes)"
    parser.add_argument("--max-tokens", type=positive_int, help=longest)
    alone = "do not score each answer under another item's prompt: half the time"
    parser.add_argument("--no-wrong-prompt", dest="wrong_prompt", action="store_false", help=alone)
    at_once = "padded tokens at once (default %(default)s)"
    parser.add_argument("--batch-tokens", type=positive_int, default=8192, help=at_once)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="(default %(default)s)")
    add_columns(parser, COLUMNS)


def _benchmark(text: str) -> tuple[str, str | None]:
    """A benchmark by its name, or a file of pairs."""
    if text in NAMES:
        return text, None
    path = home_path(text)
    if path.suffix or len(path.parts) > 1 or path.exists():
        return PAIRS, str(path)
    raise argparse.ArgumentTypeError(f"{text}: no such file, and no benchmark; there are {', '.join(NAMES)}")


def run_reward(options: argparse.Namespace) -> int:
    from policy.benchmark.__main__ import evaluate
    from policy.benchmark.config import BenchmarkConfig
    from rlhf.config import validate

    names = ("split", "template", "max_tokens", "wrong_prompt", "batch_tokens", "precision")
    settings = chosen(options, names) | {"columns": given_columns(options, COLUMNS)}
    settings |= {name: str(getattr(options, name)) for name in ("model", "output")}
    settings["url"] = options.url
    settings["benchmark"], file = options.benchmark
    if file is not None and options.data is not None:
        raise UserError(f"--data {options.data}: --benchmark {file} names the rows already; give one of them")
    settings["data"] = file or options.data
    if options.reference is not None:
        settings["reference"] = str(options.reference)
    config = validate(BenchmarkConfig, settings, program="rlhf evaluate reward", origin="command line")

    from rlhf.engine.ranks import single_rank

    evaluate(config, single_rank())
    return 0
