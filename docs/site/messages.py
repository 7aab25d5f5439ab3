"""What the program says when it refuses something, collected from the places in the code that raise it."""

import ast
import functools
import re
from collections.abc import Collection, Iterator
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
    name: 0
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.UserError) and kind is not errors.RunStopped
} | {"BadRow": 1}
"""Errors for users, and which of their arguments is the message. That of a row is in ``quarantine.jsonl``."""
GIVES_MESSAGES = re.compile(r"(^|_)(fault|problem|complaint|obstacle)s?$")
"""Names of functions that return or yield what is wrong."""
ADDING = ("append", "extend", "insert", "setdefault", "update")

READING = """\
Words in italics stand for names and values. In front of a message stands what it is about: a file with its line, a key
with its value. Reasons why a row of data is left out are also in `quarantine.jsonl` of the run folder."""

OF_SETTINGS = {"config", "options", "profile", "tables", "table"}
"""Modules that check settings and raise ValueErrors."""


def section() -> str:
    """All messages by area, as Markdown."""
    areas: dict[str, dict[str, None]] = {area: {} for area in AREAS.values()}
    for module, message in collected():
        areas[_area(module)].setdefault(message)
    parts = ["\n## What is refused, by area\n", f"{READING}\n"]
    for area, found in areas.items():
        if found:
            rows = [f"* {_shown(message)}" for message in sorted(found, key=str.lower)]
            parts += [f"### {area}\n", *rows, ""]
    return "\n".join(parts)


@functools.cache
def collected() -> tuple[tuple[str, str], ...]:
    """Messages with the module that says them; values that they hold are in braces."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    makers = {name for tree in trees.values() for name in makers_of(tree)}
    found = []
    for path, tree in trees.items():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found += [(module, said) for said in messages_of(tree, settings=path.stem in OF_SETTINGS, makers=makers)]
    return tuple(found)


def makers_of(tree: ast.Module) -> Iterator[str]:
    """Names of the functions of a module that make an error of the text that they are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) in KINDS:
            arguments = [each.arg for each in node.args.args if each.arg != "self"]
            if arguments and arguments[0] in {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}:
                yield node.name


def messages_of(tree: ast.Module, *, settings: bool = False, makers: Collection[str] = ()) -> Iterator[str]:
    """Messages of the errors that a module makes for its user, and what its functions :data:`GIVES_MESSAGES` give.

    Of a message that is put together of a list, each item of the list.

    Args:
        tree: the module.
        settings: whether all its ValueErrors are about settings; else those of ``__post_init__`` are.
        makers: functions of any module that make an error of their first argument.
    """
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
    about_settings = {node for scope in ([tree] if settings else checks) for node in ast.walk(scope)}
    flow = _Flow(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and GIVES_MESSAGES.search(node.name):
            yield from flow.returned(node)
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in KINDS or name in makers or (name == "ValueError" and node in about_settings):
            yield from flow.texts(node.args[KINDS.get(name, 0)])


class _Flow:
    """What goes into the names of a module: assigned, added to a list, returned or yielded."""

    def __init__(self, tree: ast.Module) -> None:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]  # the inner ones last
        self._scope = {node: function for function in functions for node in ast.walk(function)}
        self._into: dict[tuple[ast.FunctionDef | None, str], list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom) and node in self._scope:
                self._add(None, self._scope[node].name.strip("_"), node.value)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._add(self._scope.get(node), _name(target), node.value)
            elif isinstance(node, ast.AnnAssign | ast.AugAssign):
                self._add(self._scope.get(node), _name(node.target), node.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ADDING:
                self._add(self._scope.get(node), _name(node.func.value), node.args[0] if node.args else None)

    def _add(self, scope: ast.FunctionDef | None, name: str, value: ast.expr | None) -> None:
        if value is not None:
            self._into.setdefault((scope, name), []).append(value)

    def texts(self, node: ast.expr) -> Iterator[str]:
        """The text that ``node`` is, and those of lists in it; where it is no text itself, those that go into it."""
        whole = _text(node)
        if _has_words(whole):
            yield whole
        seen: set[ast.expr] = set()
        for each in _joined(node) if _has_words(whole) else [node]:
            yield from self._follow(each, seen)

    def returned(self, function: ast.FunctionDef) -> Iterator[str]:
        """What ``function`` returns or yields."""
        seen: set[ast.expr] = set()
        for value in self._into.get((None, function.name.strip("_")), []):
            yield from self._follow(value, seen)

    def _follow(self, node: ast.expr, seen: set[ast.expr]) -> Iterator[str]:
        if node in seen:
            return
        seen.add(node)
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and _is_sentence(_text(node)):
            yield _text(node)
            return
        name = _name(node.func) if isinstance(node, ast.Call) else _name(node) if isinstance(node, ast.Name) else ""
        for scope in (self._scope.get(node), None) if name else ():
            for value in self._into.get((scope, name), []):
                yield from self._follow(value, seen)
        for child in ast.iter_child_nodes(node) if not isinstance(node, ast.Name) else ():
            if isinstance(child, ast.expr):
                yield from self._follow(child, seen)


def _joined(node: ast.expr) -> Iterator[ast.expr]:
    """What is put together in ``node`` by ``join``, but for the texts that stand in it."""
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr == "join":
            parts = getattr(each.args[0], "elts", [each.args[0]])
            yield from (part for part in parts if not _has_words(_text(part)))


def _has_words(text: str) -> bool:
    return re.search(r"\w{3}", re.sub(r"\{[^}]*\}", "", text)) is not None


def _is_sentence(text: str) -> bool:
    """Three words at least, with those of values: less is a name or a separator."""
    return _has_words(text) and len(text.split()) >= 3


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
