"""``rlhf evaluate grades``: a judge grades every answer by itself, as MT-Bench does."""
