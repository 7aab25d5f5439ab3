"""What a SLURM allocation has: asked of SLURM, node by node, or refused."""

import pytest

from launch.jobs.allocation import UnknownAllocation, allocated_hosts, node_names
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
        program("srun", "exit 0")
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
    with pytest.raises(ConfigError, match=r"(scontrol|srun).*--ranks to use this machine alone$") as caught:
        find_machine(None, None)
    assert "\n" not in str(caught.value)
    assert find_machine(2, None) == Machine(ranks=2)


# ---- inside of a container, where SLURM has left its environment alone


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node7", ["node7"]),
        ("node[001-003,7],login1", ["node001", "node002", "node003", "node7", "login1"]),
        ("rack[1-2]n[08-10]", [f"rack{rack}n{node}" for rack in (1, 2) for node in ("08", "09", "10")]),
        ("a-b[9-11].c,d.e", ["a-b9.c", "a-b10.c", "a-b11.c", "d.e"]),
    ],
)
def test_names_of_nodes_are_read_as_slurm_writes_them(text, names):
    assert node_names(text) == names


@pytest.fixture
def inside(program, monkeypatch, tmp_path):
    """``inside(nodes, name=value)``: an allocation without scontrol, with such variables; srun is there."""

    def make(nodes: str, **variables: str) -> None:
        program("srun", "exit 0")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        for name in ("SLURMD_NODENAME", "RLHF_HOSTFILE", "SLURM_GPUS_ON_NODE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"JOB_ID": "5", "JOB_NODELIST": nodes, **variables}.items():
            monkeypatch.setenv(name if name.startswith("SLURM") else f"SLURM_{name}", value)

    return make


@pytest.mark.parametrize(
    ("variables", "counts"),
    [
        ({"GPUS_PER_NODE": "4"}, [4, 4, 4]),
        ({"GPUS_PER_NODE": "h100:6,a100:2", "GPUS_ON_NODE": "8"}, [8, 8, 8]),
        ({"GPUS_PER_TASK": "1", "TASKS_PER_NODE": "4(x2),2"}, [4, 4, 2]),
        ({"GPUS_PER_TASK": "a100:2", "TASKS_PER_NODE": "2,1,3"}, [4, 2, 6]),
        ({"GPUS_ON_NODE": "2", "SLURMD_NODENAME": "n1"}, [2, 2, 2]),  # --gres is alike on all nodes
        ({"SLURMD_NODENAME": "n1"}, [1, 1, 1]),
    ],
    ids=["by node", "with a type", "by task", "by task, with a type", "of this node", "none"],
)
def test_without_scontrol_the_environment_says_what_the_nodes_have(inside, variables, counts):
    inside("n[1-3]", **variables)
    assert allocated_hosts() == dict(zip(("n1", "n2", "n3"), counts, strict=True))


@pytest.mark.parametrize("variables", [{"GPUS": "5"}, {}, {"GPUS": "5", "GPUS_ON_NODE": "2", "SLURMD_NODENAME": "n1"}])
def test_what_the_environment_does_not_say_is_not_guessed(inside, variables):
    inside("n[1-3]", **variables)
    with pytest.raises(UnknownAllocation, match=r"no scontrol here .*n\[1-3\].*--ranks to use this machine alone$"):
        find_machine(None, None)
    assert find_machine(2, None) == Machine(ranks=2)


def test_a_container_on_the_one_node_of_an_allocation_trains_there(inside, monkeypatch, tmp_path):
    inside("n1", GPUS="3", SLURMD_NODENAME="n1")
    (tmp_path / "bin" / "srun").unlink()
    assert find_machine(None, None) == Machine() and find_machine(2, None) == Machine(ranks=2)


@pytest.mark.parametrize("nodes", ["n[1-2]", "n2"], ids=["several", "another one"])
def test_nodes_that_cannot_be_reached_from_inside_are_one_line(inside, tmp_path, nodes):
    inside(nodes, GPUS_PER_NODE="4", SLURMD_NODENAME="n1")
    (tmp_path / "bin" / "srun").unlink()
    with pytest.raises(UnknownAllocation, match=r"reached by srun, and there is none here .*--ranks") as caught:
        find_machine(None, None)
    assert "\n" not in str(caught.value) and find_machine(2, None) == Machine(ranks=2)
