"""Ranks, ZeRO stages, precision and checkpoints: the only place that knows DeepSpeed."""
