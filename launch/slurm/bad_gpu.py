"""``python -m launch.slurm.bad_gpu STATUS HOSTFILE``: the node of a rank that broke with a fault of its GPU.

Exit code 1 if none did.
"""

import re
import sys
from pathlib import Path

from launch.jobs.hostfile import read_hostfile
from rlhf.train.status import read_status

FAULT = re.compile(
    r"uncorrectable|\bECC\b|\bXid\b|illegal memory access|misaligned address|unspecified launch failure"
    r"|hardware|device-side|CUDA-capable device|GPU is lost|fallen off the bus|NVML|bus error",
    flags=re.IGNORECASE,
)
"""How faults of a device read that another one may not have. Being out of memory is none."""


def main() -> int:
    status, hosts = read_status(Path(sys.argv[1]).parent), read_hostfile(Path(sys.argv[2]))
    if status is None or status.state != "failed" or status.waited or not FAULT.search(status.reason):
        return 1
    nodes = [host for host, ranks in hosts.items() for _ in range(ranks)]
    print(nodes[status.rank or 0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
