"""``rlhf evaluate best-of-n``: what a reward model chooses among several samples, and what that is worth."""
