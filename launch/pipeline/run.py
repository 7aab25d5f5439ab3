"""Runs the stages of a pipeline: each as a job of its own, skipped, continued or redone as its marker says."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from launch.doctor import Subject, run_checks
from launch.jobs import log
from launch.jobs.hostfile import end_on_hosts, write_hostfile
from launch.jobs.launcher import Job, Machine, stage_command
from launch.pipeline.overview import Overview, outcome
from launch.pipeline.processes import StopRequest, alone, mark
from launch.pipeline.state import Action, Decision, Progress
from launch.runs import Pipeline, PipelineStage
from launch.stages import load
from rlhf.core.clock import clock
from rlhf.core.errors import STOP_FILE, STOPPED_EXIT_CODE, UserError
from rlhf.core.files import naming_disk_faults
from rlhf.core.owner import check_not_owned
from rlhf.train.status import Status, read_status

FAILED_EXIT_CODE = 1
KILLED_EXIT_CODE = 130
SECONDS_BETWEEN_REQUESTS = 5.0


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a pipeline runs."""

    machine: Machine
    only: tuple[str, ...] = ()
    """Names of the stages to run; all if empty."""
    doctor: bool = True
    """Check the machine before the first stage starts."""
    any_code: bool = False
    """Results of another version of the code, and of the libraries, count."""
    redo: tuple[str, ...] = ()
    """Names of stages to do again."""
    grace_seconds: float = 600.0
    """How long a stage that was asked to stop may take to reach its next checkpoint."""


@dataclass
class PipelineRun:
    """One call of ``rlhf pipeline run``."""

    pipeline: Pipeline
    options: RunOptions
    console: Console
    failures: dict[str, str] = field(default_factory=dict)
    stopped: str = ""
    killed: bool = False

    def __post_init__(self) -> None:
        self._progress = Progress(self.pipeline, any_code=self.options.any_code, redo=self.options.redo)
        self._to_check = self.options.doctor

    def run(self) -> int:
        """Run what is to be run; the exit code.

        Raises:
            UserError: if another pipeline works in the folder, a folder of a stage holds something else, or a stage
                cannot be started.
        """
        chosen = [self.pipeline.named(name) for name in self.options.only] or self.pipeline.stages
        for stage in chosen:
            self.options.machine.part_for(stage)  # it may ask for more than there is
        began = time.monotonic()
        with naming_disk_faults(self.pipeline.output), alone(self.pipeline), StopRequest(self.pipeline.output) as stop:
            self._progress.check_free(chosen)
            for stage in self.pipeline.stages:
                self._progress.settle(stage)
            self._progress.check_redo(chosen)
            self._progress.remember()
            if self.pipeline.remembered:
                given = shlex.join(self.pipeline.remembered)
                self.console.print(f"as an earlier call said: {given} (--forget leaves that out)", soft_wrap=True)
            with Overview(self.pipeline, self.console) as view:
                for stage in self.pipeline.stages:
                    if stage in chosen and not self.stopped:
                        self._settle(stage, view, stop)
                    elif stage not in chosen:
                        view.show(stage.name, "left out")
            self._report(view, time.monotonic() - began)
        if self.killed:
            return KILLED_EXIT_CODE
        return FAILED_EXIT_CODE if self.failures else STOPPED_EXIT_CODE if self.stopped else 0

    def _settle(self, stage: PipelineStage, view: Overview, stop: StopRequest) -> None:
        """Bring one stage to its end, if that can be done."""
        blocked = [name for name in stage.needs if name in self.failures]
        if blocked:
            self.failures[stage.name] = f"not run: it needs {', '.join(blocked)}"
            view.show(stage.name, "not run", f"needs {', '.join(blocked)}")
            return
        decision = self._progress.decide(stage)
        if decision.action is Action.WAIT:
            raise UserError(f"{stage.name} waits {decision.reason}: run that first, or leave --only out")
        if decision.action is Action.SKIP:
            seconds = (self._progress.read(stage) or {}).get("seconds", 0.0)
            view.show(stage.name, "finished", outcome(stage, self._progress.measured(stage)), seconds)
            return
        if stop.reason:
            self.stopped = stop.reason
            view.show(stage.name, decision.action.value)
            return
        self._progress.check_redo([stage])  # for what those before it have changed
        self._work(stage, decision, view, stop)

    def _work(self, stage: PipelineStage, decision: Decision, view: Overview, stop: StopRequest) -> None:
        """Start one stage, watch it to its end, and note how that was."""
        if self._to_check:  # only once, and only where something is to be done
            self._check_machine(stage, view)
        folder = self._progress.log_folder(stage)
        if self.options.machine.over_ssh:
            folder = folder.absolute()  # by which the ranks of other hosts are known
            self._end_on_hosts()  # an earlier pipeline may have been killed: its ranks would meet ours in the folder
        check_not_owned(stage.output)  # by somebody who started that stage alone
        machine = self._machine(stage, folder)
        command = stage_command(stage.stage, (*stage.arguments, "--log-folder", str(folder)), machine)
        if decision.action is Action.REDO:
            view.say(f"{stage.name}: done again: {decision.reason}")
        elif decision.action is Action.CONTINUE and decision.reason:
            view.say(f"warning: {stage.name} goes on from its checkpoints although {decision.reason}")
        view.show(stage.name, "running", "from its last checkpoint" if decision.action is Action.CONTINUE else "")
        # Noted before the process exists: if this pipeline is killed from here on, the next one sees a stage begun.
        self._progress.start(stage, decision)
        view.say(f"  {shlex.join(map(_shown, command))}")
        began, logs = time.monotonic(), _Logs(folder)
        code = self._watch(stage, command, logs, view, stop)
        if code is None and self.options.machine.over_ssh:  # the launcher was killed, and cannot end what it started
            self._end_on_hosts()
        seconds = time.monotonic() - began
        status = read_status(stage.output)
        state = status.state if status is not None else ""
        if state == "finished":  # the exit code proves nothing: deepspeed's can be 0 after a kill
            self._progress.finish(stage, seconds)
            measured = self._progress.measured(stage)
            view.show(stage.name, "finished", outcome(stage, measured), (self._progress.read(stage) or {})["seconds"])
            return
        self._progress.interrupt(stage, seconds)
        if code is None or state == "stopped":
            self.stopped = stop.reason or "the stage was asked to stop"
            self._progress.speak_for(stage, "stopped", self.stopped)
            view.show(stage.name, "stopped", status.reason if status is not None else "", seconds)
            return
        self.failures[stage.name] = f"{log.meaning(code)}: {logs.cause(status)}"
        self._progress.speak_for(stage, "failed", self.failures[stage.name])
        view.show(stage.name, "failed", log.meaning(code), seconds)

    def _check_machine(self, first: PipelineStage, view: Overview) -> None:
        """Look at it with what the stages from ``first`` on need.

        Raises:
            UserError: if a run would not get far on this machine.
        """
        self._to_check = False
        stages, only = self.pipeline.stages, self.options.only
        ahead = tuple(each for each in stages[stages.index(first) :] if not only or each.name in only)
        machine = self.options.machine  # the nodes of a hostfile have been asked before
        subject = Subject(
            output=self.pipeline.output,
            stages=ahead,
            pipeline=self.pipeline,
            ranks=machine.ranks,
            hosts=machine.hosts,
        )
        findings = run_checks(subject, quick=True)
        for each in findings:
            if each.status == "warning":
                view.say(f"warning: {each.text}" + (f" ({each.remedy})" if each.remedy else ""))
        failures = [each for each in findings if each.status == "failure"]
        if failures:
            lines = [f"{each.check}: {each.text}; {each.remedy}" for each in failures]
            way_out = "rlhf doctor says more; --no-doctor starts all the same"
            raise UserError("\n  ".join(["this machine is not ready:", *lines, way_out]))

    def _watch(
        self, stage: PipelineStage, command: Sequence[str], logs: "_Logs", view: Overview, stop: StopRequest
    ) -> int | None:
        """Wait for the end of a stage, or bring it about; the exit code, ``None`` if it was killed."""
        began, asked, again = time.monotonic(), None, 0.0
        with Job(command, logs.launcher, COLUMNS="120", **mark(self.pipeline.output)) as job:
            while (code := job.wait(0.5)) is None:
                view.tick(stage.name, read_status(stage.output), time.monotonic() - began)
                if not stop.reason:
                    continue
                if asked is None:
                    asked = time.monotonic()
                    end = "saves at its next step and stops (again: ends it at once)" if stage.stage.trains else "ends"
                    view.say(f"{stop.reason}: {stage.name} {end}")
                if stage.stage.trains and time.monotonic() >= again:
                    _touch_stop(stage)
                    again = time.monotonic() + SECONDS_BETWEEN_REQUESTS
                late = time.monotonic() - asked > self.options.grace_seconds
                if stop.at_once or late or not stage.stage.trains:
                    view.say(f"{stage.name}: ended at once")
                    self.killed = stop.at_once
                    return None
            return code

    def _end_on_hosts(self) -> None:
        """End what is left of this pipeline on the hosts of a hostfile: it is no child of anything here."""
        end_on_hosts(self.options.machine.hosts, f"--log-folder {self._progress.logs.absolute()}/")

    def _machine(self, stage: PipelineStage, folder: Path) -> Machine:
        """What it uses of the machine. Over ssh a hostfile in ``folder`` says it, if that is not all."""
        machine = self.options.machine.part_for(stage)
        if machine.over_ssh and machine.hosts != self.options.machine.hosts:
            machine = replace(machine, hostfile=folder / "hostfile")
            write_hostfile(folder / "hostfile", machine.hosts)
        return machine

    def _report(self, view: Overview, seconds: float) -> None:
        console = self.console
        console.print(view.table())
        for stage in self.pipeline.stages:
            if stage.stage.report and view.lines[stage.name].state == "finished":
                console.print(load(stage.stage.report)(stage.output))
        for name, reason in self.failures.items():
            console.print(f"{name} failed: {reason}", soft_wrap=True, markup=False, highlight=False)
        if self.failures:
            end = "finished stages stay as they are; mend the cause and start the pipeline again"
        elif self.stopped:
            end = f"stopped ({self.stopped}); the same command goes on from there"
        else:
            end = "done"
        console.print(f"{end}, after {clock(seconds)}", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class _Logs:
    """The log files of a stage, and how long each was when it started."""

    folder: Path
    starts: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", {path: log.size(path) for path in self.folder.glob("*.log")})

    @property
    def launcher(self) -> Path:
        return self.folder / "launcher.log"

    def cause(self, status: Status | None) -> str:
        """Why the stage failed, and the log that tells more: by its status, else by what was said last."""
        if status is not None and status.state == "failed":
            of_rank = f"rank {status.rank}: " if status.rank else ""
            of_it = self.folder / f"rank{status.rank}.log"
            path = of_it if of_it.exists() else self.launcher  # it broke before it had one
            return f"{of_rank}{status.reason}\n  its log: {path}"
        there = [path for path in (self.folder / "rank0.log", self.launcher) if path.exists()]
        words = {path: log.last_line(path, self.starts.get(path, 0)) for path in there}
        path = next((path for path in there if words[path]), next(iter(there), self.launcher))
        return f"{words.get(path) or 'no output'}\n  its log: {path}"


def _touch_stop(stage: PipelineStage) -> None:
    """Ask for a checkpoint. Ranks that are still starting drop a file that is older than they are: ask again later."""
    stage.output.mkdir(parents=True, exist_ok=True)
    (stage.output / STOP_FILE).touch()


def _shown(part: str) -> str:
    path = Path(part)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return part
