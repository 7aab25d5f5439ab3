"""Kill a pipeline -9 again and again at random moments, let it end, and compare what it published with another run.

    python benchmarks/killed_pipeline.py launch/recipes/quickstart.yaml --output runs/killed --against runs/quickstart

Every other kill takes the pipeline alone, the others all processes that it has started. Exit status 1 if a weight
differs.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

from launch.pipeline.processes import kill_all, processes_of
from rlhf.core.files import file_checksum


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline that is killed")
    parser.add_argument("--against", type=Path, required=True, help="folder of one that was not")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds", type=float, nargs=2, default=(25, 150), help="of life, at least and at most")
    parser.add_argument("--seed", type=int, default=7)
    return parser


def kill_once(command: list[str], output: Path, seconds: float, *, all_of_it: bool) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        victims = [psutil.Process(process.pid), *(processes_of(output) if all_of_it else [])]
        kill_all(victims)
        print(f"killed {len(victims)} process(es) after {seconds:.0f} s", flush=True)


def weights(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_checksum(path) for path in sorted(folder.rglob("final/*.safetensors"))}


def main() -> int:
    options = build_parser().parse_args()
    command = [sys.executable, "-m", "launch.cli", "pipeline", "run", str(options.recipe), f"output={options.output}"]
    generator = random.Random(options.seed)
    for number in range(options.kills):
        kill_once(command, options.output, generator.uniform(*options.seconds), all_of_it=number % 2 == 1)
    began = time.monotonic()
    subprocess.run(command, check=True)
    print(f"the last start took {time.monotonic() - began:.0f} s")
    found, expected = weights(options.output), weights(options.against)
    differing = [name for name in expected if found.get(name) != expected[name]]
    print(f"{len(expected)} files of published weights, {len(differing)} differ: {', '.join(differing) or 'none'}")
    return 1 if differing or not expected else 0


if __name__ == "__main__":
    sys.exit(main())
