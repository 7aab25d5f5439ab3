"""``rlhf evaluate``: reward models by labeled answers, policies by the reward of fresh samples."""

import argparse
import os

from launch.commands.arguments import (
    SAMPLING,
    Subparsers,
    add_columns,
    add_sampling,
    chosen,
    command,
    given_columns,
    group,
    positive,
    positive_int,
)
from reward.benchmarks.names import NAMES
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
COLUMNS = ("prompt", "chosen", "rejected", "system", "input", "better", "strength", "answers", "group")

_POLICY = """\
Sample from the reference and from every policy, score with a Python function, and print mean rewards with 95 %
intervals, the gain over the reference for the same prompts, and the KL from it.
"""
_REWARD = """\
Score right and wrong answers and print the numbers of a benchmark by its published formula, with 95 % intervals, beside
those of a model that takes the longer answer, and those under another item's prompt. On several ranks: a stage
"benchmark" of a pipeline, or a launcher with --module policy.benchmark.
"""

_BEST_OF_N = """\
Of n samples of a policy, take the one that a reward model likes best, and ask another reward what it is worth, for
n = 1, 2, 4 and so on: the curve of gold reward against KL. It is the mean over all choices of n of the samples there
are. Written to the folder: best_of_n.json and best_of_n.svg.
"""

_WIN_RATE = """\
Ask a judge which of two models' answers is better, question by question: a reward model, a function, or a model behind
an OpenAI-compatible endpoint, which sees each pair in both orders. Prints the win rate with its standard error, and the
length-controlled one (AlpacaEval 2's minimal logistic model). Verdicts of an endpoint are kept as they come: the same
command goes on where it was stopped, and nothing is asked twice.
"""


def add_parser(subparsers: Subparsers) -> None:
    kinds = group(subparsers, "evaluate", help="judge reward models and policies", of="what")
    _add_policy(kinds)
    _add_reward(kinds)
    _add_best_of_n(kinds)
    _add_win_rate(kinds)


def _add_policy(subparsers: Subparsers) -> None:
    about = "compare policies by a reward function on fresh samples for held-out prompts"
    parser = command(subparsers, "policy", run_policy, help=about, description=_POLICY)
    start = "folder of the model that training started from"
    parser.add_argument("--reference", type=home_path, required=True, help=start)
    policy = "a policy to compare; may be given again"
    parser.add_argument("--policy", action="append", default=[], metavar="NAME=FOLDER", help=policy)
    parser.add_argument("--prompts", type=home_path, required=True, help="file of prompts: texts, or messages")
    parser.add_argument("--reward", required=True, help="module:function(prompts, responses) -> rewards")
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
    settings["policies"] = dict(_named(text) for text in options.policy)
    sampling = chosen(options, SAMPLING)
    settings["sampling"] = {name: value for name, value in sampling.items() if value is not None}
    config = validate(EvaluationConfig, settings, program="rlhf evaluate policy", origin="command line")

    from rlhf.engine.ranks import single_rank

    evaluate(config, single_rank())
    return 0


def _add_best_of_n(subparsers: Subparsers) -> None:
    about = "judge what a reward model chooses among several samples of a policy"
    parser = command(subparsers, "best-of-n", run_best_of_n, help=about, description=_BEST_OF_N)
    source = "responses.jsonl of rlhf generate with several --samples"
    parser.add_argument("--responses", type=home_path, required=True, help=source)
    kinds = "the folder of a reward model, or module:function"
    parser.add_argument("--proxy", required=True, help=f"the reward that chooses: {kinds}")
    parser.add_argument("--gold", required=True, help=f"the reward that judges: {kinds}")
    parser.add_argument("-o", "--output", type=home_path, required=True, help="folder for numbers and plot")


def run_best_of_n(options: argparse.Namespace) -> int:
    from rich.console import Console

    from policy.evaluation.choosing import choice_table, evaluate_choices

    Console().print(choice_table(evaluate_choices(options.responses, options.proxy, options.gold, options.output)))
    return 0


def _add_win_rate(subparsers: Subparsers) -> None:
    about = "compare two files of answers by a judge"
    parser = command(subparsers, "win-rate", run_win_rate, help=about, description=_WIN_RATE)
    answers = "outputs.json or responses.jsonl of rlhf generate"
    parser.add_argument("--outputs", type=home_path, required=True, help=f"answers of a model: {answers}")
    parser.add_argument("--reference", type=home_path, required=True, help="those of another, to the same questions")
    judges = parser.add_mutually_exclusive_group(required=True)
    judges.add_argument("--judge", metavar="REWARD", help="the folder of a reward model, or module:function")
    judges.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, such as http://host:8000/v1")
    parser.add_argument("--judge-model", metavar="NAME", help="the model of the endpoint")
    key = "the environment variable that holds its key (default %(default)s)"
    parser.add_argument("--key-variable", metavar="NAME", default="OPENAI_API_KEY", help=key)
    parser.add_argument("--concurrency", type=positive_int, default=8, help="questions at once (default %(default)s)")
    patience = "seconds to wait for a verdict (default %(default)s)"
    parser.add_argument("--timeout", type=positive, default=120.0, help=patience)
    parser.add_argument("--tries", type=positive_int, default=6, help="of one question (default %(default)s)")
    prices = "of a million tokens read and written: the cost is shown before anything is asked"
    parser.add_argument("--prices", type=float, nargs=2, metavar=("READ", "WRITTEN"), help=prices)
    parser.add_argument("-o", "--output", type=home_path, required=True, help="folder for verdicts and win rate")


def run_win_rate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from policy.judging.endpoint import Endpoint
    from policy.judging.run import CACHE, by_endpoint, by_reward, compare, win_rate_table

    console = Console()
    if options.judge is not None:
        prefer = by_reward(options.judge)
    else:
        if options.judge_model is None:
            raise UserError("--judge-url needs --judge-model: the name that the endpoint has for the model")
        endpoint = Endpoint(
            url=options.judge_url,
            model=options.judge_model,
            key=os.environ.get(options.key_variable),
            timeout_seconds=options.timeout,
            tries=options.tries,
            concurrency=options.concurrency,
        )
        prices = None if options.prices is None else (options.prices[0], options.prices[1])
        prefer = by_endpoint(endpoint, options.output / CACHE, console, prices)
    console.print(win_rate_table(*compare(options.outputs, options.reference, prefer, options.output)))
    return 0


def _named(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not folder:
        raise UserError(f"--policy {text}: expected NAME=FOLDER, such as dpo=runs/dpo/final")
    return name, folder


def _add_reward(subparsers: Subparsers) -> None:
    about = "judge a reward model by a benchmark or a file of preference pairs"
    parser = command(subparsers, "reward", run_reward, help=about, description=_REWARD)
    parser.add_argument("--model", type=home_path, required=True, help="final/ folder of a reward run, or of a policy")
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in NAMES.items())
    implicit = "the model that a policy was trained from: judges the reward that the policy implies (DPO)"
    parser.add_argument("--reference", type=home_path, help=implicit)
    parser.add_argument("--benchmark", choices=[*NAMES], default="pairs", help=f"{kinds} (default %(default)s)")
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


def run_reward(options: argparse.Namespace) -> int:
    from policy.benchmark.__main__ import evaluate
    from policy.benchmark.config import BenchmarkConfig
    from rlhf.config import validate

    names = ("benchmark", "data", "split", "template", "max_tokens", "wrong_prompt", "batch_tokens", "precision")
    settings = chosen(options, names) | {"columns": given_columns(options, COLUMNS)}
    settings |= {name: str(getattr(options, name)) for name in ("model", "output")}
    if options.reference is not None:
        settings["reference"] = str(options.reference)
    config = validate(BenchmarkConfig, settings, program="rlhf evaluate reward", origin="command line")

    from rlhf.engine.ranks import single_rank

    evaluate(config, single_rank())
    return 0
