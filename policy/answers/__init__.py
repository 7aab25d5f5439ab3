"""``rlhf generate``: the answers of a policy to a file of questions, in the formats that benchmarks read."""
