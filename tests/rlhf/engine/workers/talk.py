"""Two ranks that try every way of telling each other something."""

import torch

from rlhf.core.errors import DataError
from rlhf.engine.ranks import RemoteError, start_ranks, stop_ranks

ranks = start_ranks()
me = ranks.rank
gathered = ranks.gather_rows(torch.arange(6.0).reshape(3, 2) if me else torch.empty(0, 2))
assert gathered.tolist() == [[0, 1], [2, 3], [4, 5]], gathered
assert ranks.gather_rows(torch.full((me + 1, 1), float(me))).flatten().tolist() == [0, 1, 1]
assert ranks.sum(torch.tensor([1.0, float(me)])).tolist() == [2, 1]
assert ranks.any(me == 1) and not ranks.any(False)
assert ranks.on_main(lambda: f"from {me}") == "from 0"

order = []
ranks.main_first(lambda: order.append(me))
assert order == [me]


def fail_on_one():
    if me == 1:
        raise DataError("row 7 is bad")


try:
    ranks.together(fail_on_one)
    raise SystemExit("nobody raised")
except RemoteError as error:
    assert me == 0 and str(error) == "rank 1 failed: DataError: row 7 is bad", error
except DataError:
    assert me == 1
stop_ranks()
