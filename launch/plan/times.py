"""Expected seconds of a plan, from a stated rate. Evaluation, checkpoints, communication and loading come on top."""

from launch.plan.compute import decode_seconds, head_flops, layer_flops, training_flops
from launch.plan.planner import StagePlan
from launch.plan.roles import Role
from rlhf.train.workload import RolloutLoad

HEAD_SHARE = 0.5
"""Share of a row's tokens that its output projection reads, as responses, where only lengths are known."""


def step_seconds(plan: StagePlan) -> dict[str, float]:
    """Seconds of one step (of PPO: one round of rollouts and updates) by part; empty without a rate."""
    rate = plan.cluster.rate
    if rate is None:
        return {}
    everything = rate * plan.cluster.ranks
    rollout = plan.workload.rollout
    if rollout is not None:
        return _rollout_step_seconds(plan, rollout, everything)
    found = {"training": sum(_training_flops(plan, role) for role in plan.roles.trained) / everything}
    found |= {role.name: _forward_flops(plan, role) / everything for role in plan.roles.asked if role.stays}
    if plan.workload.first_pass:
        found["first pass over the batch"] = _forward_flops(plan, plan.roles.main) / everything
    return found


def reference_seconds(plan: StagePlan) -> float | None:
    """Seconds of the pass that fills the reference cache, once for the data; ``None`` without one, or if not known."""
    fills = [role for role in plan.roles.asked if not role.stays]
    rate = plan.cluster.rate
    if not fills or rate is None or plan.batches.steps_per_epoch is None:
        return None
    flops = sum(_forward_flops(plan, role) for role in fills)
    return plan.batches.steps_per_epoch * flops / (rate * plan.cluster.ranks)


def run_seconds(plan: StagePlan) -> float | None:
    """Seconds of all steps, and of the reference cache."""
    parts = step_seconds(plan)
    if not parts or plan.batches.total_steps is None:
        return None
    return plan.batches.total_steps * sum(parts.values()) + (reference_seconds(plan) or 0.0)


def _training_flops(plan: StagePlan, role: Role) -> float:
    batches, model = plan.batches, role.model
    return training_flops(
        model.shape,
        model.matrix_parameters,
        batches.padded_per_step,
        batches.squares_per_step,
        HEAD_SHARE * batches.tokens_per_step if model.kind == "language model" else 0.0,
        active_share=model.active_layers / model.shape.layers,
        weights_trained=model.trained == "full",
        head_trained=model.head_trained,
        checkpointing=role.checkpointing,
    )


def _forward_flops(plan: StagePlan, role: Role) -> float:
    batches, model = plan.batches, role.model
    layers = layer_flops(model.shape, model.matrix_parameters, batches.padded_per_step, batches.squares_per_step)
    has_head = model.kind == "language model"
    return layers + (head_flops(model.shape, HEAD_SHARE * batches.tokens_per_step) if has_head else 0.0)


def _rollout_step_seconds(plan: StagePlan, rollout: RolloutLoad, everything: float) -> dict[str, float]:
    """A step's rollouts are all its minibatches together, gone through once by every model that is asked."""
    roles = plan.roles
    passes = -(-rollout.prompts * rollout.samples // plan.config.train.global_batch_size)
    asked = [role for role in roles.asked if role.stays]
    measured = sum(_forward_flops(plan, role) for role in (*asked, *roles.trained))
    updates = rollout.epochs * passes
    found = {
        "rollout, at least": _rollout_seconds(plan, rollout),
        "scores, log-probabilities, values": passes * measured / everything,
    }
    found |= {f"{role.name}: updates": updates * _training_flops(plan, role) / everything for role in roles.trained}
    return found


def _rollout_seconds(plan: StagePlan, rollout: RolloutLoad) -> float:
    cluster = plan.cluster
    assert cluster.rate is not None
    rows = -(-rollout.prompts * rollout.samples // cluster.ranks)
    together = min(rows, rollout.batch_rows)
    model = plan.roles.main.model
    head = model.shape.vocabulary * model.shape.hidden
    once = decode_seconds(
        model.shape,
        model.matrix_parameters + head,
        rows=together,
        prompt_tokens=float(plan.lengths.values.mean()),
        new_tokens=rollout.max_new_tokens,
        size=plan.size,
        flops=cluster.rate,
        bandwidth=cluster.bandwidth,
    )
    return once * -(-rows // together)
