"""DeepSpeed's compiled ops: which are there, which can be built when a run first needs them, and what is missing.

DeepSpeed compiles an op at its first use. That takes a C++ compiler, ninja and the Python headers, and for some ops a
library. Its own report tells of the library alone, so a run may find out about the rest in the middle of its start.
"""

import contextlib
import io
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.core.errors import ConfigError

CPU_ADAM, ASYNC_IO = "cpu_adam", "async_io"
PURPOSES = {
    CPU_ADAM: "AdamW on the host, for offload_optimizer",
    ASYNC_IO: "reading and writing offloaded states on NVMe",
}
"""The ops that configurations of this toolkit can ask for."""
PIN_MEMORY = "pin_memory"  # compiled along with async_io
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
    """Left by builds that run or were killed. A run waits for them without an end."""

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
