"""What the program says when it refuses something, collected from the places in the code that raise it."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from rlhf.core import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = "troubleshooting.md"
PACKAGES = ("rlhf", "reward", "policy", "launch")
AREAS = {
    "rlhf.config": "Recipes and settings",
    "rlhf.core.table": "Recipes and settings",
    "rlhf.core.paths": "Recipes and settings",
    "rlhf.core": "Files and folders",
    "rlhf.data": "Data",
    "rlhf.models": "Models",
    "rlhf.engine": "DeepSpeed, ranks and checkpoints",
    "rlhf.train": "Training and the run folder",
    "reward": "Reward stage",
    "policy.preference": "Preference stage",
    "policy.ppo": "PPO stage",
    "policy.sft": "SFT stage",
    "policy.generation": "Rollouts and sampling",
    "policy.evaluation": "Evaluation",
    "policy": "Policies",
    "launch.pipeline": "Pipelines and sweeps",
    "launch.jobs": "Starting ranks, hostfiles",
    "launch.slurm": "SLURM",
    "launch.plan": "Plan",
    "launch.doctor": "Doctor",
    "launch": "Commands",
}
"""Headings by the longest prefix of a module's name."""
KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.UserError) and kind is not errors.RunStopped
}


OF_SETTINGS = {"config", "options", "profile", "tables", "table"}
"""Modules that check settings and raise ValueErrors."""


def section() -> str:
    """All messages by area, as Markdown."""
    areas: dict[str, dict[str, None]] = {area: {} for area in AREAS.values()}
    for module, message in collected():
        areas[_area(module)].setdefault(message)
    parts = ["\n## What is refused, by area\n"]
    for area, found in areas.items():
        if found:
            rows = [f"* {_shown(message)}" for message in sorted(found, key=str.lower)]
            parts += [f"### {area}\n", *rows, ""]
    return "\n".join(parts)


@functools.cache
def collected() -> tuple[tuple[str, str], ...]:
    """Messages with the module that says them; values that they hold are in braces."""
    found = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        told = messages_of(path.read_text(encoding="utf-8"), settings=path.stem in OF_SETTINGS)
        found += [(module, message) for message in told]
    return tuple(found)


def messages_of(source: str, *, settings: bool = False) -> Iterator[str]:
    """Messages of the errors that a module raises for its user.

    Args:
        source: of the module.
        settings: whether all its ValueErrors are about settings; else those of ``__post_init__`` are.
    """
    tree = ast.parse(source)
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
    about_settings = {node for scope in ([tree] if settings else checks) for node in ast.walk(scope)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        name = ast.unparse(node.exc.func).rpartition(".")[2]
        if name in KINDS or (name == "ValueError" and node in about_settings):
            text = _text(node.exc.args[0])
            if re.search(r"\w{3}", re.sub(r"\{[^}]*\}", "", text)):
                yield text


def _text(node: ast.expr) -> str:
    """A message as it stands in the code, with the names of its values in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + _name(node.value) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        return "\n".join(_text(part) for part in getattr(node.args[0], "elts", []))
    return "{" + _name(node) + "}"


def _name(node: ast.expr) -> str:
    """A word for a value."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        return "names"
    if isinstance(node, ast.Call):
        return _name(node.args[0]) if node.args else _name(node.func)
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return "..."


def _area(module: str) -> str:
    parts = module.split(".")
    return next(AREAS[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in AREAS)


def _shown(message: str) -> str:
    """A message with its values in italics."""
    text = " ".join(message.split())
    text = re.sub(r"([\\`*_<>\[\]#|])", r"\\\1", text)
    return re.sub(r"\{([^{}]*)\}", lambda value: f"*{value[1]}*", text)
