"""What Transformers calls the part of a sequence classifier that makes a score."""

HEAD_NAMES = ("score", "classifier")
"""Of decoders, and of encoders."""
