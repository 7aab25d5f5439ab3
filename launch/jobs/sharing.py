"""Which devices of a machine are free: stages run side by side where each has devices of its own."""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from launch.jobs.devices import visible_gpus
from launch.jobs.launcher import HERE, Machine
from launch.runs import Pipeline, PipelineStage
from rlhf.core.errors import ConfigError


@dataclass
class Sharing:
    """A machine that stages share."""

    machine: Machine
    at_once: int | None = None
    """The most stages at a time; ``None`` for as many as have devices, which is one at a time without a GPU."""
    _taken: dict[str, Machine] = field(default_factory=dict)
    """What the stages have that run, by name."""

    def __post_init__(self) -> None:
        self._sizes = dict(self.machine.hosts) or {HERE: visible_gpus()}
        if self._on_cpu and self.at_once is None:
            self.at_once = 1

    @property
    def _on_cpu(self) -> bool:
        """Whether there is nothing but the cores of this machine, which all stages have in common."""
        return self._sizes == {HERE: 0}

    def split(self, pipeline: Pipeline) -> Pipeline:
        """Stages that do not say what they use get an equal part of the machine, if several are wanted at once."""
        if self._on_cpu or self.at_once in (None, 1):
            return pipeline
        stages = (stage if stage.says_size else self._equal_part(stage) for stage in pipeline.stages)
        return replace(pipeline, stages=tuple(stages))

    def check(self, stage: PipelineStage) -> None:
        """Refuse what can never start.

        Raises:
            ConfigError: if ``stage`` asks for more than there is.
        """
        if self.machine.hosts:
            stage.share(self.machine.hosts)
            return
        if stage.nodes is not None and stage.nodes > 1:
            raise ConfigError(f"stages.{stage.name}.nodes = {stage.nodes}: the run has 1; ask for no more")
        gpus = self._sizes[HERE]
        if self.machine.ranks is not None and gpus and self.machine.ranks > gpus:
            raise ConfigError(f"--ranks {self.machine.ranks}: {gpus} GPUs are visible; ask for no more")
        if stage.ranks is not None and gpus and stage.ranks > gpus:
            raise ConfigError(f"stages.{stage.name}.ranks = {stage.ranks}: {gpus} GPUs are visible; ask for no more")

    def together(self, stages: Sequence[PipelineStage]) -> tuple[tuple[PipelineStage, ...], ...]:
        """Groups of several stages that are likely to be at work at a time: as deep in the pipeline, and they fit."""
        depths: dict[str, int] = {}
        for stage in stages:
            depths[stage.name] = 1 + max((depths.get(need, 0) for need in stage.needs), default=0)
        groups = []
        for depth in sorted({*depths.values()}):
            empty = Sharing(self.machine, self.at_once)
            alike = (stage for stage in stages if depths[stage.name] == depth)
            groups.append(tuple(stage for stage in alike if empty.take(stage) is not None))
        return tuple(group for group in groups if len(group) > 1)

    def take(self, stage: PipelineStage) -> Machine | None:
        """What ``stage`` uses of the machine from now on; ``None`` if that is not free."""
        if self.at_once is not None and len(self._taken) >= self.at_once:
            return None
        places: Mapping[str, tuple[int, ...]] | None = {}
        if not self._on_cpu and not stage.stage.alone:
            places = self._places(stage)
        if places is None:
            return None
        part = self._taken[stage.name] = self._part(stage, places)
        return part

    def give_back(self, stage: PipelineStage) -> None:
        """``stage`` has ended."""
        del self._taken[stage.name]

    def _equal_part(self, stage: PipelineStage) -> PipelineStage:
        """``stage`` with whole nodes where there are enough, else with a part of the devices of one."""
        assert self.at_once is not None
        if stage.stage.alone:
            return stage
        on_a_node = -(-self.at_once // len(self._sizes))
        if on_a_node == 1:
            return replace(stage, nodes=len(self._sizes) // self.at_once)
        nodes = 1 if self.machine.hosts else None
        return replace(stage, nodes=nodes, ranks=max(1, min(map(self._limit, self._sizes)) // on_a_node))

    def _limit(self, host: str) -> int:
        """Devices of a node that are there for the run: on this machine, --ranks says how many of the visible ones."""
        return self.machine.ranks or self._sizes[host] if host == HERE else self._sizes[host]

    def _places(self, stage: PipelineStage) -> dict[str, tuple[int, ...]] | None:
        """Free devices for ``stage`` by node, each by its place among those of the node; ``None`` if there are too few.

        How many it has on how many nodes never depends on what is free: results would, too, by rounding.
        """
        if self.machine.hosts:
            wanted = [*stage.share(self.machine.hosts).values()]
        else:
            wanted = [stage.ranks or self._limit(HERE)]
        found: dict[str, tuple[int, ...]] = {}
        for count in wanted:
            for host, size in self._sizes.items():
                limit = max(self._limit(host), count)
                free = [place for place in range(min(limit, size)) if place not in self._busy(host)]
                fits = len(free) >= count if stage.ranks is not None else len(free) == count == limit
                if fits and host not in found:
                    found[host] = tuple(free[:count])
                    break
            else:
                return None
        return found

    def _busy(self, host: str) -> set[int]:
        return {place for part in self._taken.values() for place in part.devices.get(host, ())}

    def _part(self, stage: PipelineStage, places: Mapping[str, tuple[int, ...]]) -> Machine:
        numbers = {part.number for part in self._taken.values()}
        number = next(number for number in itertools.count() if number not in numbers)
        part = replace(self.machine, devices=places, number=number)
        if self._on_cpu:
            return replace(part, ranks=stage.ranks or self.machine.ranks, cores=self._cores())
        part = replace(part, partial=any(len(taken) < self._sizes[host] for host, taken in places.items()))
        if not self.machine.hosts:
            return replace(part, ranks=len(places[HERE]) if places else None)
        hosts = {host: len(taken) for host, taken in places.items()}
        first = next(iter(self.machine.hosts))
        there = {host: self._sizes[host] for host in hosts}
        return replace(part, hosts=hosts, there=there, elsewhere=first != next(iter(hosts), first))

    def _cores(self) -> int | None:
        """Those that a stage has for itself, where several are wanted at once."""
        if self.at_once in (None, 1):
            return None
        return max(1, len(os.sched_getaffinity(0)) // self.at_once)
