"""``rlhf evaluate win-rate``: which of two files of answers a judge prefers."""
