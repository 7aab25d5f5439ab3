"""Reward models, and policies as the reward models that they imply, on benchmarks of labeled answers."""
