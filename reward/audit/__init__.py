"""Which labels of preference pairs look wrong: out-of-fold margins over frozen features, and what they say."""
