"""Data loading: files of preferences, conversations and prompts become token batches."""
