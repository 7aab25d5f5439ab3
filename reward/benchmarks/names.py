"""The benchmarks of reward models by name."""

PAIRS = "pairs"
NAMES = {
    PAIRS: "any file of preference pairs",
    "hh": "Anthropic's helpful and harmless pairs",
    "rewardbench": "RewardBench: four sections of pairs, and prior sets",
    "rewardbench2": "RewardBench 2: best of four answers, and Ties",
    "rm-bench": "RM-Bench: three styles of a right answer against three of a wrong one",
    "judgebench": "JudgeBench: pairs with a checked solution",
    "ppe": "PPE: pairs decided by people, or many answers with a checked solution",
}
"""What each of them is."""
