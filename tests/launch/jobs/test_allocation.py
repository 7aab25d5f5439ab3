"""What a SLURM allocation has: asked of SLURM, node by node, or refused."""

import pytest

from launch.jobs.allocation import allocated_hosts
from launch.jobs.launcher import Machine, find_machine
from rlhf.core.errors import ConfigError

DETAILS = """JobId=5 JobName=interactive
   NodeList=node[001-002,7]
{nodes}
   MinCPUsNode=1 MinMemoryNode=0 MinTmpDiskNode=0
"""
EQUAL = "     Nodes=node[001-002,7] CPU_IDs=0-3 Mem=0 GRES=gpu:4(IDX:0-3)"
UNEQUAL = (
    "     Nodes=node[001-002] CPU_IDs=0-3 Mem=0 GRES=gpu:h100:4(IDX:0-3),nvme:1(IDX:0)\n"
    "     Nodes=node7 CPU_IDs=0 Mem=0 GRES=gpu:a100:1(IDX:2),gpu:h100:1(IDX:0)"
)
CPUS = "     Nodes=node[001-002,7] CPU_IDs=0-3 Mem=0 GRES="
ONE_WITHOUT = UNEQUAL.rpartition(" GRES=")[0] + " GRES="
NAMES = (
    "case $3 in *,7*) printf 'node001\\nnode002\\nnode7\\n';; *01*) printf 'node001\\nnode002\\n';; *) echo $3;; esac"
)


@pytest.fixture
def allocation(program, monkeypatch):
    """``allocation(nodes)``: an allocation of three nodes of which scontrol says that."""

    def make(nodes: str, names: str = NAMES) -> None:
        text = DETAILS.format(nodes=nodes)
        program("scontrol", f"case $2 in hostnames) {names};; *) cat <<'END'\n{text}END\n;; esac")
        for name, value in {"JOB_ID": "5", "JOB_NUM_NODES": "3", "JOB_NODELIST": "node[001-002,7]"}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")  # of the node that asks, which says nothing of the others
        monkeypatch.delenv("SLURMD_NODENAME", raising=False)
        monkeypatch.delenv("RLHF_HOSTFILE", raising=False)

    return make


@pytest.mark.parametrize(
    ("nodes", "counts"), [(EQUAL, [4, 4, 4]), (UNEQUAL, [4, 4, 2]), (CPUS, [1, 1, 1])], ids=["equal", "unequal", "CPUs"]
)
def test_each_node_counts_what_the_allocation_has_there(allocation, nodes, counts):
    allocation(nodes)
    assert allocated_hosts() == dict(zip(["node001", "node002", "node7"], counts, strict=True))


def test_a_node_without_a_gpu_among_others_is_refused(allocation):
    allocation(ONE_WITHOUT)
    with pytest.raises(ConfigError, match=r"node7 of node\[001-002,7\] has no GPU"):
        allocated_hosts()


def test_ranks_that_several_nodes_have_no_use_for_are_refused(allocation):
    allocation(UNEQUAL)
    with pytest.raises(ConfigError, match=r"--ranks 2: the ranks of the allocation are its devices .*node7 2"):
        find_machine(2, None)


@pytest.mark.parametrize("where", ["on the login node", "on the node itself"])
def test_an_allocation_of_one_node_trains_on_that_node(allocation, monkeypatch, where):
    allocation("     Nodes=node7 CPU_IDs=0-3 Mem=0 GRES=gpu:4(IDX:0-3)", "echo node7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node7")
    if where == "on the node itself":
        monkeypatch.setenv("SLURMD_NODENAME", "node7")
        assert find_machine(None, None) == Machine() and find_machine(2, None) == Machine(ranks=2)
    else:
        assert find_machine(None, None) == Machine(hosts={"node7": 4}, allocated=True)
        assert find_machine(2, None) == Machine(hosts={"node7": 2}, allocated=True)


@pytest.mark.parametrize("fault", ["missing", "silent", "odd"])
def test_without_an_answer_of_slurm_it_is_one_line_and_ranks_use_this_machine(
    allocation, monkeypatch, program, tmp_path, fault
):
    allocation("     an answer of another kind")
    if fault == "missing":
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    if fault == "silent":
        program("scontrol", "echo 'error: one' >&2; echo 'scontrol: fatal: no configuration' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"scontrol .*--ranks to use this machine alone$") as caught:
        find_machine(None, None)
    assert "\n" not in str(caught.value)
    assert find_machine(2, None) == Machine(ranks=2)
