"""``python -m benchmarks.gpu [PART ...]``: what is measured on a GPU, in one table.

bash benchmarks/gpu.sh                    # everything, on a GPU machine, from a folder of wheels
bash benchmarks/gpu.sh parity training    # some parts of it
python -m benchmarks.gpu --toy --tokenizer FOLDER --rows pairs=PAIRS.jsonl --prompts PROMPTS.jsonl    # on a CPU
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.cells import Cell, Result, Runner, warm_up
from benchmarks.gpu.table import table
from benchmarks.gpu.world import World, has_gpu

PARTS = {
    "parity": 60,
    "families": 60,
    "limit": 12,
    "training": 150,
    "rollouts": 115,
    "margin": 12,
    "syncs": 30,
    "profile": 40,
    "start": 45,
    "peaks": 45,
}
"""The parts in the order in which they run, with the seconds of each; what is left of these, others may have."""
TOGETHER = ("parity", "families")
"""Parts that measure no time: they run beside each other, before all others."""
OUT_OF_TIME = "no time was left for it: take more --minutes, or this part alone"
GRACE = 2.0
"""How many times what it is expected to take a measurement may take, if there is time."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer and its chat template")
    parser.add_argument(
        "--rows", action="append", required=True, metavar="NAME=FILE", help="preference pairs; may be repeated"
    )
    parser.add_argument("--prompts", type=Path, required=True, help='lines with "prompt"')
    parser.add_argument(
        "--only", type=_pattern, metavar="PATTERN", default="", help="measure what matches in 'PART: CASE'"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="of everything together (default %(default)s)")
    parser.add_argument("--toy", action="store_true", help="tiny models and batches: does everything run?")
    parser.add_argument("--trl-ppo", default="", help="folder with a TRL that has PPOTrainer (1.12)")
    parser.add_argument("--work", type=Path, help="scratch folder (default: the system's, removed afterwards)")
    parser.add_argument("--logs", type=Path, help="folder for what each measurement said (default: nowhere)")
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    return parser


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = _parser()
    options = parser.parse_args(argv)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"{part}: there is no such part; there are {', '.join(PARTS)}")
    rows = {}
    for each in options.rows:
        name, sign, file = each.partition("=")
        if not sign or not Path(file).is_file():
            parser.error(f"--rows {each}: expected NAME=FILE, of a file that is there")
        rows[name] = str(Path(file).resolve())
    for path in (options.tokenizer / "tokenizer_config.json", options.prompts):
        if not path.is_file():
            parser.error(f"{path}: there is no such file")
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        world = World(
            work=Path(work),
            tokenizer=options.tokenizer.resolve(),
            rows=rows,
            prompts=options.prompts.resolve(),
            trl_ppo=options.trl_ppo,
            toy=options.toy,
        )
        world.write()
        try:
            results = measure_all(world, options.parts or list(PARTS), began + 60 * options.minutes, options.only)
        finally:
            if options.logs is not None:
                shutil.copytree(world.work / "cells", options.logs, dirs_exist_ok=True)
    print(f"\n{machine()}\n\n" + "\n".join(table(results)))
    print(f"\n{time.monotonic() - began:.0f} s in all")
    if options.output is not None:
        found = {"machine": machine(), "results": [asdict(result) for result in results]}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if any(result.failed for result in results) else 0


def measure_all(world: World, parts: Sequence[str], end: float, only: re.Pattern[str]) -> list[Result]:
    """Results in the order of the table; no measurement begins that is not expected to be done at ``end``."""
    warm_up()
    runner = Runner(world)
    (made,) = _modules(["material"])["material"].cells(world)
    results = {0: _said(runner.run(made, end - time.monotonic()))}
    if results[0].failed:
        return [results[0]]
    cells: dict[int, Cell] = {}
    parts_of: dict[str, dict[int, Cell]] = {}
    for part, module in _modules(parts).items():
        chosen = [cell for cell in module.cells(world) if only.search(f"{part}: {cell.name}")]
        parts_of[part] = dict(enumerate(chosen, start=len(cells) + 1))
        cells |= parts_of[part]
    together = {number: runner.start(cells[number]) for part in TOGETHER for number in parts_of.get(part, ())}
    for number, started in together.items():
        left = max(1.0, end - time.monotonic())
        results[number] = _said(started.result(left) or runner.run(cells[number], left))
    for part, here in parts_of.items():
        if part not in TOGETHER:
            _run_those_that_fit(runner, here, results, min(end, time.monotonic() + PARTS[part]), end)
    _run_those_that_fit(runner, {k: v for k, v in cells.items() if k not in results}, results, end, end)
    for number in cells.keys() - results.keys():
        cell = cells[number]
        results[number] = Result(part=cell.part, name=cell.name, arguments=cell.arguments, skipped=OUT_OF_TIME)
    return [results[number] for number in sorted(results)]


def _modules(parts: Sequence[str]) -> dict[str, object]:
    order = [part for part in ("material", *PARTS) if part in parts]
    return {part: importlib.import_module(f"benchmarks.gpu.{part}") for part in order}


def _run_those_that_fit(
    runner: Runner, cells: dict[int, Cell], results: dict[int, Result], stop: float, end: float
) -> None:
    for number, cell in cells.items():
        now = time.monotonic()
        if number not in results and now + cell.seconds <= stop:
            results[number] = _said(runner.run(cell, min(end - now, GRACE * cell.seconds + 30)))


def _said(result: Result) -> Result:
    said = f"FAILED: {result.failed}" if result.failed else f"skipped: {result.skipped}" if result.skipped else "done"
    print(f"{result.part}: {result.name}: {said} ({result.seconds:.1f} s)", file=sys.stderr, flush=True)
    return result


def machine() -> str:
    import torch

    name = torch.cuda.get_device_name() if has_gpu() else f"no GPU: {os.cpu_count()} CPUs"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
