"""``python -m policy.answers --config RECIPE.yaml``: answers to questions as a stage, on any number of ranks."""

from typing import TYPE_CHECKING

from policy.answers.config import GenerateConfig
from rlhf.core.leaving import leave
from rlhf.train.single import on_all_ranks, single_main

if TYPE_CHECKING:
    from rlhf.engine.ranks import Ranks

DESCRIPTION = "Answer the questions of a benchmark or of a file, and write the answers as benchmarks read them."


def run(config: GenerateConfig) -> None:
    """Answer on the ranks that a launcher has started."""
    on_all_ranks("policy.answers.run", config, answer)


def answer(config: GenerateConfig, ranks: "Ranks") -> None:
    """Every rank must call it; the main one says where the answers are."""
    from policy.answers.run import generate

    found = generate(config, ranks)
    if ranks.is_main:
        print(f"answers: {found}")


def main(argv: list[str] | None = None) -> int:
    return single_main(GenerateConfig, run, argv, program="policy.answers", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
