"""Preference optimization: objectives on log-probabilities of pairs, without a reward model."""
