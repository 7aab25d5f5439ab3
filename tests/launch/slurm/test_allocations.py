"""Pipelines inside allocations by hand on a real SLURM, whose nodes have unequal numbers of GPUs (stand-ins).

What there is, is used, and shared by stages side by side; what is not used is refused.
"""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm import ROOT

pytestmark = [pytest.mark.dist, pytest.mark.slow]
WORKERS = ROOT / "tests" / "launch" / "pipeline" / "workers"
UNEQUAL = ("--nodes=2", "--nodelist=node[1-2]", "--gpus=3")
BY_TASK = ("--nodes=2", "--nodelist=node[1,3]", "--ntasks=4", "--overcommit", "--gpus-per-task=1")
EQUAL = ("--nodes=2", "--nodelist=node[1,3]", "--gres=gpu:2")


@pytest.fixture
def allocated(cluster, tmp_path):
    """``allocated(options, stages)`` runs a pipeline of toy stages in an allocation; what it and salloc print."""

    def act(options: tuple[str, ...], entries: dict[str, dict], expect: int = 0) -> str:
        path = tmp_path / "toys.yaml"
        stages = {name: {"kind": "toy", **entry} for name, entry in entries.items()}
        path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "stages": stages}, sort_keys=False))
        words = ("salloc", *options, sys.executable, str(WORKERS / "run_toys.py"), str(path), "allocated")
        done = cluster.run(*words, check=False, timeout=180, PYTHONPATH=f"{ROOT}:{WORKERS}")
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    return act


def ranks(output: Path) -> list[tuple[str, str, str]]:
    """Node, device and size of the run, rank by rank."""
    found = []
    for path in sorted(output.glob("seen*")):
        said = json.loads(path.read_text())
        device = said["CUDA_VISIBLE_DEVICES"].split(",")[int(said["LOCAL_RANK"])]
        found.append((said["SLURMD_NODENAME"], device, said["WORLD_SIZE"]))
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (UNEQUAL, [("node1", "0", "3"), ("node1", "1", "3"), ("node2", "0", "3")]),
        (BY_TASK, [("node1", "0", "4"), ("node1", "1", "4"), ("node3", "0", "4"), ("node3", "1", "4")]),
        pytest.param(("--nodes=1", "--nodelist=node3", "--gres=gpu:1"), [("node3", "0", "1")], marks=pytest.mark.full),
    ],
    ids=["unequal nodes", "asked for by task", "one node, from elsewhere"],
)
def test_every_gpu_of_the_allocation_has_a_rank_that_sees_it(allocated, tmp_path, options, expected):
    allocated(options, {"a": {}})
    assert ranks(tmp_path / "out" / "a") == expected


@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        (EQUAL, {"nodes": 1, "ranks": 1}, {"nodes": 1, "ranks": 1}),
        pytest.param(EQUAL, {"nodes": 1}, {"nodes": 1}, marks=pytest.mark.full),
        pytest.param(BY_TASK, {"ranks": 1, "nodes": 1}, {"ranks": 1, "nodes": 2}, marks=pytest.mark.full),
    ],
    ids=["one node", "a node each", "one of them on two"],
)
def test_stages_side_by_side_share_what_the_allocation_has(allocated, tmp_path, options, left, right):
    """Each waits until the other is there."""
    said = allocated(options, {"a": left | {"set": {"meets": ["b"]}}, "b": right | {"set": {"meets": ["a"]}}})
    assert said.index("b: running") < said.index("a: finished")
    a, b = (ranks(tmp_path / "out" / name) for name in "ab")
    assert {each[:2] for each in a}.isdisjoint(each[:2] for each in b)
    assert (len(a), len(b)) == ((2, 2) if "ranks" not in left else (1, right["nodes"]))


@pytest.mark.full
def test_a_step_that_slurm_cannot_give_its_gpus_beside_another_comes_behind_it(allocated, tmp_path):
    allocated(UNEQUAL, {"a": {"ranks": 1, "nodes": 1}, "b": {"ranks": 1, "nodes": 2}})
    assert ranks(tmp_path / "out" / "b") == [("node1", "1", "2"), ("node2", "0", "2")]


@pytest.mark.parametrize(
    ("options", "entry", "said"),
    [
        (UNEQUAL, {"ranks": 2}, "stages.a.ranks = 2: node2 has 1 devices; ask for no more"),
        (UNEQUAL, {"nodes": 3}, "stages.a.nodes = 3: the run has 2; ask for no more"),
    ],
)
def test_what_the_allocation_does_not_have_is_refused_before_anything_starts(allocated, tmp_path, options, entry, said):
    assert said in allocated(options, {"a": entry}, expect=1)
    assert not (tmp_path / "out" / "a").exists()


def test_ranks_beside_several_nodes_are_refused(cluster, tmp_path):
    recipe = str(ROOT / "launch" / "recipes" / "quickstart.yaml")
    words = ("-m", "launch.cli", "pipeline", "run", recipe, f"output={tmp_path}/out", "--ranks", "2")
    done = cluster.run("salloc", *UNEQUAL, sys.executable, *words, check=False)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "--ranks 2: the ranks of the allocation are its devices (node1 2, node2 1); leave it out" in done.stderr
