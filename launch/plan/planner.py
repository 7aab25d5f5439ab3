"""The plan of one stage: its phases, batches, times and disk, and whether it fits."""

from dataclasses import dataclass, field, replace

import numpy as np

from launch.plan.activations import FLOAT32, Load, cache_bytes, next_token_bytes
from launch.plan.batches import BatchPlan, batch_plan
from launch.plan.cluster import Cluster
from launch.plan.data import Lengths, lengths_of
from launch.plan.models import Sources
from launch.plan.phases import (
    HOST_BASE_CPU,
    HOST_BASE_CUDA,
    Phase,
    Work,
    beside,
    forward_phase,
    on_this_machine,
    resting,
    training_phases,
    work_of,
)
from launch.plan.roles import SIZES, Role, Roles, precision_of_plan, roles_of
from launch.plan.states import States
from rlhf.core.epochs import steps_per_epoch
from rlhf.engine.options import Precision
from rlhf.train.workload import RolloutLoad, TrainingRecipe, Workload

COPY_SHARE = 0.5
"""Share of free memory that a copy of the weights for rollouts may take (policy/generation/weights.py)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for besides the recipe."""

    sources: Sources = field(default_factory=Sources)
    rows: int | None = None
    mean_tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage needs."""

    stage: str
    """Its name, for titles."""
    config: TrainingRecipe
    cluster: Cluster
    precision: Precision
    roles: Roles
    states: dict[str, States]
    phases: tuple[Phase, ...]
    publishing: Phase | None
    """Memory of the main rank's host while it publishes."""
    batches: BatchPlan
    lengths: Lengths
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        return SIZES[self.precision]

    @property
    def workload(self) -> Workload:
        return self.config.workload

    @property
    def device_peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def host_peak(self) -> Phase:
        """Host memory of one rank at its peak; publishing counts on the main rank only."""
        return max(self.phases, key=lambda phase: phase.host_bytes)

    @property
    def node_host_bytes(self) -> int:
        """Host memory of the node that holds the main rank."""
        ranks = self.cluster.devices_per_node
        together = ranks * self.host_peak.host_bytes
        if self.publishing is None:
            return together
        rest = self.phases[-1].host_bytes
        return max(together, (ranks - 1) * rest + self.publishing.host_bytes)

    @property
    def device_free(self) -> int:
        """Bytes of a device that stay free at the peak; negative if too many are needed. On a CPU, of the node."""
        if self.cluster.on_cpu:
            return self.cluster.device_memory - self.node_host_bytes
        return self.cluster.device_memory - self.device_peak.device_bytes

    @property
    def host_free(self) -> int | None:
        memory = self.cluster.host_memory
        return None if memory is None else memory - self.node_host_bytes

    @property
    def fits(self) -> bool:
        return self.device_free >= 0 and (self.host_free is None or self.host_free >= 0)

    @property
    def peak(self) -> Phase:
        """Peak of a rank where it matters: the device's, or the host's on a CPU."""
        return self.host_peak if self.cluster.on_cpu else self.device_peak

    @property
    def largest_item(self) -> tuple[str, int]:
        peak = self.peak
        items = peak.host if self.cluster.on_cpu else peak.device
        return max(items.items(), key=lambda item: item[1])


def plan_stage(stage: str, config: TrainingRecipe, cluster: Cluster, request: Request) -> StagePlan:
    """Plan ``stage`` with its recipe ``config`` on ``cluster``.

    Raises:
        ModelError: if nothing says what shape a model has.
        ConfigError: if the recipe cannot be run like that.
    """
    return _Planner(stage, config, cluster, request).plan()


class _Planner:
    def __init__(self, stage: str, config: TrainingRecipe, cluster: Cluster, request: Request) -> None:
        self._stage, self._config, self._cluster, self._request = stage, config, cluster, request
        self._precision = precision_of_plan(config, cluster)
        self._size = SIZES[self._precision]
        self._workload = config.workload
        self._roles = roles_of(config, cluster, request.sources)
        self._notes = list(self._roles.notes)

    def plan(self) -> StagePlan:
        lengths = self._lengths()
        batches = self._batches(lengths)
        states = {role.name: self._states(role, batches) for role in self._roles.all}
        works = {role.name: self._work(role, batches.load) for role in self._roles.all}
        phases = [*self._loading(states), *self._steps(states, works, lengths)]
        return StagePlan(
            stage=self._stage,
            config=self._config,
            cluster=self._cluster,
            precision=self._precision,
            roles=self._roles,
            states=states,
            phases=tuple(on_this_machine(phase, on_cpu=self._cluster.on_cpu) for phase in phases),
            publishing=self._publishing(states),
            batches=batches,
            lengths=lengths,
            notes=tuple(self._notes),
        )

    # Batches

    def _lengths(self) -> Lengths:
        rollout = self._workload.rollout
        return lengths_of(
            self._workload,
            self._roles.main.recipe.backbone,
            step_items=self._config.train.global_batch_size if rollout is None else rollout.prompts,
            rows=self._request.rows,
            mean_tokens=self._request.mean_tokens,
        )

    def _batches(self, lengths: Lengths) -> BatchPlan:
        rollout = self._workload.rollout
        if rollout is not None:
            return self._rollout_batches(lengths, rollout)
        return batch_plan(
            lengths.values,
            self._config.train,
            ranks=self._cluster.ranks,
            known_items=lengths.known_items,
            lengths_from=lengths.origin,
        )

    def _rollout_batches(self, lengths: Lengths, rollout: RolloutLoad) -> BatchPlan:
        """Minibatches of rollouts that all run to the limit; epochs and steps are counted in prompts."""
        from rlhf.train.stage import total_steps

        train = self._config.train
        rows = np.repeat(lengths.values, rollout.samples, axis=0) + rollout.max_new_tokens
        found = batch_plan(rows, train, ranks=self._cluster.ranks, known_items=False, lengths_from=lengths.origin)
        if not lengths.known_items:
            return found
        count = len(lengths.values)
        steps = total_steps(replace(train, global_batch_size=rollout.prompts), count)
        an_epoch = steps_per_epoch(count, rollout.prompts, train.last_batch)
        return replace(found, items=count, steps_per_epoch=an_epoch, total_steps=steps)

    # Memory

    def _states(self, role: Role, batches: BatchPlan) -> States:
        return role.states(
            size=self._size,
            ranks=self._cluster.ranks,
            micro_batches=batches.most_micro_batches,
            on_cpu=self._cluster.on_cpu,
        )

    def _work(self, role: Role, load: Load) -> Work:
        from rlhf.core.logprobs import CHUNK_TOKENS

        return work_of(
            role.model,
            load,
            size=self._size,
            attention=role.attention,
            checkpointing=role.checkpointing,
            on_cpu=self._cluster.on_cpu,
            chunk_tokens=CHUNK_TOKENS,
        )

    def _loading(self, states: dict[str, States]) -> list[Phase]:
        """Models are loaded one after the other, whole and on the CPU of each rank; DeepSpeed first puts all of one
        on its device, whatever the stage, and then shares it out."""
        phases: list[Phase] = []
        there: list[Phase] = []
        for role in (each for each in self._roles.loading if each.loaded):
            whole = self._size * role.model.total
            host = {f"{role.name}: weights as loaded": whole}
            on_host = Phase(name=f"{role.name}: loading", device={}, host=host)
            on_device = Phase(name=f"{role.name}: placing", device={f"{role.name}: weights whole": whole}, host={})
            new = [on_host] if self._cluster.on_cpu else [on_host, on_device]
            phases += beside(new, there)
            first = states[role.name]
            there.append(resting(role.name, replace(first, moments={})))
        return phases

    def _steps(self, states: dict[str, States], works: dict[str, Work], lengths: Lengths) -> list[Phase]:
        roles, rollout = self._roles, self._workload.rollout
        phases = []
        for role in roles.asked:
            # A cache is filled before the first step, beside states without moments.
            there = [self._rest(each, states, role.stays) for each in roles.trained]
            there += [self._rest(each, states, True) for each in roles.asked if each is not role and each.stays]
            phases += beside([forward_phase(role.name, states[role.name], works[role.name], trained=False)], there)
        copy = [] if rollout is None else [self._rollout_copy(rollout)]
        if rollout is not None:
            phases += self._rollout(states, lengths, rollout, copy)
        for role in roles.trained:
            there = [self._rest(each, states, True) for each in roles.all if each is not role and each.stays]
            own = training_phases(role.name, states[role.name], works[role.name], on_cpu=self._cluster.on_cpu)
            phases += beside(own, [*there, *copy])
        return phases

    def _rest(self, role: Role, states: dict[str, States], trained: bool) -> Phase:
        found = states[role.name]
        return resting(role.name, found if trained else replace(found, moments={}))

    def _rollout(
        self, states: dict[str, States], lengths: Lengths, rollout: RolloutLoad, copy: list[Phase]
    ) -> list[Phase]:
        """Responses are written beside all resting models."""
        policy = self._roles.main
        rows = min(rollout.batch_rows, -(-rollout.prompts * rollout.samples // self._cluster.ranks))
        room = int(lengths.values.max()) + rollout.max_new_tokens
        shape = policy.model.shape
        items = {
            "rollout: KV cache": cache_bytes(shape, rows, room, size=self._size),
            "rollout: logits": next_token_bytes(shape, rows),
            "policy: gathered weights": 0 if self._gathers_once(rollout) else states[policy.name].gathered,
        }
        there = [self._rest(role, states, True) for role in self._roles.all if role.stays]
        return beside([Phase(name="rollout", device=items)], [*there, *copy])

    def _gathers_once(self, rollout: RolloutLoad) -> bool:
        zero = self._roles.main.zero
        return zero is not None and zero.stage == 3 and rollout.gather != "never"

    def _rollout_copy(self, rollout: RolloutLoad) -> Phase:
        """A whole copy of the policy to sample from, under ZeRO-3; auto is taken to find the memory for it."""
        whole = self._size * self._roles.main.model.total
        too_large = rollout.gather == "auto" and whole > COPY_SHARE * self._cluster.device_memory
        if not self._gathers_once(rollout) or too_large:
            return Phase(name="copy", device={})
        return Phase(name="copy", device={"rollout: copy of the policy": whole})

    def _publishing(self, states: dict[str, States]) -> Phase | None:
        """The main rank collects all weights, rebuilds the model with them, and a fresh process reads it again."""
        if self._config.train.publish == "none":
            return None
        main = self._roles.main
        whole = self._size * main.model.total
        base = HOST_BASE_CPU if self._cluster.on_cpu else HOST_BASE_CUDA
        items = {
            f"{main.name}: all weights collected": whole,
            f"{main.name}: model to be saved": whole,
            "fresh process that reads it again": base + 2 * whole if self._size == 2 else base + whole,
        }
        there = [self._rest(role, states, True) for role in self._roles.all if role.stays]
        (phase,) = beside([Phase(name="publishing", device={}, host=items)], there)
        return on_this_machine(phase, on_cpu=self._cluster.on_cpu)


def checkpoint_bytes(plan: StagePlan) -> int:
    """Bytes of one checkpoint, over all ranks: trained weights, float32 master copies and moments.

    Weights that are not trained are left out (engine.save excludes them); ZeRO-0 in float32 has no master copy.
    """
    total = 0
    for role in plan.roles.trained:
        zero = role.zero
        master = 0 if plan.size == 4 and zero is not None and zero.stage in (0, 3) else 4
        total += role.model.trainable * (plan.size + master + 8)
    return total


def disk(plan: StagePlan) -> dict[str, int]:
    """Bytes that the run folder (and the reference cache) grow to, at most."""
    train, workload, one = plan.config.train, plan.workload, checkpoint_bytes(plan)
    found = {f"{train.keep_checkpoints} latest checkpoints": train.keep_checkpoints * one}
    if workload.rows.eval_share or workload.rows.eval_sources:
        found["best checkpoint"] = one
    found["a checkpoint being written"] = one
    if train.publish != "none":
        found["final/"] = plan.size * plan.roles.main.model.total
    if workload.cached_numbers and plan.batches.items is not None:
        rows = plan.batches.items * workload.rows_per_item
        found["reference cache"] = rows * workload.cached_numbers * FLOAT32
    return found
