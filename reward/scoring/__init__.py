"""Rows scored by a reward model as a stage: what `rlhf score --keep-rows` writes, for the stages behind it."""
