"""Runs of the reward stage as judges: each is trained on all folds but one, and judges that one."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reward.audit.margins import folds_of
from rlhf.core.errors import DataError, UserError
from rlhf.core.files import write_text
from rlhf.data.records import PreferenceRecord

JUDGES = "judges"
TRAINING, JUDGED = "training.jsonl", "judged.jsonl"
HELD_OUT, DONE = "held_out.jsonl", "done.json"


def start_stage(arguments: Sequence[str], log: Path) -> int:
    """Run the reward stage in a process of its own; what it says goes into ``log``."""
    with log.open("a", encoding="utf-8") as output:
        return subprocess.run(
            [sys.executable, "-m", "reward", *arguments], stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode


def margins_by_runs(
    records: Sequence[PreferenceRecord],
    groups: NDArray[np.uint64],
    recipe: Path,
    settings: Sequence[str],
    output: Path,
    *,
    folds: int,
    repeats: int,
    seed: int,
    advance: Callable[[int], None],
    start: Callable[[Sequence[str], Path], int] = start_stage,
) -> NDArray[np.float64]:
    """``(repeats, N)`` out-of-fold margins of pairs, by runs of the reward stage.

    Every run has a folder below ``output``; those that are done are not made again, one that was stopped goes on.

    Args:
        records: N pairs.
        groups: ``(N,)`` equal for pairs that are in the same fold.
        recipe: of the reward stage; with model.lora, or few layers, judges cost little.
        settings: ``key=value`` on top of it.
        output: of the audit.
        folds, repeats: how the pairs are dealt out, and how often.
        seed: of the folds.
        advance: told after each run that one more is done.
        start: runs the stage with arguments, and gives its exit code.
    Raises:
        UserError: if a run fails, naming its log.
        DataError: if a run left pairs out.
    """
    lines = [_line(record) for record in records]
    margins = np.full((repeats, len(records)), np.nan)
    for repeat in range(repeats):
        fold_of = folds_of(groups, folds, seed * 1000 + repeat)
        for fold in range(folds):
            here = np.flatnonzero(fold_of == fold)
            folder = output / JUDGES / f"repeat-{repeat}" / f"fold-{fold}"
            parts = {TRAINING: np.flatnonzero(fold_of != fold), JUDGED: here}
            _write(folder, {name: "".join(lines[place] for place in places) for name, places in parts.items()})
            run = folder / "run"
            if not (run / DONE).is_file():
                own = [f"data.train={folder / TRAINING}", f"data.eval={folder / JUDGED}", f"output={run}"]
                own += ["data.max_eval_pairs=null", "train.publish=none", "train.tensorboard=false"]
                code = start(["--config", str(recipe), *settings, *own], folder / "log.txt")
                if code:
                    raise UserError(f"{run}: this judge ended with exit code {code}; see {folder / 'log.txt'}")
            margins[repeat, here] = _margins(run / HELD_OUT, len(here))
            advance(1)
    return margins


def _line(record: PreferenceRecord) -> str:
    row = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write(folder: Path, texts: dict[str, str]) -> None:
    """Write files that are not there yet.

    Raises:
        DataError: if one is, and holds something else.
    """
    for name, text in texts.items():
        path = folder / name
        if not path.is_file():
            write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise DataError(f"{path}: of another audit (other pairs, folds or --seed); give another folder with -o")


def _margins(path: Path, pairs: int) -> NDArray[np.float64]:
    """``(n,)`` by the line of the judged file that a row is from.

    Raises:
        DataError: if a pair has none.
    """
    found = np.full(pairs, np.nan)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[int(row["row"].rpartition(":")[2]) - 1] = row["chosen_reward"] - row["rejected_reward"]
    missing = np.flatnonzero(~np.isfinite(found))
    if len(missing):
        raise DataError(
            f"{path}: {len(missing)} of {pairs} pairs have no rewards, the first that of line {missing[0] + 1} of "
            f"{JUDGED}: the recipe leaves some out (data.max_tokens with data.over_length)"
        )
    return found
