"""Faults of input. Their message is all that a user sees: commands print it and exit with status 2."""


class UserError(Exception):
    """Something the user can mend. The message names the thing, what was found and the way out."""


class ConfigError(UserError):
    """A recipe, an override or a DeepSpeed JSON does not describe a valid run."""


class DataError(UserError):
    """A data source cannot be read, or too many of its rows are unusable."""


class ModelError(UserError):
    """A model folder, tokenizer or template cannot be used for what was asked."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or belongs to another run."""


class TrainingStopped(UserError):
    """The run stopped itself because going on would only waste time (for example non-finite losses in a row)."""
