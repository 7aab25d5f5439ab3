"""Renders a run and a cluster profile as an sbatch script."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import launch
from launch.jobs.asked_step import CONTAINER_VARIABLE, STEPS_VARIABLE
from launch.jobs.srun import SRUN_VARIABLE, srun_words, step_words
from launch.runs import PipelineStage, stage_logs
from launch.slurm.profile import ClusterProfile
from rlhf.core.errors import REFUSED_EXIT_CODE, STOPPED_EXIT_CODE, ConfigError
from rlhf.core.files import STATUS, digest, staged_directory, write_text

PACKAGES = ("ds_configs", "launch", "policy", "reward", "rlhf")
"""What a snapshot of the code holds."""
_SIGNAL_SLACK_SECONDS = 120
"""How much earlier than it was told to, at most, SLURM signals a job."""
_WIDTH = 110
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Expanded(str):
    """A word that the shell is to expand: it is not quoted."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one job runs."""

    name: str
    """Name of the job, as squeue shows it."""
    title: str
    output: Path
    """The run folder."""
    arguments: tuple[str, ...]
    """A module and its arguments for a stage; those of ``rlhf`` for a pipeline."""
    pipeline: bool = False
    written_by: str = ""
    stages: tuple[PipelineStage, ...] = ()
    """Those of a pipeline."""
    label: str = "job"
    """Name of the script in its folder, where a run has several."""
    needs: tuple[str, ...] = ()
    """Labels of the jobs that it waits for."""

    @property
    def folder(self) -> Path:
        """Script, hostfile and logs."""
        return self.output / "slurm"

    @property
    def script(self) -> Path:
        return self.folder / f"{self.label}.sh"

    @property
    def log(self) -> Path:
        """The log of job %j."""
        return self.folder / "logs" / "%j.log"


def render(job: Job, profile: ClusterProfile) -> str:
    """The sbatch script of ``job``, to be submitted from anywhere.

    Raises:
        ConfigError: if the profile cannot run such a job.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["sh"] = lambda value: quote(str(value))
    template = environment.from_string((files("launch.slurm") / "job.sh.j2").read_text(encoding="utf-8"))
    return template.render(
        title=_one_line(job.title),
        written_by=_one_line(job.written_by or "rlhf slurm"),
        script=job.script.absolute(),
        logs=job.log.parent.absolute(),
        directives=list(_directives(job, profile)),
        profile=profile,
        early_seconds=profile.time_seconds - profile.signal_lead_seconds - _SIGNAL_SLACK_SECONDS,
        output=job.output.absolute(),
        statuses=[(folder / STATUS).absolute() for folder in [each.output for each in job.stages] or [job.output]],
        hostfiles=[stage_logs(job.output, each.name).absolute() / "hostfile" for each in job.stages],
        code=None if profile.container else snapshot_name(),
        script_name=job.script.name,
        venv=_venv(profile),
        preflight=_preflight(profile),
        pipeline=job.pipeline,
        container=" ".join(map(quote, profile.container)),
        steps_variable=STEPS_VARIABLE,
        container_variable=CONTAINER_VARIABLE,
        srun_options=" ".join(map(quote, profile.srun_options)),
        srun_variable=SRUN_VARIABLE,
        command=_command(job, profile),
        stopped=STOPPED_EXIT_CODE,
        refused=REFUSED_EXIT_CODE,
    )


def write_script(job: Job, profile: ClusterProfile) -> None:
    """Put the script of ``job`` into its run folder, and make room for its log.

    Raises:
        ConfigError: as :func:`render`.
    """
    text = render(job, profile)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    if not profile.container:
        write_snapshot(job.folder)
    write_text(job.script, text, private=bool(profile.environment))
    mode = job.script.stat().st_mode
    job.script.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may start it


def snapshot_name() -> str:
    """What the folder with the present code is called."""
    root = _root()
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*") if _is_source(path))
    return f"code-{digest(*(part for file in files for part in (str(file.relative_to(root)), file.read_bytes())))}"


def write_snapshot(folder: Path) -> None:
    """Keep the present code in ``folder``: a job runs it however the code is edited while it waits or is requeued."""
    target, root = folder / snapshot_name(), _root()
    if target.is_dir():
        return
    with staged_directory(target) as staged:
        for package in PACKAGES:
            shutil.copytree(root / package, staged / package, ignore=shutil.ignore_patterns("__pycache__"))


def _root() -> Path:
    return Path(launch.__file__).resolve().parents[1]


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def _directives(job: Job, profile: ClusterProfile) -> Iterator[str]:
    """Lines for sbatch."""
    values = {
        "job-name": job.name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodes": profile.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": _gpus(profile),
        "cpus-per-task": profile.cpus,
        "mem": profile.memory,
        "time": profile.time,
        "chdir": Path.cwd(),
        "output": job.log.absolute(),
        "open-mode": "append",
        "signal": f"B:USR1@{profile.signal_lead_seconds}",
    }
    for name, value in values.items():
        if value is not None:
            yield f"--{name}={_directive_value(name, str(value))}"
    yield "--requeue" if profile.requeue else "--no-requeue"
    yield from profile.sbatch_options


def _directive_value(name: str, value: str) -> str:
    """sbatch reads words as a shell does, without expanding anything.

    Raises:
        ConfigError: for a value with a line break, behind which sbatch would read no more of them.
    """
    if _CONTROL.search(value):
        raise ConfigError(f"sbatch --{name}={value!r}: expected one line")
    return value if not set(value) & set(" \t'\"#\\") else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _gpus(profile: ClusterProfile) -> str | None:
    if profile.device_kind == "cpu":
        return None
    return ":".join(filter(None, [profile.gpu_type, str(profile.devices)]))


def _venv(profile: ClusterProfile) -> Path | None:
    if profile.container:
        return None
    return profile.venv.absolute() if profile.venv else Path(sys.prefix)


def _preflight(profile: ClusterProfile) -> str:
    gpus = profile.devices if profile.device_kind == "gpu" else 0
    words = [
        *srun_words(profile.nodes, profile.srun_options),
        *profile.container,
        *("python", "-m", "launch.slurm.preflight", "--folder", Expanded('"$run"'), "--token", Expanded('"$token"')),
        *("--devices", str(gpus), "--free-gib", f"{profile.free_disk_gib:g}"),
    ]
    return _lines(words, indent=4)


def _command(job: Job, profile: ClusterProfile) -> str:
    if job.pipeline and profile.container:
        return _lines([*profile.container, "python", "-m", "launch.cli", *job.arguments[1:]], indent=8)
    if job.pipeline:
        return _lines(job.arguments, indent=8)
    supervisor = [*profile.container, "python", "-m", "launch.jobs.supervisor"]
    step = step_words(supervisor, [profile.devices] * profile.nodes, ["python", "-m", *job.arguments])
    return _lines([*srun_words(profile.nodes, profile.srun_options), *step], indent=8)


def quote(word: str) -> str:
    """``word`` for bash, on one line whatever is in it."""
    if not _CONTROL.search(word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", escaped) + "'"


def _one_line(text: str) -> str:
    """``text`` for a comment, which a line break would end."""
    return _CONTROL.sub(" ", text)


def _lines(words: Sequence[str], indent: int) -> str:
    """The command, broken so that it can be read."""
    lines = [""]
    for word in words:
        text = word if isinstance(word, Expanded) else quote(word)
        if len(lines[-1]) + len(text) > _WIDTH:
            lines.append("")
        lines[-1] += f" {text}" if lines[-1] else text
    return f" \\\n{' ' * indent}".join(lines)
