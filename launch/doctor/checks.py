"""All checks, in the order in which a run would meet their subjects."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.doctor import collectives, hardware, network, software
from launch.doctor.finding import Finding, Subject


@dataclass(frozen=True)
class Check:
    """One check; ``quick`` ones together take a few seconds and look at what can fail a run at any time."""

    name: str
    look: Callable[[Subject], Iterable[Finding]]
    quick: bool = False


CHECKS = (
    Check("versions", software.versions),
    Check("build tools", software.tools),
    Check("DeepSpeed ops", software.ops),
    Check("devices", hardware.devices, quick=True),
    Check("host memory", hardware.host_memory, quick=True),
    Check("shared memory", hardware.shared_memory, quick=True),
    Check("disk", hardware.disk, quick=True),
    Check("hub", network.hub),
    Check("SLURM", network.slurm),
    Check("hostfile", network.hostfile, quick=True),
    Check("all-reduce", collectives.all_reduce),
)


def run_checks(
    *,
    ranks: int | None = None,
    hostfile: Path | None = None,
    output: Path | None = None,
    configs: Sequence[Any] = (),
    quick: bool = False,
    notice: Callable[[str], None] = lambda name: None,
) -> list[Finding]:
    """Look at this machine, and at those of ``hostfile``.

    Args:
        ranks: processes on this machine; ``None`` for as many as the launcher would start.
        hostfile: machines that the run uses over ssh.
        output: where the run writes; ``None`` for the output of the first of ``configs``, else ``runs``.
        configs: validated recipes of the run's stages: sizes of models, offload, hub names.
        quick: only what takes a few seconds in all.
        notice: told the name of each check before it is made.
    """
    if output is None:
        output = configs[0].output if configs else Path("runs")
    subject = Subject(ranks=ranks, hostfile=hostfile, output=output, configs=tuple(configs))
    findings: list[Finding] = []
    for check in CHECKS:
        if quick and not check.quick:
            continue
        notice(check.name)
        findings += _made(check, subject)
    return findings


def _made(check: Check, subject: Subject) -> list[Finding]:
    """What ``check`` finds. One that breaks is a finding, too: the others are still worth having."""
    try:
        return list(check.look(subject))
    except Exception as error:
        text = f"the check itself broke: {type(error).__name__}: {error}"
        remedy = "an installation that is not whole, or a fault of rlhf: report it"
        return [Finding(check.name, "failure", text, remedy)]
