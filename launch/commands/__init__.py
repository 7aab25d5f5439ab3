"""The commands of ``rlhf``, one file each."""
