"""What Transformers calls the part of a sequence classifier that makes a score."""

HEAD_NAMES = ("score", "classifier")
"""The names that decoders and encoders have for it."""
