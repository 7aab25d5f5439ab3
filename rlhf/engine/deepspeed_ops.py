"""DeepSpeed's compiled ops: which are there, which can be built when a run first needs them, and what is missing.

DeepSpeed compiles an op at its first use. That takes a C++ compiler, ninja and the Python headers, and for some ops a
library. Its own report tells of the library alone, so a run may find out about the rest in the middle of its start.
"""

import contextlib
import io
import logging
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.core.errors import ConfigError

log = logging.getLogger(__name__)

CPU_ADAM, ASYNC_IO = "cpu_adam", "async_io"
PURPOSES = {
    CPU_ADAM: "AdamW on the host, for offload_optimizer",
    ASYNC_IO: "reading and writing offloaded states on NVMe",
}
"""The ops that configurations of this toolkit can ask for."""
PIN_MEMORY = "pin_memory"  # compiled along with async_io
KILLED_AFTER = 180.0
"""Seconds without a new file after which a build that no process of this machine holds counts as killed. Another
machine may build in the same home folder, and one file takes a compiler up to two minutes."""
_LIBRARIES = {ASYNC_IO: "libaio with its headers (Debian, Ubuntu: apt install libaio-dev; Fedora: libaio-devel)"}


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op on this machine."""

    name: str
    built: bool
    """Came compiled with DeepSpeed, or was compiled by an earlier run."""
    missing: tuple[str, ...]
    """What keeps it from being compiled, in words; empty if nothing does."""
    locks: tuple[Path, ...] = ()
    """Left by builds that run or were killed; see :func:`await_builds`."""

    @property
    def usable(self) -> bool:
        return self.built or not self.missing


def find_op(name: str) -> Op:
    """Look at an op of :data:`PURPOSES`. Nothing is compiled, but for a probe of a library."""
    from deepspeed.git_version_info import installed_ops

    built = bool(installed_ops.get(name)) or any(_compiled(name, f"{name}*.so"))
    missing = list(build_tools())
    if name in _LIBRARIES and not _has_library(name):
        missing.append(_LIBRARIES[name])
    return Op(name=name, built=built, missing=tuple(missing), locks=tuple(_compiled(name, "lock")))


def build_tools() -> list[str]:
    """Which tools to build any op are missing, each with how to get it."""
    missing = []
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        missing.append("a C++ compiler (Debian, Ubuntu: apt install g++; or set CXX)")
    if shutil.which("ninja") is None:
        missing.append("ninja (pip install ninja, and its folder in PATH)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("the Python headers (Debian, Ubuntu: apt install python3-dev)")
    import torch

    if torch.cuda.is_available():
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            missing.append("the CUDA toolkit of torch's CUDA version (nvcc; or set CUDA_HOME)")
    return missing


def needed_ops(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The ops that a resolved configuration asks for."""
    zero = config.get("zero_optimization", {})
    devices = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    names = []
    if devices["offload_optimizer"] in ("cpu", "nvme"):
        names.append(CPU_ADAM)
    if "nvme" in devices.values():
        names.append(ASYNC_IO)
    return tuple(names)


def optimizer_is_on_nvme(config: Mapping[str, Any]) -> bool:
    """Whether a resolved configuration keeps optimizer states on disk. DeepSpeed saves them, and never reads them back:
    neither moments nor step counts of a checkpoint are those of the engine that loads it (0.19.8)."""
    section = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device") == "nvme"


def op_problems(config: Mapping[str, Any]) -> dict[str, str]:
    """Ops that a resolved configuration will not get on this machine: by name, the reason and the way out."""
    problems = {}
    for name in needed_ops(config):
        op = find_op(name)
        if not op.usable:
            instead = ""
            if name == CPU_ADAM:
                instead = "; without it torch's AdamW takes its place, several times slower"
            problems[name] = (
                f"offload needs DeepSpeed's op {name} ({PURPOSES[name]}), which cannot be built on this machine: "
                f"missing {' and '.join(op.missing)}{instead}"
            )
    return problems


def require_ops(config: Mapping[str, Any]) -> None:
    """Refuse a run that DeepSpeed would break off as it starts. CPU Adam has a substitute, and is not asked for.

    Raises:
        ConfigError: naming the op and what is missing.
    """
    problem = op_problems(config).get(ASYNC_IO) if ASYNC_IO in needed_ops(config) else None
    if problem is not None:
        raise ConfigError(problem)


def await_builds(config: Mapping[str, Any]) -> None:
    """Wait until no other run builds an op that ``config`` needs, and clear away what killed builds have left.

    torch marks a build by a file, and waits for as long as that file is there: for ever, if the builder was killed.
    """
    names = needed_ops(config)
    for name in (*names, PIN_MEMORY) if ASYNC_IO in names else names:
        for lock in _compiled(name, "lock"):
            _await_build(name, lock)


def _await_build(name: str, lock: Path) -> None:
    told = False
    while lock.exists():
        if _seconds_without_a_file(lock.parent) > KILLED_AFTER and not _is_open_somewhere(lock):
            log.warning("%s: left by a build of DeepSpeed's op %s that was killed; removed", lock, name)
            lock.unlink(missing_ok=True)
            return
        if not told:
            log.warning(
                "another run builds DeepSpeed's op %s (%s); waiting, up to %.0f s after a build that was killed",
                name, lock, KILLED_AFTER,
            )  # fmt: skip
            told = True
        time.sleep(0.2)


def _seconds_without_a_file(folder: Path) -> float:
    """How long ago the newest file of a folder was written; 0 while files come and go."""
    try:
        return time.time() - max(each.stat().st_mtime for each in folder.iterdir())
    except (OSError, ValueError):  # one went meanwhile, or all
        return 0.0


def _is_open_somewhere(path: Path) -> bool:
    """Whether a process of this machine has a file open, as far as it can be seen."""
    wanted = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == wanted:
                return True
    return False


def _has_library(name: str) -> bool:
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    if name not in ALL_OPS:
        return False
    # The probe prints its doubts. It redirects the descriptor of stderr, and takes a stderr without one for a failure.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.__stderr__):
        return bool(probe_is_compatible(ALL_OPS[name]))


def _compiled(name: str, pattern: str) -> list[Path]:
    """Files in the folders where torch compiles an op."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [*root.glob(f"{name}/{pattern}"), *root.glob(f"*/{name}/{pattern}")]
