"""DeepSpeed JSON by role and ZeRO stage; see README.md beside it."""
