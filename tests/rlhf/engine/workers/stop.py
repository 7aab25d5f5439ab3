"""``python stop.py FOLDER``: one of two ranks; each says what they agree on. The second one alone gets the signal."""

import os
import signal
import sys
from pathlib import Path

from rlhf.engine.ranks import start_ranks, stop_ranks
from rlhf.engine.stop import STOP_FILE, StopRequests, noting_signals

ranks = start_ranks()
folder = Path(sys.argv[1]) / "run"
ranks.on_main(lambda: folder.mkdir())
requests = StopRequests(folder, ranks, None)

print("agreed", requests.agreed(), flush=True)
with noting_signals():
    if not ranks.is_main:
        os.kill(os.getpid(), signal.SIGTERM)
    print("agreed", requests.agreed(), flush=True)
ranks.on_main(lambda: (folder / STOP_FILE).touch())
print("agreed", requests.agreed(), flush=True)
ranks.barrier()
assert not (folder / STOP_FILE).exists()
stop_ranks()
