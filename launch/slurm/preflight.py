"""``python -m launch.slurm.preflight``: is this node fit for the run? Cheap; every node of a job starts with it."""

import argparse
import importlib.util
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = ("deepspeed", "rlhf", "transformers")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.slurm.preflight", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="the run folder, which all nodes must see")
    parser.add_argument("--token", type=Path, required=True, help="a file in it that the batch shell has just written")
    parser.add_argument("--devices", type=int, required=True, help="GPUs that must be there; 0 for none")
    parser.add_argument("--free-gib", type=float, required=True, help="room that the run folder must have")
    options = parser.parse_args(argv)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    of_node = list(node_faults(options.devices))
    if of_node and options.token.exists():  # the job goes on without this node; a full disk is full for all
        options.token.with_name(f"{options.token.name}.unfit-{node}").touch()
    problems = [*folder_faults(options.folder, options.token, options.free_gib), *of_node]
    for problem in problems:
        print(f"{node}: not fit: {problem}", file=sys.stderr)
    return 1 if problems else 0


def folder_faults(folder: Path, token: Path, free_gib: float) -> Iterator[str]:
    """What is wrong with the run folder, each with its remedy."""
    if not token.exists():
        yield f"{folder} is not the folder that the first node sees; put output on a file system that all nodes share"
    elif not os.access(folder, os.W_OK):
        yield f"{folder} cannot be written to"
    else:
        free = shutil.disk_usage(folder).free / 2**30
        if free < free_gib:
            yield f"{folder} has {free:.1f} GiB free, expected {free_gib:g} (free_disk_gib of the profile)"


def node_faults(devices: int) -> Iterator[str]:
    """What keeps this very node from taking part, each with its remedy."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        yield f"{sys.executable} has no {', '.join(missing)}; name the virtual environment in the profile (venv)"
    try:
        import torch
    except Exception:
        yield f"torch cannot be imported: {traceback.format_exc(limit=0).strip().splitlines()[-1]}"
        return
    count = torch.cuda.device_count() if devices else 0
    if count < devices:
        yield f"{count} GPUs visible, expected {devices} (devices of the profile); see nvidia-smi there"


if __name__ == "__main__":
    sys.exit(main())
