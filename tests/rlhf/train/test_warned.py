"""Warnings of our own packages are kept in the run folder, with the step; others are not."""

import json
import logging

from rlhf.train.warned import keeping_warnings


def test_warnings_of_our_own_are_kept_with_the_step(tmp_path):
    step = 0
    with keeping_warnings(tmp_path, lambda: step):
        logging.getLogger("policy.tripwires").warning("step %d: raise x", 3)
        step = 5
        logging.getLogger("rlhf.train.loop").error("worse")
        logging.getLogger("rlhf.train.loop").info("no news")
        logging.getLogger("urllib3").warning("somebody else's")
    logging.getLogger("rlhf.train.loop").warning("after the run")
    rows = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [(row["step"], row["from"], row["text"]) for row in rows] == [
        (0, "policy.tripwires", "step 3: raise x"),
        (5, "rlhf.train.loop", "worse"),
    ]


def test_a_folder_that_is_gone_is_no_fault(tmp_path):
    with keeping_warnings(tmp_path / "gone", lambda: 0):
        logging.getLogger("reward").warning("anything")
    assert not (tmp_path / "gone").exists()
