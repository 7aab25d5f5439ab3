"""Backbones, adapters, heads, and the folders they are loaded from and published to."""
