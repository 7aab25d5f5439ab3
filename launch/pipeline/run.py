"""Runs the stages of a pipeline: each as a job of its own, skipped, continued or redone as its marker says.

Those that do not need each other run side by side where each has devices of its own. A stage that fails stops nothing
that does not need it; after a request to stop, and after a stage that has stopped by itself, nothing new is started.
"""

import shlex
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from launch.doctor import Subject, run_checks
from launch.jobs import log
from launch.jobs.hostfile import end_on_hosts, write_hostfile
from launch.jobs.launcher import Job, Machine, stage_command, stage_environment
from launch.jobs.sharing import Sharing
from launch.pipeline.overview import Overview, outcome
from launch.pipeline.processes import StopRequest, alone, mark
from launch.pipeline.started import Logs, Started
from launch.pipeline.state import Action, Decision, Progress
from launch.runs import Pipeline, PipelineStage
from launch.stages import load
from rlhf.core.clock import clock
from rlhf.core.errors import STOPPED_EXIT_CODE, UserError
from rlhf.core.files import naming_disk_faults
from rlhf.core.owner import check_not_owned
from rlhf.train.status import read_status

FAILED_EXIT_CODE = 1
KILLED_EXIT_CODE = 130
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a pipeline runs."""

    machine: Machine
    at_once: int | None = None
    """The most stages at a time; ``None`` for as many as have devices of their own."""
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
        self._sharing = Sharing(self.options.machine, self.options.at_once)
        self.pipeline = self._sharing.split(self.pipeline)
        self._progress = Progress(self.pipeline, any_code=self.options.any_code, redo=self.options.redo)
        self._to_check = self.options.doctor
        self._started: dict[str, Started] = {}

    def run(self) -> int:
        """Run what is to be run; the exit code.

        Raises:
            UserError: if another pipeline works in the folder, a folder of a stage holds something else, or a stage
                cannot be started.
        """
        chosen = [self.pipeline.named(name) for name in self.options.only] or [*self.pipeline.stages]
        for stage in chosen:
            self._sharing.check(stage)
        began, folder, only = time.monotonic(), self.pipeline.output, self.options.only
        with naming_disk_faults(folder), alone(self.pipeline, only), StopRequest(folder, others=bool(only)) as stop:
            self._progress.check_free(chosen)
            for stage in self.pipeline.stages:
                self._progress.settle(stage)
            self._progress.check_redo(chosen)
            self._progress.remember()
            if self.pipeline.remembered:
                given = shlex.join(self.pipeline.remembered)
                said = f"as an earlier call said: {given} (--forget leaves that out)"
                self.console.print(said, soft_wrap=True, markup=False)
            with Overview(self.pipeline, self.console) as view:
                for stage in self.pipeline.stages:
                    if stage not in chosen:
                        view.show(stage.name, "left out")
                try:
                    self._work([stage for stage in self.pipeline.stages if stage in chosen], view, stop)
                finally:
                    self._end_all()
            self._report(view, time.monotonic() - began)
        if self.killed:
            return KILLED_EXIT_CODE
        return FAILED_EXIT_CODE if self.failures else STOPPED_EXIT_CODE if self.stopped else 0

    def _work(self, waiting: list[PipelineStage], view: Overview, stop: StopRequest) -> None:
        """Start what can be started, and watch it, until nothing is left to do or no more is to be begun.

        Raises:
            UserError: if a stage cannot be started. Those at work come to their end first.
        """
        refusal: UserError | None = None
        while True:
            while waiting and not self._stops(stop) and refusal is None:
                try:
                    changed = self._start_what_fits(waiting, view)
                except UserError as error:
                    refusal = error
                    break
                if not changed:
                    break
            if not self._started:
                break
            self._watch(view, stop)
        if refusal is not None:
            raise refusal
        if waiting:
            for stage in waiting:
                view.show(stage.name, self._progress.decide(stage).action.value)

    def _stops(self, stop: StopRequest) -> bool:
        """Whether nothing more is to be started."""
        self.stopped = self.stopped or stop.reason
        return bool(self.stopped)

    def _start_what_fits(self, waiting: list[PipelineStage], view: Overview) -> bool:
        """Go once through what waits; whether any of it waits no more."""
        before = len(waiting)
        for stage in [*waiting]:
            open_names = {*self._started, *(each.name for each in waiting)}
            if open_names.isdisjoint(stage.needs) and self._begin(stage, view):
                waiting.remove(stage)
        return len(waiting) < before

    def _begin(self, stage: PipelineStage, view: Overview) -> bool:
        """Start a stage, or settle that there is nothing to start; false if its devices are not free."""
        blocked = [name for name in stage.needs if name in self.failures]
        if blocked:
            self.failures[stage.name] = f"not run: it needs {', '.join(blocked)}"
            view.show(stage.name, "not run", f"needs {', '.join(blocked)}")
            return True
        decision = self._progress.decide(stage)
        if decision.action is Action.WAIT:
            raise UserError(f"{stage.name} waits {decision.reason}: run that first, or leave --only out")
        if decision.action is Action.SKIP:
            seconds = (self._progress.read(stage) or {}).get("seconds", 0.0)
            view.show(stage.name, "finished", outcome(stage, self._progress.measured(stage)), seconds)
            return True
        self._progress.check_redo([stage])  # for what those before it have changed
        part = self._sharing.take(stage)
        if part is None:
            return False
        self._start(stage, part, decision, view)
        return True

    def _start(self, stage: PipelineStage, part: Machine, decision: Decision, view: Overview) -> None:
        """Start one stage on its part of the machine."""
        if self._to_check:  # only once, and only where something is to be done
            self._check_machine(stage, view)
        folder = self._progress.log_folder(stage)
        if self.options.machine.over_ssh:
            folder = folder.absolute()  # by which the ranks of other hosts are known
            self._end_earlier(stage)
        check_not_owned(stage.output)  # by somebody who started that stage alone
        if part.hosts and part.hosts != self.options.machine.hosts:
            part = replace(part, hostfile=folder / "hostfile")
            write_hostfile(folder / "hostfile", part.hosts)
        else:
            (folder / "hostfile").unlink(missing_ok=True)
        command = stage_command(stage.stage, (*stage.arguments, "--log-folder", str(folder)), part)
        if decision.action is Action.REDO:
            view.say(f"{stage.name}: done again: {decision.reason}")
        elif decision.action is Action.CONTINUE and decision.reason:
            view.say(f"warning: {stage.name} goes on from its checkpoints although {decision.reason}")
        view.show(stage.name, "running", "from its last checkpoint" if decision.action is Action.CONTINUE else "")
        # Noted before the process exists: if this pipeline is killed from here on, the next one sees a stage begun.
        self._progress.start(stage, decision)
        environment, logs = stage_environment(stage.stage, part), Logs(folder)
        shown = [*(f"{name}={value}" for name, value in environment.items()), *map(_shown, command)]
        view.say(f"  {shlex.join(shown)}")
        own = {"COLUMNS": "120"} | environment | mark(self.pipeline.output, stage.name)
        self._started[stage.name] = Started(stage, Job(command, logs.launcher, **own), logs)

    def _watch(self, view: Overview, stop: StopRequest) -> None:
        """Look after the stages at work for a moment: show how far they are, ask them to stop, note how they ended."""
        first = next(iter(self._started.values()))
        first.job.wait(SECONDS_BETWEEN_LOOKS if len(self._started) == 1 else SECONDS_BETWEEN_LOOKS / 2)
        for each in [*self._started.values()]:
            code = each.job.wait(0)
            if code is not None:
                self._ended(each, code, view, stop)
                continue
            view.tick(each.stage.name, read_status(each.stage.output), each.seconds)
            if not stop.reason:
                continue
            if each.ask():
                end = "saves at its next step and stops (again: ends it at once)" if each.saves else "ends"
                view.say(f"{stop.reason}: {each.stage.name} {end}")
            if stop.at_once or each.is_late(self.options.grace_seconds):
                view.say(f"{each.stage.name}: ended at once")
                self.killed = stop.at_once
                self._end(each)
                self._ended(each, None, view, stop)

    def _ended(self, each: Started, code: int | None, view: Overview, stop: StopRequest) -> None:
        """Note how a stage has ended; ``code`` is ``None`` if it was killed."""
        stage, seconds = each.stage, each.seconds
        del self._started[stage.name]
        each.job.end()
        self._sharing.give_back(stage)
        status = read_status(stage.output)
        state = status.state if status is not None else ""
        if state == "finished":  # the exit code proves nothing: deepspeed's can be 0 after a kill
            self._progress.finish(stage, seconds)
            measured = self._progress.measured(stage)
            view.show(stage.name, "finished", outcome(stage, measured), (self._progress.read(stage) or {})["seconds"])
            return
        self._progress.interrupt(stage, seconds)
        if code is None or state == "stopped":
            self.stopped = self.stopped or stop.reason or f"{stage.name} was asked to stop"
            self._progress.speak_for(stage, "stopped", self.stopped)
            view.show(stage.name, "stopped", status.reason if status is not None else "", seconds)
            return
        self.failures[stage.name] = f"{log.meaning(code)}: {each.logs.cause(status)}"
        self._progress.speak_for(stage, "failed", self.failures[stage.name])
        view.show(stage.name, "failed", log.meaning(code), seconds)

    def _end(self, each: Started) -> None:
        """End a stage at once."""
        each.job.end()
        if self.options.machine.over_ssh:  # the launcher was killed, and cannot end what it started
            self._end_on_hosts(each.stage)

    def _end_all(self) -> None:
        """End what still runs: this pipeline cannot go on."""
        for each in self._started.values():
            each.job.let_go()
        for each in self._started.values():
            self._end(each)

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
            together=self._sharing.together(ahead),
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

    def _end_on_hosts(self, stage: PipelineStage) -> None:
        """End what is left of a stage on the hosts of a hostfile: it is no child of anything here."""
        end_on_hosts(self.options.machine.hosts, f"--log-folder {self._progress.log_folder(stage).absolute()}")

    def _end_earlier(self, stage: PipelineStage) -> None:
        """End what an earlier pipeline, which was killed, has left on other hosts: its ranks would meet ours."""
        if self._started or self.options.only:
            self._end_on_hosts(stage)
        else:
            logs = self._progress.log_folder(stage).parent.absolute()
            end_on_hosts(self.options.machine.hosts, f"--log-folder {logs}/")

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
        console.print(f"{end}, after {clock(seconds)}", soft_wrap=True, markup=False, highlight=False)


def _shown(part: str) -> str:
    path = Path(part)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return part
