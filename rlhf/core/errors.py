"""Faults of input. Their message is all that a user sees: commands print it and exit with status 2.

One is no fault: a run that was asked to stop exits with :data:`STOPPED_EXIT_CODE`.
"""

REFUSED_EXIT_CODE = 2
STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: what the run has done is saved, and the same command goes on from there."""
STOP_FILE = "STOP"
"""Name of the file that, put into a run folder, asks the run to save and stop."""


class UserError(Exception):
    """Something the user can mend. The message names the thing, what was found and the way out."""

    exit_code = REFUSED_EXIT_CODE
    of_another_rank = False
    """Only passed on: the rank that broke says why."""


class ConfigError(UserError):
    """A recipe, an override or a DeepSpeed JSON does not describe a valid run."""


class Unmet(ConfigError):
    """The ranks of a run have not met: what happened, each can only say for itself."""


class DataError(UserError):
    """A data source cannot be read, or too many of its rows are unusable."""


class ModelError(UserError):
    """A model folder, tokenizer or template cannot be used for what was asked."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or belongs to another run."""


class DiskFull(UserError):
    """Nothing more can be written."""


class OutOfMemory(UserError):
    """A device or the host has no more memory: the rank that ran out says so, for the others cannot know."""


class TrainingStopped(UserError):
    """The run stopped itself because going on would only waste time (for example non-finite losses in a row)."""


class RunStopped(UserError):
    """The run was asked to stop, by a signal, a file or the clock, and has saved what it had."""

    exit_code = STOPPED_EXIT_CODE

    def __init__(self, reason: str, place: str, step: int = 0) -> None:
        """``place``: where it stopped, in words; ``step``: of its newest checkpoint, 0 where there is none yet."""
        super().__init__(f"stopped {place} by {reason}; the same command goes on from there")
        self.reason, self.step = reason, step
