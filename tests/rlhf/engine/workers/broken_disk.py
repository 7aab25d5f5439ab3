"""Two ranks, one of which meets an error of its disk: python broken_disk.py FOLDER. Neither may wait for the other."""

import sys
from pathlib import Path

from rlhf.engine import checkpoint
from rlhf.engine.checkpoint import CheckpointStore
from rlhf.engine.ranks import RemoteError, start_ranks, stop_ranks
from rlhf.train.metrics import MetricLog, SkipLog
from rlhf.train.options import TrainConfig

PLAIN = TrainConfig(tensorboard=False)
ranks = start_ranks()
folder = Path(sys.argv[1])


def fails(where, action):
    """Every rank raises: the one with the error that of its disk, the other one in its name."""
    try:
        action()
    except RemoteError as error:
        assert ranks.rank != where and f"rank {where} failed: " in str(error), error
    except OSError:
        assert ranks.rank == where
    else:
        raise SystemExit(f"rank {ranks.rank} did not raise")


def unreadable(path):
    raise OSError(5, "Input/output error", str(path))


store = CheckpointStore(folder / "checkpoints", ranks, keep=2)
store.save(1, lambda path: (path / f"weights-{ranks.rank}").write_text("w"))
right = checkpoint.file_checksum
if ranks.rank == 1:
    checkpoint.file_checksum = unreadable
fails(1, store.newest_intact)
fails(1, lambda: store.save(2, lambda path: (path / f"weights-{ranks.rank}").write_text("w")))
checkpoint.file_checksum = right
assert store.newest_intact() == store.path(1)

(folder / "metrics.jsonl").mkdir(exist_ok=True)
fails(0, lambda: MetricLog(folder, ranks, PLAIN, recipe="", resume_step=0).__enter__())
log = MetricLog(folder / "good", ranks, PLAIN, recipe="", resume_step=0)
ranks.on_main(lambda: (folder / "good").mkdir(exist_ok=True))
with log:
    log.write(1, {"loss": 1.0})
    if ranks.is_main:
        log._file.close()
        log._file = (folder / "full").open("w")
        log._file.write = lambda text: unreadable(folder / "full")
    fails(0, lambda: log.write(2, {"loss": 1.0}))
(folder / "skipped.jsonl").mkdir(exist_ok=True)
fails(0, lambda: SkipLog(folder, ranks).record(1, [], ["rows.jsonl:1"]))
stop_ranks()
