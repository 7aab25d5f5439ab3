"""``python -m reward.scoring --config RECIPE.yaml``: rows scored by a reward model, as a stage."""

from reward.scoring.config import SCORED, ScoringConfig
from rlhf.core.leaving import leave
from rlhf.train.single import single_main

DESCRIPTION = "Score rows with a reward model, and write them with its rewards and margins, as later stages read them."


def run(config: ScoringConfig) -> None:
    """Score what is not scored yet.

    Raises:
        DataError: if rows cannot be scored, or the folder holds those of another model or other data.
    """
    from pathlib import Path

    from reward.score import ScoreOptions, score_file
    from rlhf.core.errors import DataError

    config.output.mkdir(parents=True, exist_ok=True)
    output = config.output / SCORED
    options = ScoreOptions(
        model=Path(config.model),
        data=config.data,
        output=output,
        columns=config.columns,
        batch_tokens=config.batch_tokens,
        split=config.split,
        keep_rows=True,
    )
    if faults := score_file(options):
        raise DataError(f"{output}: {faults} rows could not be scored (see their column error): mend or leave them out")
    print(f"scored: {output}")


def main(argv: list[str] | None = None) -> int:
    return single_main(ScoringConfig, run, argv, program="reward.scoring", description=DESCRIPTION)


if __name__ == "__main__":
    leave(main())
