"""What a pipeline recipe says: stages by name, each an ordinary recipe that may refer to what others leave behind."""

import dataclasses
import difflib
import graphlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.stages import STAGES, Stage
from rlhf.config import load_config, read_tree, to_dict, to_yaml, validate
from rlhf.core.errors import ConfigError
from rlhf.core.files import RECIPE, is_in, write_text
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
    ranks: int | None = None
    """Processes of this stage on one machine; those of the pipeline if left out."""
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


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """A stage, ready to be started."""

    name: str
    stage: Stage
    config: Any
    """Its resolved recipe, accepted by the stage's own parser."""
    output: Path
    final: Path
    needs: tuple[str, ...]
    """Names of the stages that must be finished before."""
    ranks: int | None = None

    @property
    def recipe(self) -> Path:
        """The file that the stage is started with: its resolved recipe, in its run folder."""
        return self.output / RECIPE

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of the command that starts the stage."""
        return "--config", str(self.recipe)

    def write_recipe(self) -> None:
        """Put the recipe where :attr:`arguments` say that it is."""
        write_text(self.recipe, to_yaml(self.config))


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages in the order in which they run."""

    name: str
    output: Path
    stages: tuple[PipelineStage, ...]
    elsewhere: str = "{stage}.output=FOLDER"
    """What to add to the command for another folder of a stage."""

    def named(self, name: str) -> PipelineStage:
        """The stage of this name.

        Raises:
            ConfigError: if there is no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"{PROGRAM}: no stage {name}; there are {', '.join(each.name for each in self.stages)}")

    def upstream(self, stage: PipelineStage) -> list[PipelineStage]:
        return [self.named(name) for name in stage.needs]


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read, resolve and check a pipeline recipe; every stage is checked by its own parser.

    Args:
        path: the YAML.
        overrides: ``STAGE.key=value`` for the settings of a stage, ``vars.key=value``, ``output=FOLDER``.
    Raises:
        ConfigError: naming every problem that can be found before anything runs.
    """
    tree = _with_overrides(_read(path), path, overrides)
    spec = _resolved(tree, path)
    needs = {name: _needs(name, tree, spec) for name in spec.stages}
    order = _order(needs, path)
    stages, problems = {}, []
    for name in order:
        try:
            stages[name] = _stage(name, spec.stages[name], needs[name])
        except ConfigError as error:
            problems.append(str(error).replace("\n", "\n  "))
    problems += _doubled_folders([*stages.values()])
    if problems:
        raise ConfigError("\n  ".join([f"{PROGRAM}: {path}: nothing was started", *problems]))
    stages = {name: _with_needs(stage, [*stages.values()], [*spec.stages]) for name, stage in stages.items()}
    order = _order({name: stages[name].needs for name in spec.stages}, path)
    return Pipeline(name=path.stem, output=spec.output, stages=tuple(stages[name] for name in order))


def _read(path: Path) -> DictConfig:
    """The tree, with the paths of recipes, and others that begin with ./ or ../, as those of the file's folder."""
    try:
        tree: Any = OmegaConf.to_container(read_tree(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{PROGRAM}: {path}: {error}") from None
    stages = tree.get("stages")
    for entry in stages.values() if isinstance(stages, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("recipe"), str):
            entry["recipe"] = [entry["recipe"]]
        if isinstance(entry, dict) and isinstance(entry.get("recipe"), list):
            entry["recipe"] = [_from_here(recipe) for recipe in entry["recipe"]]
    return OmegaConf.create(beside(tree, path.parent))


def _from_here(recipe: Any) -> Any:
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
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{PROGRAM}: {override}: {str(error).partition(chr(10))[0]}") from None


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _published(name: str, node: DictConfig) -> str:
    kind = STAGES.get(str(node.get("kind") or name))
    return kind.published if kind else ""


def _resolved(tree: DictConfig, path: Path) -> PipelineSpec:
    # References among stages are checked first: omegaconf would call a misspelled one a missing key of the tree.
    names = [str(name) for name in tree.stages]
    for name in names:
        for target in sorted(_wanted(tree, name)):
            if target not in names:
                hint = _hint(target, names)
                raise ConfigError(f"{PROGRAM}: {path}: stages.{name} refers to stages.{target}: no such stage{hint}")
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        _order({name: tuple(_wanted(tree, name)) for name in names}, path)
        where = getattr(error, "full_key", "")
        raise ConfigError(f"{PROGRAM}: {path}: {where}: {str(error).partition(chr(10))[0]}") from None
    return validate(PipelineSpec, plain, program=PROGRAM, origin=str(path))


def _wanted(tree: DictConfig, name: str) -> set[str]:
    """Names of the stages that the settings of an entry refer to."""
    return _references(tree.stages[name]._get_node("set")) | _references(tree.stages[name]._get_node("recipe"))


def _references(node: Any) -> set[str]:
    """Names of the stages that the unresolved values in ``node`` refer to."""
    if isinstance(node, DictConfig):
        return set().union(*(_references(node._get_node(key)) for key in node))
    if OmegaConf.is_list(node):
        return set().union(*(_references(node._get_node(place)) for place in range(len(node))))
    value = node._value() if hasattr(node, "_value") else node
    return set(_REFERENCE.findall(value)) if isinstance(value, str) else set()


def _needs(name: str, tree: DictConfig, spec: PipelineSpec) -> tuple[str, ...]:
    """Names of the stages that a stage needs, in the order of the recipe."""
    wanted = _wanted(tree, name) | {*spec.stages[name].after}
    for other in wanted - {*spec.stages}:
        raise ConfigError(f"{PROGRAM}: stages.{name}.after = {other}: no such stage")
    return tuple(other for other in spec.stages if other in wanted)


def _with_needs(stage: PipelineStage, others: Sequence[PipelineStage], names: Sequence[str]) -> PipelineStage:
    """The stage with its needs: stages whose files its settings name, by a variable or in the recipe."""
    values = [Path(os.path.expanduser(text)) for text in texts(_without_output(stage.config))]
    read = {each.name for each in others if each is not stage and any(is_in(path, each.output) for path in values)}
    return dataclasses.replace(stage, needs=tuple(name for name in names if name in {*stage.needs, *read}))


def _without_output(config: Any) -> dict[str, Any]:
    return {key: value for key, value in flat(config).items() if key != "output"}


def _order(needs: Mapping[str, Sequence[str]], path: Path) -> list[str]:
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


def _stage(name: str, spec: StageSpec, needs: tuple[str, ...]) -> PipelineStage:
    kind = spec.kind or name
    if kind not in STAGES:
        raise ConfigError(f"stages.{name}.kind = {kind}: expected one of {', '.join(STAGES)}")
    stage = STAGES[kind]
    settings = spec.set | {"output": spec.output}
    recipes = [recipe_path(str(recipe)) for recipe in spec.recipe]
    config = load_config(stage.config_class(), recipes, (), settings=settings, program=f"stages.{name}")
    return PipelineStage(
        name=name,
        stage=stage,
        config=config,
        output=Path(spec.output),
        final=Path(spec.final),
        needs=needs,
        ranks=spec.ranks,
    )


def _doubled_folders(stages: Sequence[PipelineStage]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for stage in stages:
        other = seen.setdefault(os.path.realpath(os.path.expanduser(stage.output)), stage.name)
        if other != stage.name:
            yield f"stages.{other} and stages.{stage.name} have the same output: {stage.output}"


def flat(config: Any) -> dict[str, Any]:
    """All options of a resolved recipe by dotted key."""
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        else:
            found[path] = node

    walk(to_dict(config) if dataclasses.is_dataclass(config) else config, "")
    return found


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
