"""What the declaration of a field says beside its type."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoResult:
    """Marks a field of a recipe as one that changes nothing in what a run publishes: a place, a log, a limit of time.

    It stands outermost: ``field: Annotated[float | None, NoResult()]``. A stage whose recipe differs in such
    fields alone is not done again.
    """
