"""All checks, in the order in which a run would meet their subjects."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from launch.doctor import collectives, hardware, inputs, network, software
from launch.doctor.finding import Finding
from launch.doctor.subject import Subject


@dataclass(frozen=True)
class Check:
    """One check; ``quick`` ones together take a few seconds and look at what fails a run, if only in its last stage."""

    name: str
    look: Callable[[Subject], Iterable[Finding]]
    quick: bool = False


CHECKS = (
    Check("versions", software.versions, quick=True),
    Check("build tools", software.tools),
    Check("DeepSpeed ops", software.ops, quick=True),
    Check("vLLM", software.vllm, quick=True),
    Check("input files", inputs.inputs, quick=True),
    Check("devices", hardware.devices, quick=True),
    Check("device memory", hardware.device_memory, quick=True),
    Check("host memory", hardware.host_memory, quick=True),
    Check("shared memory", hardware.shared_memory, quick=True),
    Check("disk", hardware.disk, quick=True),
    Check("hub", network.hub),
    Check("SLURM", network.slurm),
    Check("hostfile", network.hostfile, quick=True),
    Check("all-reduce", collectives.all_reduce),
)


def run_checks(
    subject: Subject, *, quick: bool = False, notice: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Look at this machine, and at those of a hostfile.

    Args:
        subject: the run that it is to be ready for.
        quick: only what takes a few seconds in all.
        notice: told the name of each check before it is made.
    """
    findings: list[Finding] = []
    for check in CHECKS:
        if quick and not check.quick:
            continue
        notice(check.name)
        findings += (replace(found, check=check.name) for found in _made(check, subject))
    return findings


def _made(check: Check, subject: Subject) -> list[Finding]:
    """What ``check`` finds. One that breaks is a finding, too: the others are still worth having."""
    try:
        return list(check.look(subject))
    except Exception as error:
        text = f"the check itself broke: {type(error).__name__}: {error}"
        return [Finding("failure", text, "an installation that is not whole, or a fault of rlhf: report it")]
