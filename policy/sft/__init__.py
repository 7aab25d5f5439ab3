"""Supervised fine-tuning: the likelihood of the assistant turns of conversations."""
