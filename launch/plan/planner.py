"""The plan of one stage: its phases, batches, times and disk, and whether it fits."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from launch.plan.activations import FLOAT32, cache_bytes, next_token_bytes
from launch.plan.batches import BatchPlan, Layout, Lengths, batch_plan
from launch.plan.cluster import Cluster
from launch.plan.data import lengths_of
from launch.plan.models import Sources
from launch.plan.phases import (
    DEVICE_BASE,
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
    """What one stage needs: all of it follows from the recipe, the cluster and the request. See :func:`plan_stage`."""

    stage: str
    """Its name, for titles."""
    config: TrainingRecipe
    cluster: Cluster
    request: Request

    # What it is made of

    @property
    def precision(self) -> Precision:
        return precision_of_plan(self.config, self.cluster)

    @property
    def size(self) -> int:
        return SIZES[self.precision]

    @property
    def workload(self) -> Workload:
        return self.config.workload

    @cached_property
    def roles(self) -> Roles:
        return roles_of(self.config, self.cluster, self.request.sources)

    @cached_property
    def lengths(self) -> Lengths:
        rollout = self.workload.rollout
        return lengths_of(
            self.workload,
            self.roles.main.recipe.backbone,
            step_items=self.config.train.global_batch_size if rollout is None else rollout.prompts,
            rows=self.request.rows,
            mean_tokens=self.request.mean_tokens,
        )

    @property
    def layout(self) -> Layout:
        """How micro-batches are laid out, if a model that is asked whether it takes packed rows does."""
        if self.config.train.packing == "off" or not self.roles.main.model.packs:
            return "buckets"
        return "rows" if self.cluster.on_cpu else "flex"

    @cached_property
    def batches(self) -> BatchPlan:
        """Steps; of rollouts, minibatches of rows that all run to the limit, with steps counted in prompts."""
        from rlhf.train.stage import total_steps

        train, lengths, rollout = self.config.train, self.lengths, self.workload.rollout
        if rollout is None:
            return batch_plan(lengths, train, ranks=self.cluster.ranks, layout=self.layout)
        rows = np.repeat(lengths.values, rollout.samples, axis=0) + rollout.max_new_tokens
        whole = replace(lengths, values=rows, known_items=False)
        found = batch_plan(whole, train, ranks=self.cluster.ranks, layout=self.layout)
        if not lengths.known_items:
            return found
        count = len(lengths.values)
        steps = total_steps(replace(train, global_batch_size=rollout.prompts), count)
        an_epoch = steps_per_epoch(count, rollout.prompts, train.last_batch)
        return replace(found, items=count, steps_per_epoch=an_epoch, total_steps=steps)

    @cached_property
    def states(self) -> dict[str, States]:
        """Bytes of each model's states on one rank."""
        sizes = {"size": self.size, "ranks": self.cluster.ranks, "micro_batches": self.batches.most_micro_batches}
        return {role.name: role.states(on_cpu=self.cluster.on_cpu, **sizes) for role in self.roles.all}

    # Memory

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        found = [*self._loading(), *self._asking(), *self._rollout(), *self._training(), *self._publishing_in_pieces()]
        return tuple(on_this_machine(phase, on_cpu=self.cluster.on_cpu) for phase in found)

    @cached_property
    def publishing(self) -> Phase | None:
        """Memory of the main rank's host while it publishes.

        It collects all weights, rebuilds the model with them, and a fresh process reads it again. What the ranks share
        it never has but for what goes into one file.
        """
        if self.config.train.publish == "none":
            return None
        main = self.roles.main
        whole = self.size * main.model.total
        base = HOST_BASE_CPU if self.cluster.on_cpu else HOST_BASE_CUDA
        if main.shared_out:
            return on_this_machine(self._main_rank_in_pieces(base), on_cpu=self.cluster.on_cpu)
        items = {
            f"{main.name}: all weights collected": whole,
            f"{main.name}: model to be saved": whole,
            "fresh process that reads it again": base + 2 * whole if self.size == 2 else base + whole,
        }
        (phase,) = beside([Phase(name="publishing", device={}, host=items)], self._resting())
        return on_this_machine(phase, on_cpu=self.cluster.on_cpu)

    def _publishing_in_pieces(self) -> list[Phase]:
        """What every rank has while it publishes what the ranks share: first the trained weights once more, to be asked
        in float32, where they are not so already; then those that were opened again, if one process cannot hold them.
        """
        main = self.roles.main
        if self.config.train.publish == "none" or not main.shared_out:
            return []
        phases = []
        if self.size != FLOAT32:
            phases.append(Phase(name="publishing: comparing", device=self._asked_in_float32(main)))
        if not self._one_process_opens:
            context = {} if self.cluster.on_cpu else {"fresh process: CUDA context and NCCL": DEVICE_BASE}
            opened = {f"fresh process: {name}": size for name, size in self._asked_in_float32(main).items()}
            libraries = {"fresh process: libraries": HOST_BASE_CPU if self.cluster.on_cpu else HOST_BASE_CUDA}
            phases.append(Phase(name="publishing: opening", device=context | opened, host=libraries))
        return beside(phases, self._resting())

    def _asked_in_float32(self, role: Role) -> dict[str, int]:
        """A share of the weights as they are, and those of the widest module whole, in float32 too."""
        share, largest = -(-role.model.total // self.cluster.ranks), role.model.most_gathered
        whole = FLOAT32 if self.size == FLOAT32 else self.size + FLOAT32
        return {f"{role.name}: weights to compare with": self.size * share, f"{role.name}: gathered": whole * largest}

    def _main_rank_in_pieces(self, base: int) -> Phase:
        """What goes into a file, and the largest tensor in float32 when an adapter is merged."""
        from rlhf.models.shards import SHARD_BYTES

        main = self.roles.main
        items = {
            f"{main.name}: weights of a file": min(SHARD_BYTES, self.size * main.model.total),
            f"{main.name}: largest tensor in float32": FLOAT32 * max(main.model.sizes),
        }
        shared = self._asked_in_float32(main) if self.cluster.on_cpu and self.size != FLOAT32 else {}
        writing = Phase(name="publishing", device=shared, host=items)
        opening = Phase(name="publishing", device={}, host={"fresh process that reads it again": base + self._opened})
        found = max(writing, opening, key=lambda each: each.host_bytes + each.device_bytes)
        (phase,) = beside([found if self._one_process_opens else writing], self._resting())
        return phase

    @property
    def _opened(self) -> int:
        """Bytes of the published model in float32."""
        return FLOAT32 * self.roles.main.model.total

    @cached_property
    def _one_process_opens(self) -> bool:
        """Whether one host has memory for that; where its memory is not stated, it is taken to."""
        memory = self.cluster.device_memory if self.cluster.on_cpu else self.cluster.host_memory
        if memory is None:
            return True
        base = HOST_BASE_CPU if self.cluster.on_cpu else HOST_BASE_CUDA
        (rest,) = beside([Phase(name="rest", device={})], self._resting())
        there = on_this_machine(rest, on_cpu=self.cluster.on_cpu).host_bytes * self.cluster.devices_per_node
        return self._opened + base < memory - there

    def _loading(self) -> list[Phase]:
        """Models are loaded one after the other.

        What every rank holds goes whole through the host of each to its device. What ZeRO-3 shares out is only mapped
        into memory, and each rank takes its share of one tensor after the other.
        """
        phases: list[Phase] = []
        there: list[Phase] = []
        for role in (each for each in self.roles.loading if each.loaded):
            if role.shared_out:
                phases += beside([self._sharing_out(role)], there)
                there.append(self._rest(role, trained=False))
                continue
            whole = self.size * role.model.total
            host = {f"{role.name}: weights as loaded": whole}
            on_host = Phase(name=f"{role.name}: loading", device={}, host=host)
            on_device = Phase(name=f"{role.name}: placing", device={f"{role.name}: weights whole": whole}, host={})
            phases += beside([on_host] if self.cluster.on_cpu else [on_host, on_device], there)
            there.append(self._rest(role, trained=False))
        return phases

    def _sharing_out(self, role: Role) -> Phase:
        """The largest tensor is there whole. Those that are trained are gathered once more, on a CPU by gloo, which
        has them twice."""
        own, largest = self._rest(role, trained=False), max(role.model.sizes)
        if self.cluster.on_cpu:
            largest = max(largest, 2 * max(role.model.trained_sizes, default=0))
        largest *= self.size
        device = {**own.device, f"{role.name}: largest tensor": largest}
        return Phase(name=f"{role.name}: start", device=device, host=own.host)

    def _asking(self) -> list[Phase]:
        """Forward passes of models that are only asked; a cache is filled before the first step, without moments."""
        phases = []
        for role in self.roles.asked:
            there = [self._rest(each, trained=role.stays) for each in self.roles.trained]
            there += [self._rest(each) for each in self.roles.asked if each is not role and each.stays]
            phases += beside([forward_phase(role.name, self.states[role.name], self._work(role))], there)
        return phases

    def _rollout(self) -> list[Phase]:
        """Responses are written beside all resting models."""
        rollout, policy = self.workload.rollout, self.roles.main
        if rollout is None:
            return []
        rows = min(rollout.batch_rows, -(-rollout.prompts * rollout.samples // self.cluster.ranks))
        room = int(self.lengths.values.max()) + rollout.max_new_tokens
        items = {
            "rollout: KV cache": cache_bytes(policy.model.shape, rows, room, size=self.size),
            "rollout: logits": next_token_bytes(policy.model.shape, rows),
            "policy: gathered weights": 0 if self._gathers_once(rollout) else self.states[policy.name].gathered,
        }
        merged = self._merged_weights()
        return beside([Phase(name="rollout", device=items | merged)], [*self._resting(), self._rollout_copy()])

    def _merged_weights(self) -> dict[str, int]:
        """The weights that adapters are merged into for a rollout: they lie beside the others, without ZeRO-3."""
        policy = self.roles.main
        size = self.size * policy.model.matrix_parameters
        apart = policy.model.trained != "lora" or policy.shared_out or size > COPY_SHARE * self.cluster.device_memory
        return {} if apart else {"rollout: weights with adapters merged": size}

    def _training(self) -> list[Phase]:
        phases = []
        for role in self.roles.trained:
            own = training_phases(role.name, self.states[role.name], self._work(role), on_cpu=self.cluster.on_cpu)
            phases += beside(own, [*self._resting(but=role), self._rollout_copy()])
        return phases

    def _work(self, role: Role) -> Work:
        from rlhf.core.logprobs import tokens_at_once

        return work_of(
            role.model,
            self.batches.load,
            size=self.size,
            attention="sdpa" if self.layout == "flex" else role.attention,
            fused=role.recipe.backbone.kernels == "liger",
            checkpointing=role.checkpointing,
            on_cpu=self.cluster.on_cpu,
            chunk_tokens=tokens_at_once(role.model.shape.vocabulary),
        )

    def _resting(self, but: Role | None = None) -> list[Phase]:
        """What is there during training, besides the model that works."""
        return [self._rest(role) for role in self.roles.all if role is not but and role.stays]

    def _rest(self, role: Role, trained: bool = True) -> Phase:
        found = self.states[role.name]
        return resting(role.name, found if trained else replace(found, moments={}))

    def _gathers_once(self, rollout: RolloutLoad) -> bool:
        zero = self.roles.main.zero
        return zero is not None and zero.stage == 3 and rollout.gather != "never"

    def _rollout_copy(self) -> Phase:
        """A whole copy of the policy to sample from, under ZeRO-3; auto is taken to find the memory for it."""
        rollout = self.workload.rollout
        whole = self.size * self.roles.main.model.total
        if rollout is None or not self._gathers_once(rollout):
            return Phase(name="copy", device={})
        too_large = rollout.gather == "auto" and whole > COPY_SHARE * self.cluster.device_memory
        return Phase(name="copy", device={} if too_large else {"rollout: copy of the policy": whole})

    # What comes of it

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

    def rank_bytes(self, phase: Phase) -> int:
        """Bytes on a rank where they matter: on the device, or on the host of a CPU."""
        return phase.host_bytes if self.cluster.on_cpu else phase.device_bytes

    @property
    def largest_item(self) -> tuple[str, int]:
        """The largest item of a rank's peak, where it matters."""
        peak = max(self.phases, key=self.rank_bytes)
        return max((peak.host if self.cluster.on_cpu else peak.device).items(), key=lambda item: item[1])


def plan_stage(stage: str, config: TrainingRecipe, cluster: Cluster, request: Request) -> StagePlan:
    """Plan ``stage`` with its recipe ``config`` on ``cluster``.

    Raises:
        ModelError: if nothing says what shape a model has.
        ConfigError: if the recipe cannot be run like that.
    """
    return worked_out(StagePlan(stage=stage, config=config, cluster=cluster, request=request))


def worked_out(plan: StagePlan) -> StagePlan:
    """The plan, after all of it that can be refused has been made; raises as :func:`plan_stage`."""
    _ = plan.phases
    return plan


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
