"""Reward models behind an address: a server, what vLLM needs to be one, clients, and the proof of their scores."""
