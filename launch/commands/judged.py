"""``rlhf evaluate win-rate``, ``grades``, ``best-of-n`` and ``tax``: what others say of a policy's answers."""

import argparse
import json
from typing import Any

from launch.commands.arguments import Subparsers, command, named, positive, positive_int
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

_BEST_OF_N = """\
Of n samples of a policy, take the one that a reward model likes best, and ask another reward what it is worth, for
n = 1, 2, 4 and so on: the curve of gold reward against KL. It is the mean over all choices of n of the samples there
are. Written to the folder: evaluation.json, items.jsonl and best_of_n.svg. In a pipeline: the stage "best-of-n".
"""
_WIN_RATE = """\
Ask a judge which of two models' answers is better, question by question: a reward model, a function, or a model behind
an OpenAI-compatible endpoint, which sees each pair in both orders. Prints the win rate with its standard error, and the
length-controlled one (AlpacaEval 2's minimal logistic model). Replies of an endpoint are kept as they come: the same
command goes on where it was stopped, and nothing is asked twice. In a pipeline: the stage "win-rate".
"""
_GRADES = """\
Have a judge grade every answer by itself from 1 to 10, as MT-Bench does: the first turn alone, the second within the
conversation, math, reasoning and coding beside a reference answer. Prints means by model, turn and category with 95 %
intervals, and draws a radar plot. Replies are kept as they come, and as FastChat's show_result reads them
(model_judgment/). In a pipeline: the stage "grade".
"""
_TAX = """\
Let a model do tasks of lm-eval (extra "tax") before training and after it, and print what changed, with 95 % intervals
over the same items: what alignment has cost. In a pipeline: the stage "tax".
"""


def add_win_rate(subparsers: Subparsers) -> None:
    about = "compare two files of answers by a judge"
    parser = command(subparsers, "win-rate", run_win_rate, help=about, description=_WIN_RATE)
    answers = "outputs.json or responses.jsonl of rlhf generate"
    parser.add_argument("--outputs", type=home_path, required=True, help=f"answers of a model: {answers}")
    parser.add_argument("--reference", type=home_path, required=True, help="those of another, to the same questions")
    rewards = "the folder of a reward model, the URL of a server of one, or module:function"
    parser.add_argument("--judge", metavar="REWARD", help=rewards)
    _add_endpoint(parser)
    parser.add_argument("-o", "--output", type=home_path, required=True, help="folder for verdicts and win rate")


def run_win_rate(options: argparse.Namespace) -> int:
    from policy.win_rate.__main__ import evaluate
    from policy.win_rate.config import WinRateConfig

    settings: dict[str, Any] = {name: str(getattr(options, name)) for name in ("outputs", "reference", "output")}
    settings |= {"reward": options.judge, "judge": _endpoint(options)}
    return _evaluated(WinRateConfig, settings, "win-rate", evaluate)


def add_grades(subparsers: Subparsers) -> None:
    about = "have a judge grade answers, as MT-Bench does"
    parser = command(subparsers, "grades", run_grades, help=about, description=_GRADES)
    answers = "answers of a model: model_answer/NAME.jsonl, outputs.json or responses.jsonl; may be given again"
    parser.add_argument("--answers", action="append", required=True, metavar="NAME=FILE", help=answers)
    questions = "MT-Bench's question.jsonl, for answers that do not hold their questions"
    parser.add_argument("--questions", type=home_path, help=questions)
    right = "FastChat's reference_answer/MODEL.jsonl (default: the column reference of the questions)"
    parser.add_argument("--references", type=home_path, help=right)
    _add_endpoint(parser)
    parser.add_argument("-o", "--output", type=home_path, required=True, help="folder for grades and plot")


def run_grades(options: argparse.Namespace) -> int:
    from policy.grading.__main__ import evaluate
    from policy.grading.config import GradingConfig

    answers = dict(named("--answers", text, "FILE") for text in options.answers)
    settings: dict[str, Any] = {"answers": answers, "output": str(options.output), "judge": _endpoint(options)}
    for name in ("questions", "references"):
        if getattr(options, name) is not None:
            settings[name] = str(getattr(options, name))
    return _evaluated(GradingConfig, settings, "grades", evaluate)


def add_best_of_n(subparsers: Subparsers) -> None:
    about = "judge what a reward model chooses among several samples of a policy"
    parser = command(subparsers, "best-of-n", run_best_of_n, help=about, description=_BEST_OF_N)
    source = "responses.jsonl of rlhf generate with several --samples"
    parser.add_argument("--responses", type=home_path, required=True, help=source)
    kinds = "the folder of a reward model, the URL of a server (several: with commas), or module:function"
    parser.add_argument("--proxy", required=True, help=f"the reward that chooses: {kinds}")
    parser.add_argument("--gold", required=True, help=f"the reward that judges: {kinds}")
    parser.add_argument("-o", "--output", type=home_path, required=True, help="folder for numbers and plot")


def run_best_of_n(options: argparse.Namespace) -> int:
    from policy.best_of_n.__main__ import evaluate
    from policy.best_of_n.config import BestOfNConfig

    settings = {name: str(getattr(options, name)) for name in ("responses", "proxy", "gold", "output")}
    return _evaluated(BestOfNConfig, settings, "best-of-n", evaluate)


def add_tax(subparsers: Subparsers) -> None:
    about = "what training has cost, by tasks of lm-eval before and after"
    parser = command(subparsers, "tax", run_tax, help=about, description=_TAX)
    parser.add_argument("--before", type=home_path, required=True, help="folder of the model that training began with")
    parser.add_argument("--after", type=home_path, required=True, help="folder of the trained one")
    tasks = "a task or group of lm-eval, such as hellaswag; may be given again"
    parser.add_argument("--task", dest="tasks", action="append", required=True, metavar="NAME", help=tasks)
    parser.add_argument("--include", type=home_path, metavar="FOLDER", help="further tasks, in lm-eval's YAML")
    parser.add_argument("--limit", type=positive_int, help="items of each task at most (default: all)")
    parser.add_argument("--shots", type=int, help="examples before each item (default: as the task says)")
    parser.add_argument("--chat", action="store_true", help="put items into the model's chat template")
    parser.add_argument("--batch-size", type=positive_int, help="items at once (default 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 and so on (default: a GPU if there is one)")
    types = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--precision", choices=types, help="(default auto: that of the files)")
    parser.add_argument("-o", "--output", type=home_path, required=True, help="folder for numbers and items")


def run_tax(options: argparse.Namespace) -> int:
    from policy.tax.__main__ import evaluate
    from policy.tax.config import TaxConfig

    paths = [name for name in ("before", "after", "include", "output") if getattr(options, name) is not None]
    settings = {name: str(getattr(options, name)) for name in paths}
    names = ("tasks", "limit", "shots", "chat", "batch_size", "device", "precision")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return _evaluated(TaxConfig, settings | given, "tax", evaluate)


def _evaluated(config_class: type[Any], settings: dict[str, Any], name: str, evaluate: Any) -> int:
    """Check the settings, and evaluate in this process."""
    from rlhf.config import validate

    config = validate(config_class, settings, program=f"rlhf evaluate {name}", origin="command line")

    from rlhf.engine.ranks import single_rank

    evaluate(config, single_rank())
    return 0


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Options of :class:`policy.judging.config.JudgeConfig`; what is not given has its default there."""
    add = parser.add_argument_group("a judge behind an endpoint").add_argument
    add("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, such as http://host:8000/v1")
    add("--judge-model", metavar="NAME", help="the model of the endpoint")
    key = "the environment variable that holds its key (default OPENAI_API_KEY)"
    add("--key-variable", metavar="NAME", help=key)
    add("--concurrency", type=positive_int, help="questions at once (default 8)")
    add("--timeout", dest="timeout_seconds", type=positive, help="seconds to wait for a reply (default 120)")
    add("--tries", type=positive_int, help="of one question (default 6)")
    add("--judge-tokens", type=positive_int, help="of a reply at most, thoughts included (default 2048)")
    more = "a further field of each request, such as reasoning_effort=low; may be repeated"
    add("--request", action="append", metavar="NAME=VALUE", help=more)
    share = "share of the items that may stay without a verdict; they are counted and left out (default .05)"
    add("--tolerated", type=float, metavar="SHARE", help=share)
    prices = "of a million tokens read and written: the cost is shown before anything is asked"
    add("--prices", type=float, nargs=2, metavar=("READ", "WRITTEN"), help=prices)


def _endpoint(options: argparse.Namespace) -> dict[str, Any]:
    names = ("key_variable", "concurrency", "timeout_seconds", "tries", "tolerated", "prices")
    found = {name: getattr(options, name) for name in names}
    found |= {"url": options.judge_url, "model": options.judge_model, "max_tokens": options.judge_tokens}
    if options.request:
        found["request"] = {"temperature": 0} | dict(_field(text) for text in options.request)
    return {name: value for name, value in found.items() if value is not None}


def _field(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise UserError(f"--request {text}: expected NAME=VALUE, such as reasoning_effort=low")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
