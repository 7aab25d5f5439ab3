"""Expected seconds of a plan, from a stated rate. Evaluation, checkpoints, communication and loading come on top."""

from launch.plan.compute import decode_seconds, head_flops, layer_flops, training_flops
from launch.plan.planner import StagePlan
from launch.plan.recipes import Role

HEAD_SHARE = 0.5
"""Of the tokens of a row that its output projection reads, taken as responses, where only lengths are known."""


def step_seconds(plan: StagePlan) -> dict[str, float]:
    """Seconds of one step (of PPO: one round of rollouts and updates) by part; empty without a rate."""
    rate = plan.cluster.rate
    if rate is None:
        return {}
    everything = rate * plan.cluster.ranks
    if plan.stage == "ppo":
        return _ppo_seconds(plan, everything)
    found = {"training": _training_flops(plan, plan.roles.main) / everything}
    live = [role for role in plan.roles.asked if role.asked]
    if live:
        found["reference"] = _forward_flops(plan, live[0]) / everything
    if getattr(plan.config, "over_all_pairs", False):
        found["first pass over the batch"] = _forward_flops(plan, plan.roles.main) / everything
    return found


def reference_seconds(plan: StagePlan) -> float | None:
    """Of the pass that fills the reference cache, once for the data; ``None`` if there is none or nobody knows."""
    config, rate = plan.config, plan.cluster.rate
    if plan.stage != "preference" or not config.loss.needs_reference or config.reference.kind == "live":
        return None
    if rate is None or plan.batches.steps_per_epoch is None:
        return None
    asked = plan.roles.asked[0] if plan.roles.asked else plan.roles.main
    return plan.batches.steps_per_epoch * _forward_flops(plan, asked) / (rate * plan.cluster.ranks)


def run_seconds(plan: StagePlan) -> float | None:
    """Of all steps, and of the reference cache."""
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


def _ppo_seconds(plan: StagePlan, everything: float) -> dict[str, float]:
    """A step's rollouts are all its minibatches together, gone through once by every model that is asked."""
    config, roles = plan.config, plan.roles
    passes = config.minibatches
    asked = [role for role in roles.asked if role.asked]
    measured = sum(_forward_flops(plan, role) for role in (*asked, *roles.trained))
    updates = config.loss.epochs * passes
    found = {
        "rollout, at least": _rollout_seconds(plan),
        "scores, log-probabilities, values": passes * measured / everything,
    }
    found |= {f"{role.name}: updates": updates * _training_flops(plan, role) / everything for role in roles.trained}
    return found


def _rollout_seconds(plan: StagePlan) -> float:
    config, cluster = plan.config, plan.cluster
    rows = -(-config.rollouts // cluster.ranks)
    together = min(rows, config.rollout.batch_rows)
    model = plan.roles.main.model
    head = model.shape.vocabulary * model.shape.hidden
    once = decode_seconds(
        model.shape,
        model.matrix_parameters + head,
        rows=together,
        prompt_tokens=float(plan.lengths.values.mean()),
        new_tokens=config.rollout.max_new_tokens,
        size=plan.size,
        flops=cluster.rate,
        bandwidth=cluster.bandwidth,
    )
    return once * -(-rows // together)
