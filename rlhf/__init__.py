"""The toolkit that every stage stands on. It knows no stage, and importing it imports nothing."""
