"""Expected seconds of a plan, from a stated rate. Evaluation, checkpoints, communication and loading come on top.

A forward pass over n tokens in rows of T_r takes, for P numbers in the matrices of L layers, a query width of A, hidden
states of width D and a vocabulary of V, if m tokens (those of responses) pass the output projection:

    2 P n  +  2 L A sum_r T_r^2 (causal: half of the square)  +  2 V D m

A backward pass takes once that for the gradients of activations, and once for those of the weights where they are
trained; checkpointing adds a forward pass of the layers, and rlhf.core.logprobs projects once more.

References:
    Kaplan et al. (2020), arXiv:2001.08361, section 2.1.
"""

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
    everything, roles = rate * plan.cluster.ranks, plan.roles
    rollout = plan.workload.rollout
    asked = {role.name: _forward_flops(plan, role) / everything for role in roles.asked if role.stays}
    training = {role.name: _training_flops(plan, role) / everything for role in roles.trained}
    if rollout is None:
        found = {"training": sum(training.values()), **asked}
        if plan.workload.first_pass:
            found["first pass over the batch"] = _forward_flops(plan, roles.main) / everything
        return found
    # A step's rollouts are all its minibatches together, gone through once by every model that is asked.
    passes = -(-rollout.prompts * rollout.samples // plan.config.train.global_batch_size)
    measured = sum(asked.values()) + sum(_forward_flops(plan, role) for role in roles.trained) / everything
    updates = rollout.epochs * passes
    return {
        "rollout, at least": _rollout_seconds(plan, rollout, rate),
        "scores, log-probabilities, values": passes * measured,
        **{f"{name}: updates": updates * seconds for name, seconds in training.items()},
    }


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


def _forward_flops(plan: StagePlan, role: Role) -> float:
    """Operations of a step's forward passes."""
    return _layer_flops(plan, role) + _head_flops(plan, role)


def _training_flops(plan: StagePlan, role: Role) -> float:
    """Operations of a step's forward and backward passes; with LoRA the matrices need no gradient."""
    model = role.model
    active = model.active_layers / model.shape.layers
    passes = 1.0 + active * (1.0 + (model.trained == "full") + role.checkpointing)
    return _layer_flops(plan, role) * passes + _head_flops(plan, role) * (4.0 if model.head_trained else 2.0)


def _layer_flops(plan: StagePlan, role: Role) -> float:
    """Operations of all layers forward, for all rows of a step."""
    model, batches = role.model, plan.batches
    attention = 2.0 * model.shape.layers * model.shape.query_width * batches.squares_per_step
    return 2.0 * model.matrix_parameters * batches.computed_per_step + attention


def _head_flops(plan: StagePlan, role: Role) -> float:
    """Operations of the output projection forward, for all rows of a step."""
    tokens = HEAD_SHARE * plan.batches.tokens_per_step if role.model.kind == "language model" else 0.0
    return 2.0 * role.model.shape.vocabulary * role.model.shape.hidden * tokens


def _rollout_seconds(plan: StagePlan, rollout: RolloutLoad, rate: float) -> float:
    """Seconds in which each rank writes its share of a step's responses.

    A token of all rows that are decoded together reads all weights and the cache once, and multiplies: the slower of
    ``bytes / bandwidth`` and ``2 P rows / flops``. Launches of small kernels come on top, so this is a lower bound;
    rows that end early make it less.
    """
    model, bandwidth = plan.roles.main.model, plan.cluster.bandwidth
    rows = -(-rollout.prompts * rollout.samples // plan.cluster.ranks)
    together = min(rows, rollout.batch_rows)
    parameters = model.matrix_parameters + model.shape.vocabulary * model.shape.hidden
    mean_tokens = float(plan.lengths.values.mean()) + rollout.max_new_tokens / 2
    cache = 2.0 * model.shape.layers * model.shape.kv_width * plan.size * together * mean_tokens
    reading = 0.0 if bandwidth is None else (plan.size * parameters + cache) / bandwidth
    multiplying = 2.0 * parameters * together / rate
    return rollout.max_new_tokens * max(reading, multiplying) * -(-rows // together)
