"""``environment.json``: where a run was made, and with what. Written once the ranks have met."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from rlhf.core.code import PACKAGES, package_digest
from rlhf.core.files import ENVIRONMENT, write_json
from rlhf.engine.ranks import Ranks
from rlhf.models.manifest import package_versions


def write_environment(folder: Path, ranks: Ranks) -> None:
    """Say it in ``folder``; every rank must call it."""
    mine = {"host": platform.node(), **_device(ranks.device)}
    found = ranks.gather_objects([mine])
    everywhere = [each for part in found for each in part]
    ranks.on_main(lambda: write_json(folder / ENVIRONMENT, _environment(everywhere)))


def _environment(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "packages": package_versions(),
        "code": {name: package_digest(name) for name in PACKAGES},
        "command": sys.argv,
        "cpus": os.cpu_count(),
        "host_bytes": psutil.virtual_memory().total,
        "ranks": ranks,
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "device_bytes": properties.total_memory}
