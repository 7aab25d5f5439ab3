"""The quickstart's corpus: our own prompts, a small model's completions, a known gold reward."""
