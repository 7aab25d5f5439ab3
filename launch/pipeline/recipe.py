"""What a pipeline recipe says: stages by name, each an ordinary recipe that may refer to what others leave behind."""

import dataclasses
import difflib
import graphlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Gt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.runs import NO_NAMES, Pipeline, PipelineStage
from launch.slurm.profile import seconds_of
from launch.stages import STAGES
from rlhf.config import flat, load_config, read_tree, to_dict, validate
from rlhf.core.errors import ConfigError
from rlhf.core.files import is_in
from rlhf.core.paths import SHIPPED, beside, recipe_path

PROGRAM = "pipeline"
_REFERENCE = re.compile(r"\$\{stages\.([^.}\s]+)")


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One entry under ``stages``."""

    kind: str = ""
    """A name of launch.stages.STAGES; the name of the entry if left out."""
    recipe: tuple[Path, ...] = ()
    """Ordinary recipes of such a stage; later ones win. shipped:NAME is one that is installed with the program."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings on top of them. May hold ${stages.NAME.final} and ${stages.NAME.output} of other entries."""
    after: tuple[str, ...] = ()
    """Entries to run before this one although nothing refers to them."""
    nodes: Annotated[int, Gt(0)] | None = None
    """Nodes that this stage uses, the first ones; all if left out, one for an import."""
    ranks: Annotated[int, Gt(0)] | None = None
    """Processes of this stage on each of its nodes, one on a device; those of the pipeline if left out."""
    time: str | None = None
    """Time limit of its job on a cluster, if it has one of its own (--jobs dependent), as SLURM writes it, in quotes;
    that of the cluster profile if left out."""
    output: str = ""
    """Run folder: the pipeline's output and the name of the entry."""
    final: str = ""
    """What other entries use: final/ in the run folder."""


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A pipeline recipe."""

    output: Path
    """Folder of the pipeline; every stage has its run folder in it."""
    vars: dict[str, Any] = field(default_factory=dict)
    """Values to use in several stages, as ${vars.NAME}."""
    stages: dict[str, StageSpec] = field(default_factory=dict)
    """The stages by name."""


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read, resolve and check a pipeline recipe; every stage is checked by its own parser.

    Args:
        path: the YAML.
        overrides: ``STAGE.key=value`` for the settings of a stage, ``vars.key=value``, ``output=FOLDER``.
    Raises:
        ConfigError: naming every problem that can be found before anything runs.
    """
    tree = _with_overrides(_read(path), path, overrides)
    references = _references(tree, path)
    spec = _resolved(tree, references, path)
    stages: dict[str, PipelineStage] = {}
    problems = []
    for name, entry in spec.stages.items():
        try:
            stages[name] = _stage(name, entry)
        except ConfigError as error:
            problems.append(str(error).replace("\n", "\n  "))
    problems += _doubled_folders([*stages.values()])
    if problems:
        raise ConfigError("\n  ".join([f"{PROGRAM}: {path}: nothing was started", *problems]))
    needs = {name: _needs(stages[name], references[name] | {*spec.stages[name].after}, stages) for name in stages}
    ordered = (dataclasses.replace(stages[name], needs=needs[name]) for name in _order(needs, path))
    return Pipeline(name=path.stem, output=spec.output, stages=tuple(ordered), recipe=path, overrides=tuple(overrides))


def _read(path: Path) -> DictConfig:
    """The tree, with the paths of recipes, and others that begin with ./ or ../, as those of the file's folder."""
    try:
        tree: Any = OmegaConf.to_container(read_tree(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{PROGRAM}: {path}: {one_line(error)}") from None
    stages = tree.get("stages")
    for entry in stages.values() if isinstance(stages, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("recipe"), str):
            entry["recipe"] = [entry["recipe"]]
        if isinstance(entry, dict) and isinstance(entry.get("recipe"), list):
            entry["recipe"] = [from_here(recipe) for recipe in entry["recipe"]]
    return OmegaConf.create(beside(tree, path.parent))


def one_line(error: Exception) -> str:
    """What is wrong, on one line: of YAML that cannot be parsed, with the place."""
    text = " ".join(str(error).split())
    return text if isinstance(error, yaml.YAMLError) else str(error).partition("\n")[0]


def from_here(recipe: Any) -> Any:
    """A path without a root, as one of the folder of the pipeline's recipe."""
    rooted = not isinstance(recipe, str) or recipe.startswith(("/", "~", "./", "../", "${", SHIPPED))
    return recipe if rooted else f"./{recipe}"


def _with_overrides(tree: DictConfig, path: Path, overrides: Sequence[str]) -> DictConfig:
    """The tree with overrides, and with the folders of every stage written out."""
    stages = tree.get("stages")
    if not isinstance(stages, DictConfig) or not stages:
        raise ConfigError(f"{PROGRAM}: {path}: expected stages: with an entry or more, such as reward: {{recipe: ...}}")
    names = [str(name) for name in stages]
    for name in names:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ConfigError(f"{PROGRAM}: {path}: stages.{name}: expected a name of letters, digits, _ and -")
        if name in NO_NAMES:
            raise ConfigError(f"{PROGRAM}: {path}: stages.{name}: the pipeline keeps a note so named; choose another")
        node = stages._get_node(name)
        if node is not None and node._is_none():
            stages[name] = {}
    for override in overrides:
        _override(tree, override, names)
    for name in [str(name) for name in stages]:
        if isinstance(stages[name], DictConfig):
            own = OmegaConf.select(tree, f"stages.{name}.set.output")
            stages[name].output = own or f"${{output}}/{name}"
            stages[name].final = "/".join(filter(None, [f"${{stages.{name}.output}}", _published(name, stages[name])]))
    return tree


def _override(tree: DictConfig, override: str, names: Sequence[str]) -> None:
    head, _, rest = override.partition("=")[0].partition(".")
    if "=" not in override or (not rest and head != "output") or head not in (*names, "vars", "output"):
        hint = _hint(head, names)
        raise ConfigError(
            f"{PROGRAM}: {override}: expected STAGE.key=value with STAGE one of {', '.join(names)}{hint}, "
            "vars.key=value or output=FOLDER"
        )
    known = [str(name) for name in tree.get("vars") or {}]
    if head == "vars" and rest.partition(".")[0] not in known:
        hint = _hint(override.partition("=")[0], [f"vars.{name}" for name in known])
        raise ConfigError(f"{PROGRAM}: {override}: expected one of vars: {', '.join(known) or 'there are none'}{hint}")
    try:
        tree.merge_with_dotlist([f"stages.{head}.set.{override.partition('.')[2]}" if head in names else override])
    except (OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{PROGRAM}: {override}: {one_line(error)}") from None


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _published(name: str, node: DictConfig) -> str:
    kind = STAGES.get(str(node.get("kind") or name))
    return kind.published if kind else ""


def _references(tree: DictConfig, path: Path) -> dict[str, set[str]]:
    """The stages that the settings and recipes of each entry refer to, by name of the entry.

    They are checked before omegaconf resolves them: it would call a misspelled one a missing key of the tree.
    """
    found: dict[str, set[str]] = {}
    entries: Any = OmegaConf.to_container(tree.stages)
    for name, entry in entries.items():
        named = [entry.get(key) for key in ("set", "recipe")] if isinstance(entry, dict) else []
        found[name] = set(_REFERENCE.findall(str(named)))
    for name, targets in found.items():
        for target in sorted(targets - found.keys()):
            hint = _hint(target, [*found])
            raise ConfigError(f"{PROGRAM}: {path}: stages.{name} refers to stages.{target}: no such stage{hint}")
    return found


def _resolved(tree: DictConfig, references: Mapping[str, set[str]], path: Path) -> PipelineSpec:
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        _order(references, path)
        where = getattr(error, "full_key", "")
        raise ConfigError(f"{PROGRAM}: {path}: {where}: {str(error).partition(chr(10))[0]}") from None
    return validate(PipelineSpec, plain, program=PROGRAM, origin=str(path))


def _needs(stage: PipelineStage, named: set[str], stages: Mapping[str, PipelineStage]) -> tuple[str, ...]:
    """Stages that must be finished before ``stage``, in the order of the recipe.

    They are those that the recipe names, and those whose files the settings name without saying so: by a variable, or
    in the stage's own recipe.
    """
    for other in named - stages.keys():
        raise ConfigError(f"{PROGRAM}: stages.{stage.name}.after = {other}: no such stage")
    settings = {key: value for key, value in flat(to_dict(stage.config)).items() if key != "output"}
    paths = [Path(os.path.expanduser(text)) for text in texts(settings)]
    read = {
        name
        for name, other in stages.items()
        if other is not stage and any(is_in(path, other.output) for path in paths)
    }
    return tuple(name for name in stages if name in named | read)


def _order(needs: Mapping[str, Iterable[str]], path: Path) -> list[str]:
    """Every stage after those that it needs, else as in the recipe."""
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ConfigError(f"{PROGRAM}: {path}: stages wait for each other in a circle: {circle}") from None
    order: list[str] = []
    while len(order) < len(needs):
        order.append(next(name for name in needs if name not in order and {*needs[name]} <= {*order}))
    return order


def _stage(name: str, spec: StageSpec) -> PipelineStage:
    kind = spec.kind or name
    if kind not in STAGES:
        raise ConfigError(f"stages.{name}.kind = {kind}: expected one of {', '.join(STAGES)}")
    settings = spec.set | {"output": spec.output}
    recipes = [recipe_path(str(recipe)) for recipe in spec.recipe]
    config = load_config(STAGES[kind].config_class(), recipes, (), settings=settings, program=f"stages.{name}")
    stage = STAGES[kind]
    for key in ("nodes", "ranks"):
        count = getattr(spec, key)
        if stage.alone and count not in (None, 1):
            raise ConfigError(f"stages.{name}.{key} = {count}: {kind} is the work of a single process; leave it out")
    if spec.time is not None:
        try:
            seconds_of(spec.time)
        except ValueError as error:
            raise ConfigError(f"stages.{name}.{error}") from None
    return PipelineStage(name=name, stage=stage, config=config, nodes=spec.nodes, ranks=spec.ranks, time=spec.time)


def _doubled_folders(stages: Sequence[PipelineStage]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for stage in stages:
        other = seen.setdefault(os.path.realpath(os.path.expanduser(stage.output)), stage.name)
        if other != stage.name:
            yield f"stages.{other} and stages.{stage.name} have the same output: {stage.output}"


def texts(node: Any) -> Iterator[str]:
    """Strings of one line in settings, at any depth of dicts and lists."""
    if isinstance(node, str):
        if node and "\n" not in node and len(node) < 4096:
            yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from texts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from texts(value)
