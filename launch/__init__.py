"""Commands, recipes and scripts."""
