"""``rlhf plan STAGE``: what a run needs of memory, disk and time, before it is started. No GPU, no weights."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launch.commands.arguments import SettingsParser, positive_int
from launch.stages import STAGES, training
from rlhf.core.paths import recipe_path

if TYPE_CHECKING:
    from launch.plan.cluster import Cluster
    from rlhf.models.options import BackboneConfig

_DESCRIPTION = """\
Read a recipe as the stage would, and say what it needs on a cluster of a given shape: parameters, ZeRO states,
activations, caches, host memory, disk, batches and time; whether it fits, and what to change if not. No weights are
loaded. Models that are not on disk are known by name (Llama-3-8B, Llama-3-70B and a few more), or described by
--model-config. docs/plan.md has the formulas, and how near they come to measured peaks.

Exit status: 0 if it fits; 1 if not; 2 if the settings are refused.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("plan", help="what a run needs of memory, disk and time, without a GPU")
    stages = parser.add_subparsers(title="stages", dest="stage", required=True, parser_class=SettingsParser)
    for name in training():
        stage = stages.add_parser(
            name,
            help=f"the {name} stage",
            description=_DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_arguments(stage)
    pipeline = stages.add_parser(
        "pipeline",
        help="all stages of a pipeline that train",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_arguments(pipeline, recipe="the pipeline's recipe", setting="NAME.key=value")


def _add_arguments(
    parser: argparse.ArgumentParser,
    recipe: str = "a recipe of the stage; may be given again, later ones win",
    setting: str = "key=value",
) -> None:
    parser.add_argument("--config", metavar="RECIPE", type=recipe_path, action="append", default=[], help=recipe)
    parser.add_argument("--nodes", type=positive_int, default=1, help="(default: 1)")
    devices = "ranks of each node (default: 8; on this machine, what it has)"
    parser.add_argument("--devices-per-node", metavar="M", type=positive_int, help=devices)
    device = "h100-80gb, h200, a100-80gb, a100-40gb, l40s or cpu (default: this machine)"
    parser.add_argument("--device", metavar="NAME", help=device)
    parser.add_argument("--device-memory", metavar="SIZE", type=_size, help="of each device, such as 80GiB")
    host = "of each node, such as 1TiB; without it host memory is stated, not judged"
    parser.add_argument("--host-memory", metavar="SIZE", type=_size, help=host)
    flops = "peak operations a second of a device (default: the data sheet's, where the device is known)"
    parser.add_argument("--flops", type=_positive, help=flops)
    share = "share of --flops that training reaches (default: 0.4)"
    parser.add_argument("--utilization", metavar="SHARE", type=_share, default=0.4, help=share)
    shape = "a config.json or a known name, for models that are not on disk"
    parser.add_argument("--model-config", metavar="FILE", help=shape)
    parser.add_argument("--rows", metavar="N", type=positive_int, help="training rows (pairs, prompts), if not here")
    mean = "mean length of a row (of PPO: of a prompt), if the data is not here"
    parser.add_argument("--mean-tokens", metavar="T", type=_positive, help=mean)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar=setting, help="settings; they win over recipes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan of a stage, or of all stages of a pipeline.

    Raises:
        UserError: if the recipe, a model's shape or the cluster cannot be made out.
    """
    import json

    made: Mapping[str, BackboneConfig] = {}
    if options.stage == "pipeline":
        stages, made = _pipeline(options)
    else:
        stages = {options.stage: (options.stage, _config(options))}

    # What is wrong with the recipe has been said; from here on torch is needed.
    from launch.plan.models import Sources
    from launch.plan.planner import Request, plan_stage
    from launch.plan.report import as_json

    _quiet()
    cluster = _cluster(options)
    request = Request(
        sources=Sources(fallback=options.model_config, made=made), rows=options.rows, mean_tokens=options.mean_tokens
    )
    found = {
        name: as_json(plan_stage(kind, config, cluster, request), request) for name, (kind, config) in stages.items()
    }
    if options.json:
        print(json.dumps(found if options.stage == "pipeline" else found[options.stage], indent=2))
    else:
        _show(found, titled=options.stage == "pipeline")
    return 0 if all(each["fits"] for each in found.values()) else 1


def _config(options: argparse.Namespace) -> Any:
    from rlhf.config import load_config

    return load_config(STAGES[options.stage].config_class(), options.config, options.overrides, program="rlhf plan")


def _pipeline(options: argparse.Namespace) -> "tuple[dict[str, tuple[str, Any]], Mapping[str, BackboneConfig]]":
    """The stages that train, by name, and what they leave to each other."""
    from launch.pipeline.recipe import load_pipeline
    from launch.pipeline.subject import made_models
    from rlhf.core.errors import ConfigError

    if len(options.config) != 1:
        raise ConfigError(f"rlhf plan pipeline: {len(options.config)} recipes; expected one --config PIPELINE.yaml")
    pipeline = load_pipeline(options.config[0], options.overrides)
    stages = {each.name: (each.stage.name, each.config) for each in pipeline.stages if each.stage.trains}
    return stages, made_models(pipeline)


def _cluster(options: argparse.Namespace) -> "Cluster":
    from launch.plan.cluster import cluster_of

    names = ("nodes", "devices_per_node", "device", "device_memory", "host_memory", "flops", "utilization")
    return cluster_of(**{name: getattr(options, name) for name in names})


def _show(found: dict[str, Any], *, titled: bool) -> None:
    from rich.console import Console

    from launch.plan.report import print_plan

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # of the tables in a file
    for name, plan in found.items():
        if titled:
            console.rule(name, align="left")
        print_plan(console, plan)


def _quiet() -> None:
    """A plan says what it has to say; Transformers and DeepSpeed have nothing to add."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    for name in ("DeepSpeed", "deepspeed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _size(text: str) -> int:
    from launch.plan.cluster import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share, above 0 and up to 1")
    return value
