"""What runs in vLLM's environment: it knows nothing of this toolkit, whose packages need not be there."""
