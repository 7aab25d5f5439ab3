"""``rlhf generate``: a policy's answers to the questions of a benchmark or of a file."""

import argparse

from launch.commands.arguments import SAMPLING, Subparsers, add_sampling, chosen, command, positive_int
from launch.commands.evaluate import PRECISIONS
from policy.answers.config import FORMATS, PRESETS
from rlhf.core.paths import home_path

_DESCRIPTION = """\
Answer every question of a file, over all turns, and write the answers in the format that the benchmark reads. What is
answered is kept at once: the same command goes on where it was stopped. On several ranks: a stage "generate" of a
pipeline, or a launcher with --module policy.answers.
"""


def add_parser(subparsers: Subparsers) -> None:
    about = "write a policy's answers as AlpacaEval, MT-Bench and Arena-Hard read them"
    parser = command(subparsers, "generate", run, help=about, description=_DESCRIPTION)
    parser.add_argument("--model", type=home_path, required=True, help="final/ folder of a run, or any chat model")
    parser.add_argument("--prompts", type=home_path, required=True, help="the file of questions")
    parser.add_argument("-o", "--output", type=home_path, required=True, help="folder for the answers")
    kinds = "; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items())
    parser.add_argument("--format", choices=["auto", *FORMATS], default="auto", help=f"{kinds} (default: by columns)")
    parser.add_argument("--name", help="of the policy in the answers (default: its folder)")
    parser.add_argument("--preset", choices=[*PRESETS], help="sampling by name; single settings win over it")
    one = "draw all at --temperature, also MT-Bench, whose categories have temperatures of their own"
    parser.add_argument("--one-temperature", dest="category_temperatures", action="store_false", default=None, help=one)
    parser.add_argument("--template", help="as data.template of the recipe (default: the model's own)")
    parser.add_argument("--system-prompt", help="before conversations that have no system message")
    add_sampling(parser, samples=1, max_new_tokens=1024)
    parser.add_argument("--batch-rows", type=positive_int, help="answers at once (default 64)")
    parser.add_argument("--backend", choices=["hf", "vllm"], help="this process writes (hf), or vLLM (default hf)")
    where = "Python of an environment that has vLLM (default: this one)"
    parser.add_argument("--vllm-python", type=home_path, metavar="PATH", help=where)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="(default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Answer in this process."""
    from policy.answers.__main__ import answer
    from policy.answers.config import GenerateConfig
    from rlhf.config import load_config

    names = ("format", "name", "preset", "category_temperatures", "template", "system_prompt", "precision")
    sampling = chosen(options, (*SAMPLING, "batch_rows", "backend"))
    if options.vllm_python is not None:
        sampling["vllm.python"] = str(options.vllm_python)
    given = chosen(options, names) | {f"sampling.{name}": value for name, value in sampling.items()}
    given |= {name: str(getattr(options, name)) for name in ("model", "prompts", "output")}
    settings = {name: value for name, value in given.items() if value is not None}
    config = load_config(GenerateConfig, [], [], program="rlhf generate", settings=settings)

    from rlhf.engine.ranks import single_rank

    answer(config, single_rank())
    return 0
