"""The optimizer loop that the stages share, and what watches it."""
