"""Preference pairs of which a share has chosen and rejected swapped, to see what wrong labels do.

python benchmarks/swap_labels.py launch/quickstart/sentiment_pairs_train.jsonl --share 0.2 --seed 0 -o swapped.jsonl
"""

import argparse
import json
import random
from pathlib import Path

from rlhf.core.files import write_text

SIDES = {"chosen": "rejected", "rejected": "chosen"}


def swapped(row: dict) -> dict:
    """The pair with all columns of the two answers changing places, as ``chosen`` and ``chosen_score`` do."""
    others = {name: next((name.replace(side, SIDES[side]) for side in SIDES if side in name), name) for name in row}
    return {name: row[other] for name, other in others.items()}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="lines of JSON with the columns chosen and rejected")
    parser.add_argument("--share", type=float, default=0.2, help="of the pairs (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which of them (default %(default)s)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    return parser


def main() -> None:
    parser = build_parser()
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        parser.error(f"--share {options.share}: expected a number from 0 to 1")
    try:
        rows = [json.loads(line) for line in options.pairs.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        parser.error(f"{options.pairs}: expected a file with a pair in each line, as JSON: {error}")
    taken = set(random.Random(options.seed).sample(range(len(rows)), round(options.share * len(rows))))
    rows = [swapped(row) if place in taken else row for place, row in enumerate(rows)]
    write_text(options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{options.output}: {len(rows)} pairs, {len(taken)} of them swapped")


if __name__ == "__main__":
    main()
