"""From files of preferences to token batches."""
