"""Preference pairs of the studies, by split: AlpacaEval's three files, or the one of Anthropic HH, cut in two."""

import gzip
import json
import pathlib

import numpy as np

from rlhf.data.messages import BadRow
from rlhf.data.options import ColumnConfig
from rlhf.data.records import to_records

SPLITS = {"alpaca": ("train", "id_test", "ood_test"), "hh": ("train", "id_test")}
"""Splits of each data set; the first one is trained on."""
TEST_SHARE = 0.2
"""Share of HH's conversations, by how they open: no test pair begins as a training pair does."""
_HH = "hh_harmless_base_test.jsonl.gz"


def read_pairs(folder: pathlib.Path, data_set: str, split: str) -> list[dict]:
    """Rows with ``prompt``, ``chosen`` and ``rejected`` as messages, ``chosen_score`` and ``rejected_score``.

    HH has no scores: there, what annotators prefer has 1, and the other answer 0. Rows with an empty answer are left
    out.
    """
    if data_set == "alpaca":
        return _lines(folder / f"alpaca_eval_pairs_{split}.jsonl.gz")
    pairs = []
    for number, line in enumerate(_lines(folder / _HH), start=1):
        try:
            [record], _ = to_records(line, ColumnConfig(), row_id=f"{_HH}:{number}", source=_HH)
        except BadRow:
            continue
        sides = {side: list(getattr(record, side)) for side in ("prompt", "chosen", "rejected")}
        pairs.append({**sides, "chosen_score": 1.0, "rejected_score": 0.0})
    openings = [pair["prompt"][0]["content"] for pair in pairs]
    names = sorted(set(openings))
    shuffled = np.random.default_rng(0).permutation(len(names))
    tests = {names[place] for place in shuffled[: round(TEST_SHARE * len(names))]}
    return [pair for pair, opening in zip(pairs, openings, strict=True) if (opening in tests) == (split != "train")]


def _lines(path: pathlib.Path) -> list[dict]:
    if not path.is_file():
        raise SystemExit(f"study: {path} is missing; --data is the folder that holds it")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
