"""``rlhf evaluate tax``: what training has cost elsewhere, by tasks of lm-eval before and after."""
