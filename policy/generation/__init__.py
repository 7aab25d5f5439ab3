"""Responses drawn from a policy: one protocol, and what implements it."""
