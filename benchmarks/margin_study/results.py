"""Results of studies as one tidy file, which rlhf study compares: a row for each test pair of each run."""

import csv
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from rlhf.core.files import write_text

HEADINGS = ("part", "variant", "seed", "row", "prompt", "value")


def write_results(
    path: pathlib.Path, runs: Iterable[tuple[str, str, int, Mapping[str, str]]], prompts: Mapping[str, Sequence[int]]
) -> None:
    """Write the file.

    Args:
        path: of the CSV.
        runs: part, variant, seed and by test set the marks of the pairs: 2 right, 1 tie, 0 wrong.
        prompts: numbers of the pairs' prompts by test set.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADINGS)
    for part, variant, seed, right in runs:
        for split, marks in right.items():
            name = f"{part}, {split.removesuffix('_test').upper()}"
            for row, (mark, prompt) in enumerate(zip(marks, prompts[split], strict=True)):
                writer.writerow((name, variant, seed, f"{split}:{row}", f"{split} {prompt}", int(mark) / 2))
    write_text(path, text.getvalue())
