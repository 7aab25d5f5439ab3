"""``rlhf evaluate win-rate``: two policies' answers to the same questions, compared pair by pair by a judge."""
