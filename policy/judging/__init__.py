"""Judges behind OpenAI-compatible endpoints, as win rates and grades ask them."""
