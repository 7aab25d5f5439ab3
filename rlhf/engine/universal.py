"""A ZeRO checkpoint read on another number of ranks, by way of DeepSpeed's universal format.

ZeRO cuts weights and optimizer states by rank. DeepSpeed's converter joins them to whole parameters, of which each
rank then reads its own cut. Where its loader (0.19) would end with other numbers than a run on equally many ranks,
or not at all, it is helped here: see the functions below :func:`_load`.
"""

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

from rlhf.core.errors import CheckpointError
from rlhf.engine.ranks import Ranks

CONVERTED = "universal.tmp"


def ranks_written_on(folder: Path) -> int:
    """How many ranks wrote the ZeRO states in ``folder``; 0 where there are none, as under ZeRO-0."""
    return len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))


def load_on_other_ranks(engine: DeepSpeedEngine, folder: Path, tag: str, ranks: Ranks) -> None:
    """Load ``folder/tag``, written on any number of ranks. Every rank must call it.

    What is converted lies beside it until all ranks have read it; what a killed run leaves is made anew.

    Raises:
        CheckpointError: if it cannot be converted, for want of disk space for example.
    """
    if engine.zero_nvme_offload_optimizer():
        raise CheckpointError(
            f"{folder} was written on {ranks_written_on(folder / tag)} ranks. Optimizer states on NVMe can only be "
            f"read on as many, not on {ranks.world_size}: DeepSpeed saves them as files of each rank"
        )
    target = folder / CONVERTED
    if ranks.is_main:
        print(f"converting {folder}: {ranks_written_on(folder / tag)} ranks then, {ranks.world_size} now", flush=True)
    ranks.on_main(lambda: _convert(folder / tag, target / tag))
    _load(engine, target, tag)
    remove_converted(folder, ranks)


def remove_converted(folder: Path, ranks: Ranks) -> None:
    """Take away what was converted in ``folder``, also by a run that was killed. Every rank must call it."""
    ranks.on_main(lambda: shutil.rmtree(folder / CONVERTED, ignore_errors=True))


def _convert(source: Path, target: Path) -> None:
    shutil.rmtree(target.parent, ignore_errors=True)
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # more of them are forks, which a process with a GPU or with threads must not have
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        target.mkdir(parents=True)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            ds_to_universal.main(options)
    except Exception as error:
        left = shutil.disk_usage(source).free / 2**20
        shutil.rmtree(target.parent, ignore_errors=True)
        if not isinstance(error, OSError | RuntimeError):  # a full disk is the one to Python, the other to torch
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{source.parent} cannot be converted for another number of ranks: {reason} ({left:.1f} MiB left). The "
            "checkpoint is as it was; converting takes about twice its size on the same disk for a while"
        ) from error


def _load(engine: DeepSpeedEngine, folder: Path, tag: str) -> None:
    optimizer = engine.optimizer
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    with _universal(engine), _a_piece_of_every_group(optimizer), _without_warnings():
        engine.load_checkpoint(str(folder), tag=tag)
    # Under ZeRO-3 every group was given the settings of the first one.
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    _give_each_its_step(optimizer)


@contextlib.contextmanager
def _universal(engine: DeepSpeedEngine) -> Iterator[None]:
    """DeepSpeed's setting checkpoint.load_universal, for one load: the next checkpoint is an ordinary one."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence DeepSpeed's warnings of tensor parallelism, which is not there."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _a_piece_of_every_group(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """ZeRO 1 and 2: a rank may hold nothing but padding of a small group, and the loader takes its first parameter.

    So it is lent an empty piece of one.
    """
    groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", [])
    lent = [group[0] for group in groups if all(parameter._hp_mapping is None for parameter in group)]
    for parameter in lent:
        nothing, nowhere = parameter.new_empty(0, dtype=torch.float32), fragment_address(numel=0, start=0)
        parameter._hp_mapping = tensor_fragment(
            lp_fragment=nothing,
            lp_fragment_address=nowhere,
            hp_fragment=nothing,
            hp_fragment_address=nowhere,
            gradient_dict={},
            offload_gradient_dict={},
            use_offload=False,
            param_group_index=0,
            optim_fragment={},
        )
    try:
        yield
    finally:
        for parameter in lent:
            parameter._hp_mapping = None


def _give_each_its_step(optimizer: torch.optim.Optimizer) -> None:
    """The loader lets the parts of ZeRO-3 share one counter, which then counts each of them; and it is on the CPU."""
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)
