"""``rlhf init FOLDER``: a copy of a shipped recipe, with all that it refers to, to edit and run."""

import argparse
import itertools
import re
import shutil
import textwrap
from pathlib import Path

from launch.commands.arguments import Subparsers, command
from launch.stages import STAGES
from rlhf.core.errors import ConfigError
from rlhf.core.paths import SHIPPED, home_path, recipe_path, shipped_recipes

DEFAULT = "quickstart"
README = "README.md"
_DESCRIPTION = """\
Copy a shipped recipe into FOLDER, with the recipes and files that it refers to and a README.md that says how to run it.
FOLDER must be new or empty.

Recipes:
{recipes}
"""
_REFERENCE = re.compile(r"\.\./[\w./-]+\.\w+|(?<=recipe: )[\w-]+\.yaml")
"""What a shipped recipe says of the files beside it."""
_COMMAND = re.compile(r"(rlhf|deepspeed|python) ")
_README = """\
# {name}

{about}

In this folder:

```
{command}
```

| file | what it is |
|---|---|
{files}

Before the first run:

* Paths that begin with `./` start in the folder of the recipe, all others where the command is
  typed.
* `rlhf data check FILE` reads data as training would and reports on them.
* `rlhf plan {plan} --config {recipe}` says whether the run fits this machine.
* `python -m {module} --help` lists all settings of {stage}.
* `{key}` behind the command wins over the recipe.
"""


def add_parser(subparsers: Subparsers) -> None:
    recipes = shipped_recipes()
    width = max(map(len, recipes))
    listed = "\n".join(f"  {name:<{width}}  {_first_sentence(_about(path))}" for name, path in recipes.items())
    about = "copy a shipped recipe into a folder, to edit and run"
    parser = command(subparsers, "init", run, help=about, description=_DESCRIPTION.format(recipes=listed))
    parser.add_argument("folder", type=home_path, metavar="FOLDER", help="the folder to write, new or empty")
    which = "one of the list above (default: %(default)s)"
    parser.add_argument("--recipe", metavar="NAME", default=DEFAULT, help=which)


def run(options: argparse.Namespace) -> int:
    copy_recipe(options.recipe, options.folder)
    print(f"{options.folder}: {options.recipe}.yaml and what it refers to; {README} there says how to run it")
    return 0


def copy_recipe(name: str, folder: Path) -> None:
    """Write the recipe ``name`` that ships, and all that it refers to, into ``folder``.

    Raises:
        ConfigError: if there is no such recipe, or ``folder`` holds something or cannot be written.
    """
    recipe = recipe_path(f"{SHIPPED}{name}")
    copied: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if held := sorted(path.name for path in folder.iterdir()):
            more = f" and {len(held) - 1} more" if len(held) > 1 else ""
            raise ConfigError(f"{folder}: holds {held[0]}{more}; give a new or an empty folder")
        _copy(recipe, folder, copied)
        (folder / README).write_text(_readme(recipe, copied), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error}; give another folder") from None


def _copy(path: Path, folder: Path, copied: list[Path]) -> None:
    """``path`` and, of a recipe, all that it refers to; what it says of them is then true of ``folder``."""
    if path in copied:
        return
    copied.append(path)
    if path.suffix != ".yaml":
        shutil.copyfile(path, folder / path.name)
        return
    text = path.read_text(encoding="utf-8")
    for reference in sorted({*_REFERENCE.findall(text)}):
        _copy(Path(path.parent, reference).resolve(), folder, copied)
    text = re.sub(r"\.\./(?:[\w.-]+/)*(?=[\w-]+\.\w)", "./", text)
    (folder / path.name).write_text(_without_folders(text), encoding="utf-8")


def _without_folders(text: str) -> str:
    """``text`` with the recipes that it names as files of the working folder."""
    return text.replace("launch/recipes/", "")


def _head(path: Path) -> list[str]:
    """The lines of the comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(place for place, line in enumerate([*lines, ""]) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def _about(path: Path) -> str:
    """What a recipe says of itself, without the words that lead to its command."""
    prose = " ".join(itertools.takewhile(lambda line: not _COMMAND.match(line), _head(path)))
    return re.sub(r"(?<=\.) [^.]*:$|:$", "", prose).rstrip(".") + "."


def _first_sentence(text: str) -> str:
    return re.split(r"[.:](?:\s|$)", text, maxsplit=1)[0]


def _readme(recipe: Path, copied: list[Path]) -> str:
    head = _head(recipe)
    start = next(place for place, line in enumerate(head) if _COMMAND.match(line))
    command = _without_folders("\n".join([head[start], *(f"  {line}" for line in head[start + 1 :])]))
    module = re.search(r"(?:--module|-m) (\S+)", command)
    stage = next((stage for stage in STAGES.values() if module and stage.module == module[1]), None)
    return _README.format(
        name=recipe.stem,
        about=textwrap.fill(_about(recipe), 100),
        command=command,
        files="\n".join(f"| `{path.name}` | {_row(path)} |" for path in copied),
        plan=stage.name if stage else "pipeline",
        recipe=recipe.name,
        module=stage.module if stage else "reward",
        stage="the stage" if stage else "the reward stage",
        key="key=value" if stage else "STAGE.key=value",
    )


def _row(path: Path) -> str:
    if path.suffix == ".yaml":
        return f"the recipe: {_first_sentence(_about(path))}"
    if path.suffix == ".jsonl":
        return "data, one row a line"
    return "a chat template"
