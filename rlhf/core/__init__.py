"""Numerics, checks, errors and files: no ranks, no config, no model."""
