"""Rollouts by vLLM: engines in processes of their own, and weights that are provably those of training."""
