"""What the declaration of a field says beside its type."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoResult:
    """Marks a field of a recipe as one that changes nothing in what a run publishes: a place, a log, a limit of time.

    It stands outermost: ``field: Annotated[float | None, NoResult()]``. A stage whose recipe differs in such
    fields alone is not done again.
    """


@dataclass(frozen=True)
class Formerly:
    """Names the key that a field had in earlier recipes; whoever still writes it is told the new one.

    It stands outermost, as ``NoResult`` does: ``length_buckets: Annotated[int, Formerly("row_groups")]``.
    """

    key: str
    """The old key, in the same section."""
    entry: str = ""
    """Where the field holds a mapping, the entry of it that took the place of the key."""
