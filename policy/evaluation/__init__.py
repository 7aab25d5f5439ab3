"""Policies compared by the reward of fresh samples."""
