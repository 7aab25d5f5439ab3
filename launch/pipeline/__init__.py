"""Stages one after the other, from one recipe."""
