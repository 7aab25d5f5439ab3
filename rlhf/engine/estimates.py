"""What DeepSpeed itself expects model states to take: its own rules of thumb, for half precision and AdamW."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """Bytes of model states."""

    device: int
    """Bytes on each device."""
    host: int
    """Bytes on each node, DeepSpeed's safety factor of 1.5 included."""


def estimated_states(
    parameters: int,
    *,
    stage: int,
    devices_per_node: int,
    nodes: int,
    largest_layer: int,
    optimizer_on_host: bool = False,
    weights_on_host: bool = False,
) -> Estimate | None:
    """DeepSpeed's estimate of weights, gradients and optimizer states, if all ``parameters`` are trained.

    Returns:
        ``None`` for stages 0 and 1, for which it has no rule.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    shape = {"num_gpus_per_node": devices_per_node, "num_nodes": nodes}
    if stage == 2:
        host, device = estimate_zero2_model_states_mem_needs(parameters, **shape, cpu_offload=optimizer_on_host)
        return Estimate(int(device), int(host))
    if stage == 3:
        host, device, _ = estimate_zero3_model_states_mem_needs(
            parameters,
            largest_layer,
            **shape,
            cpu_offload=optimizer_on_host,
            cpu_offload_params=weights_on_host,
            zero_init=False,
        )
        return Estimate(int(device), int(host))
    return None
