"""``rlhf plan STAGE``: what a run needs of memory, disk and time, before it is started. No GPU, no weights."""

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from launch.commands.arguments import (
    Subparsers,
    add_model_config,
    add_recipes,
    add_settings,
    chosen,
    command,
    group,
    positive,
    positive_int,
    share,
)
from launch.screen import console
from launch.stages import STAGES, training
from rlhf.core.errors import ConfigError

if TYPE_CHECKING:
    from launch.runs import Pipeline

PIPELINE = "pipeline"
_DESCRIPTION = """\
Read a recipe as the stage would, and say what it needs on a cluster of a given shape: parameters, ZeRO states,
activations, caches, host memory, disk, batches and time; whether it fits, and what to change if not. No weights are
loaded. Models that are not on disk are known by name (Llama-3-8B, Llama-3-70B and a few more), or described by
--model-config. docs/plan.md has the formulas, and how near they come to measured peaks.

Exit status: 0 if it fits; 1 if not; 2 if the settings are refused.
"""


def add_parser(subparsers: Subparsers) -> None:
    stages = group(subparsers, "plan", help="what a run needs of memory, disk and time, without a GPU", of="stage")
    for name in training():
        stage = command(stages, name, run, help=f"the {name} stage", description=_DESCRIPTION)
        add_recipes(stage, required=False)
        add_settings(stage)
        _add_cluster(stage)
    pipeline = command(stages, PIPELINE, run, help="all stages of a pipeline that train", description=_DESCRIPTION)
    add_recipes(pipeline, "the pipeline's recipe", required=False)
    add_settings(pipeline, metavar="NAME.key=value")
    _add_cluster(pipeline)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=positive_int, default=1, help="(default: 1)")
    devices = "ranks of each node (default: 8; on this machine, what it has)"
    parser.add_argument("--devices-per-node", metavar="M", type=positive_int, help=devices)
    device = "h100-80gb, h200, a100-80gb, a100-40gb, l40s or cpu (default: this machine)"
    parser.add_argument("--device", metavar="NAME", help=device)
    parser.add_argument("--device-memory", metavar="SIZE", type=_size, help="of each device, such as 80GiB")
    host = "of each node, such as 1TiB; without it host memory is stated, not judged"
    parser.add_argument("--host-memory", metavar="SIZE", type=_size, help=host)
    flops = "peak operations a second of a device (default: the data sheet's, where the device is known)"
    parser.add_argument("--flops", type=positive, help=flops)
    part = "share of --flops that training reaches (default: 0.4)"
    parser.add_argument("--utilization", metavar="SHARE", type=share, default=0.4, help=part)
    add_model_config(parser)
    parser.add_argument("--rows", metavar="N", type=positive_int, help="training rows (pairs, prompts), if not here")
    mean = "mean length of a row (of PPO: of a prompt), if the data is not here"
    parser.add_argument("--mean-tokens", metavar="T", type=positive, help=mean)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan of a stage, or of all stages of a pipeline.

    Raises:
        UserError: if the recipe, a model's shape or the cluster cannot be made out.
    """
    pipeline = _read(options)

    # What is wrong with the recipe has been said; from here on torch is needed.
    from launch.plan.cluster import cluster_of
    from launch.plan.models import Sources
    from launch.plan.planner import Request, plan_stage
    from launch.plan.report import as_json, print_plan

    _quiet()
    shape = ("nodes", "devices_per_node", "device", "device_memory", "host_memory", "flops", "utilization")
    cluster = cluster_of(**chosen(options, shape))
    all_nodes = {str(node): cluster.devices_per_node for node in range(cluster.nodes)}
    request = Request(
        sources=Sources(fallback=options.model_config, made=pipeline.made),
        rows=options.rows,
        mean_tokens=options.mean_tokens,
    )
    found = {}
    for each in pipeline.stages:
        if each.stage.trains:
            mine = each.share(all_nodes)
            own = replace(cluster, nodes=len(mine), devices_per_node=max(mine.values()))
            found[each.title] = as_json(plan_stage(each.stage.name, each.config, own, request))
    if options.json:
        print(json.dumps(found if options.stage == PIPELINE else found[options.stage], indent=2))
        return 0 if all(each["fits"] for each in found.values()) else 1
    screen = console()
    for name, plan in found.items():
        if options.stage == PIPELINE:
            screen.rule(name, align="left")
        print_plan(screen, plan)
    return 0 if all(each["fits"] for each in found.values()) else 1


def _read(options: argparse.Namespace) -> "Pipeline":
    """The pipeline, or the stage as a pipeline of one."""
    from launch.pipeline.recipe import load_pipeline
    from launch.runs import Pipeline, PipelineStage
    from rlhf.config import load_config

    if options.stage != PIPELINE:
        stage = STAGES[options.stage]
        config = load_config(stage.config_class(), options.config, options.overrides, program="rlhf plan")
        alone = PipelineStage(stage=stage, config=config)
        return Pipeline(name=stage.name, output=config.output, stages=(alone,))
    if len(options.config) != 1:
        raise ConfigError(f"rlhf plan pipeline: {len(options.config)} recipes; expected one --config PIPELINE.yaml")
    return load_pipeline(options.config[0], options.overrides)


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
