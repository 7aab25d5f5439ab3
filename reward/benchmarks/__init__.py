"""Benchmarks of reward models: their files, their published formulas, and what is reported."""
