"""Reinforcement learning from a reward: roll out, score, estimate advantages, update."""
