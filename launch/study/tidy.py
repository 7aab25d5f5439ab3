"""Studies whose runs another program makes: one tidy file of results in, the same verdicts out."""

import csv
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt

from launch.study.recipe import PROGRAM, Study, load_study, study_tree
from launch.study.results import HEADINGS, PART, Results
from launch.study.verdicts import Item, Measure, Seed
from rlhf.config import validate
from rlhf.core.errors import ConfigError, DataError, UserError

PYTHON = "python"
NEEDED = HEADINGS[:-1]
"""Columns that such a file has at least; without a weight all items weigh the same."""


@dataclass(frozen=True, kw_only=True)
class TidyStudy:
    """A study of results that are there, or that a command makes."""

    output: Path
    """Folder of the study."""
    results: Path
    """CSV with one row an item and run: variant, seed, row, prompt, value, and where there are such, weight and part;
    each part is compared by itself."""
    command: tuple[str, ...] = ()
    """Program and arguments that write the file, or what of it is missing; started in the present folder before it is
    read; python is the one that runs this. Left out: the file is there."""
    baseline: str | None = None
    """The variant that the others are compared with; the first one of the file if left out."""
    item: str = "value"
    """What counts, in words with a unit."""
    share: bool = False
    """Values are shares, shown as percentages and points."""
    better: Literal["higher", "lower", "neither"] = "higher"
    """Which values are the better ones; neither: nobody knows."""
    smallest: Annotated[float, Gt(0)] = 0.01
    """The smallest difference that would matter."""


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study | TidyStudy:
    """The study in a YAML: of a stage's runs, or, where it names results, of those.

    Raises:
        ConfigError: naming what is wrong with it.
    """
    tree = study_tree(path, overrides)
    if "results" not in tree:
        return load_study(path, overrides)
    return validate(TidyStudy, tree, program=PROGRAM, origin=str(path))


def make_results(study: TidyStudy) -> None:
    """Start the command, if there is one.

    Raises:
        UserError: if it cannot be started, or fails.
    """
    if not study.command:
        return
    program, *arguments = study.command
    try:
        code = subprocess.run([sys.executable if program == PYTHON else program, *arguments], check=False).returncode
    except OSError as error:
        raise UserError(f"command = {study.command[0]}: {error.strerror}") from None
    if code:
        raise UserError(f"command = {' '.join(study.command)}: ended with status {code}; nothing was compared")


def read_tidy(study: TidyStudy, name: str) -> Results:
    """The results in the file.

    Raises:
        ConfigError: if there is no file, or no such baseline.
        DataError: naming the line that is wrong.
    """
    parts: dict[str, dict[tuple[str, Seed], dict[str, Item]]] = {}
    try:
        with study.results.open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            missing = [column for column in NEEDED if column not in (reader.fieldnames or ())]
            if missing:
                there = ", ".join(reader.fieldnames or ()) or "nothing"
                raise DataError(f"{study.results}: no column {missing[0]}; there are {there}")
            for number, row in enumerate(reader, start=2):
                _add(parts, row, f"{study.results}:{number}")
    except OSError as error:
        made = "" if study.command else "; command = makes it, where one is given"
        raise ConfigError(f"results = {study.results}: {error.strerror}{made}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{study.results}: no CSV: {error}") from None
    runs = [key for part in parts.values() for key in part]
    variants, seeds = (tuple(dict.fromkeys(each)) for each in (zip(*runs, strict=True) if runs else ((), ())))
    if len(variants) < 2:
        raise DataError(f"{study.results}: {len(variants)} variants; a comparison needs two")
    if study.baseline is not None and study.baseline not in variants:
        raise ConfigError(f"baseline = {study.baseline}: no such variant; there are {', '.join(map(str, variants))}")
    return Results(
        name=name,
        measure=Measure(item=study.item, is_share=study.share, better=study.better, smallest=study.smallest),
        baseline=study.baseline or str(variants[0]),
        variants=tuple(map(str, variants)),
        seeds=_ordered(seeds),
        parts=parts,
    )


def _add(parts: dict[str, dict[tuple[str, Seed], dict[str, Item]]], row: Mapping[Any, Any], place: str) -> None:
    if None in row or any(row[column] is None for column in NEEDED):
        lacking = (
            "more cells than columns" if None in row else f"no {next(each for each in NEEDED if row[each] is None)}"
        )
        raise DataError(f"{place}: {lacking}; expected a cell for each column")
    try:
        item = Item(prompt=row["prompt"], value=float(row["value"]), weight=float(row.get("weight") or 1.0))
    except ValueError:
        item = Item(prompt="", value=math.nan, weight=math.nan)
    if not (math.isfinite(item.value) and 0 < item.weight < math.inf):
        raise DataError(f"{place}: value = {row.get('value')}, weight = {row.get('weight')}: expected finite numbers")
    seed: Seed = row["seed"]
    if row["seed"].lstrip("+-").isdecimal():
        try:
            seed = int(row["seed"])
        except ValueError:
            raise DataError(f"{place}: seed = {seed}: expected a whole number, or a name") from None
    items = parts.setdefault(row.get(PART) or "", {}).setdefault((row["variant"], seed), {})
    if row["row"] in items:
        raise DataError(f"{place}: a second row {row['row']} of {row['variant']}, seed {seed}")
    items[row["row"]] = item


def _ordered(seeds: Sequence[Seed]) -> tuple[Seed, ...]:
    return tuple(sorted(seeds, key=lambda seed: (isinstance(seed, str), seed)))
