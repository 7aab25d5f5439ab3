"""``rlhf ds``: the DeepSpeed JSON that a run would use, and what is wrong with one of your own."""

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from typing import Any

from launch.commands.arguments import (
    Subparsers,
    add_model_config,
    add_recipes,
    add_settings,
    add_stage,
    command,
    group,
    positive_int,
)
from rlhf.core.errors import ConfigError
from rlhf.models.roles import REPLICATED, ModelRole, published_role, role_named

_SHOW = """\
Print the DeepSpeed JSON of a run of RECIPE, with every "auto" resolved, exactly as the run would save it. CONFIG is a
shipped configuration by its name (zero2, frozen_zero3; see ds_configs/README.md) or the path of a JSON; without it, the
recipe's engine.deepspeed. Only the model's config.json is read, no weights.

Exit status: 0; 2 if recipe or configuration are refused, with every problem.
"""
_LINT = """\
List everything that is wrong with DeepSpeed JSONs, with the way out: unknown keys, wrong types, keys that the run
decides, batch arithmetic, precision, offload, ops that cannot be built on this machine. Files that pass are shown with
what a recipe must say to go with them.

Exit status: 0 if no file has a problem; 1 if one has; 2 if one cannot be read.
"""


def add_parser(subparsers: Subparsers) -> None:
    actions = group(subparsers, "ds", help="DeepSpeed configurations: show as resolved, or check")
    show = command(actions, "show", run_show, help="print the JSON that a run would use", description=_SHOW)
    add_settings(show, "the configuration, and settings of the recipe", "CONFIG | key=value")
    add_recipes(show)
    add_stage(show)
    role = show.add_mutually_exclusive_group()
    role.add_argument("--frozen", action="store_true", help="as for a model that is only asked")
    which = "for another model of the run, by its name in rlhf plan (default: the one that it publishes)"
    role.add_argument("--role", metavar="NAME", help=which)
    role.add_argument("--critic", action="store_const", const="critic", dest="role", help="as --role critic")
    show.add_argument("--ranks", type=positive_int, help="processes in all (default: all GPUs, or 2 on a CPU)")
    show.add_argument("--nodes", type=positive_int, default=1, help="that they are spread over (default: 1)")
    add_model_config(show)
    lint = command(actions, "lint", run_lint, help="list what is wrong with configurations", description=_LINT)
    lint.add_argument("overrides", nargs="+", metavar="CONFIG", help="path of a JSON, or name of a shipped one")
    lint.add_argument("--frozen", action="store_true", help="short names mean configurations for models that are asked")


def run_show(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks when it is imported, and this is a JSON
        resolved, notes = _resolved(options)
    print(json.dumps(resolved, indent=2))
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    return 0


def _resolved(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The JSON, and what is to be said about it."""
    from launch.jobs.devices import default_ranks
    from launch.plan.models import Sources, model_settings
    from launch.stages import read_stage
    from rlhf.engine.build import precision_of
    from rlhf.engine.deepspeed_config import role_of
    from rlhf.engine.deepspeed_ops import op_problems
    from rlhf.train.roles import deepspeed_settings

    ranks = options.ranks or default_ranks() * options.nodes
    if ranks % options.nodes:
        raise ConfigError(f"--ranks {ranks} --nodes {options.nodes}: expected as many ranks on every node")
    source, overrides = _configuration_and_settings(options.overrides)
    stage, config = read_stage(options.config, overrides, options.stage, program="rlhf ds show")
    if config.engine.kind != "deepspeed":
        raise ConfigError(f"engine.kind = {config.engine.kind}: such a run has no DeepSpeed JSON")
    chosen = _role(config, options.role, stage.name)
    main = published_role(config.models)
    sizing = main if chosen.trained and main is not None else chosen  # a critic is sized by the policy
    if options.frozen:
        chosen = replace(chosen, placement=config.engine.deepspeed, optimizer=None)
    if source is not None:
        optimizer = {"train": chosen.optimizer or config.optim, "frozen": None, None: chosen.optimizer}[role_of(source)]
        chosen = replace(chosen, placement=source, optimizer=optimizer)
    if chosen.placement == REPLICATED:
        raise ConfigError(f"{chosen.name}: whole on every rank, without a DeepSpeed JSON; see {chosen.placed_by}")
    settings, _ = model_settings(sizing.backbone, Sources(fallback=options.model_config), sizing.setting)
    sizes = {"world_size": ranks, "local_size": ranks // options.nodes, "hidden_size": settings.hidden_size}
    resolved = deepspeed_settings(chosen, config.models, config.engine, **sizes)
    notes = [f"warning: {problem}" for problem in op_problems(resolved).values()]
    if config.engine.precision == "auto":
        notes.append(
            f"note: engine.precision=auto is {precision_of(config.engine)} on this machine (stage {stage.name})"
        )
    return resolved, notes


def run_lint(options: argparse.Namespace) -> int:
    from rlhf.engine.deepspeed_config import lint
    from rlhf.engine.deepspeed_ops import op_problems

    with contextlib.redirect_stdout(sys.stderr):
        reports = [lint(source, "frozen" if options.frozen else "train") for source in options.overrides]
        problems = [[*found.problems, *op_problems(found.config).values()] for found in reports]
    for found, listed in zip(reports, problems, strict=True):
        count = "1 problem" if len(listed) == 1 else f"{len(listed)} problems"
        fits = f"fits runs with {', '.join(found.conditions)}" if found.conditions else "fits any run"
        print("\n  ".join([f"{found.name}: {count if listed else fits}", *listed]))
    return 1 if any(problems) else 0


def _configuration_and_settings(words: list[str]) -> tuple[str | None, list[str]]:
    settings = [word for word in words if "=" in word]
    others = [word for word in words if "=" not in word]
    if len(others) > 1:
        raise ConfigError(f"rlhf ds show: {' '.join(others)}: expected one configuration, and settings as key=value")
    return (others[0] if others else None), settings


def _role(config: Any, name: str | None, stage: str) -> ModelRole:
    """The one called ``name``, or the one that the run publishes."""
    found = published_role(config.models) if name is None else role_named(config.models, name)
    if found is None or (found.inside and not found.trained):
        names = ", ".join(each.name for each in config.models)
        raise ConfigError(f"--role {name}: no model of its own in this run of stage {stage}, which has {names}")
    return found
