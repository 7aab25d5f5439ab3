"""Free memory, in made-up trees of control groups of both versions."""

from pathlib import Path

import pytest

from rlhf.core.memory import free_memory, host_memory

GIB = 2**30
UNLIMITED_1 = 9223372036854771712
"""What version 1 says for no limit."""


@pytest.fixture
def host(tmp_path):
    """``host(groups, own)``: 64 GiB of memory, 32 of them free; groups by path below /sys/fs/cgroup."""

    def make(groups: dict[str, dict[str, str]], own: str) -> Path:
        files = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {32 * 2**20} kB\n"}
        files["proc/self/cgroup"] = own
        for group, content in groups.items():
            files |= {f"sys/fs/cgroup/{group}/{name}": text for name, text in content.items()}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def version_2(limit, used, stat: str = "") -> dict[str, str]:
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def version_1(limit, used, stat: str = "") -> dict[str, str]:
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


def test_without_control_groups_it_is_the_memory_of_the_host(host):
    found = host_memory(host({}, ""))
    assert (found.total, found.free, found.limited) == (64 * GIB, 32 * GIB, False)


@pytest.mark.parametrize(
    ("make", "own", "top"), [(version_2, "0::/job/step\n", ""), (version_1, "4:cpu:/\n7:memory:/job/step\n", "memory/")]
)
@pytest.mark.parametrize("level", ["", "job", "job/step"])
def test_the_tightest_group_counts_wherever_it_stands_above_the_process(host, make, own, top, level):
    groups = {f"{top}{name}": make(48 * GIB, GIB) for name in ("", "job", "job/step")}
    groups[f"{top}{level}"] = make(10 * GIB, 3 * GIB)
    groups[f"{top}other"] = make(GIB, GIB)
    found = host_memory(host(groups, own))
    assert (found.total, found.free, found.limited) == (10 * GIB, 7 * GIB, True)


@pytest.mark.parametrize("content", [version_2("max", GIB), version_2(200 * GIB, GIB), {"memory.max": "junk"}, {}])
def test_no_limit_or_one_above_the_host_leaves_the_host(host, content):
    found = host_memory(host({"job": content}, "0::/job\n"))
    assert (found.total, found.free, found.limited) == (64 * GIB, 32 * GIB, False)


def test_the_number_that_version_1_has_for_no_limit_is_none(host):
    found = host_memory(host({"memory/job": version_1(UNLIMITED_1, GIB)}, "7:memory:/job\n"))
    assert (found.total, found.free, found.limited) == (64 * GIB, 32 * GIB, False)


def test_a_container_that_is_told_its_path_on_the_host_sees_its_group_as_the_top(host):
    one = host({"memory": version_1(4 * GIB, GIB)}, "7:memory:/docker/0123abcd\n")
    assert (host_memory(one).total, host_memory(one).free) == (4 * GIB, 3 * GIB)
    two = host({"": version_2(6 * GIB, GIB)}, "0::/../../system.slice/docker.scope\n")
    assert (host_memory(two).total, host_memory(two).free) == (6 * GIB, 5 * GIB)


def test_memory_in_version_1_beside_an_empty_version_2(host):
    groups = {"memory/slurm/job": version_1(8 * GIB, 2 * GIB), "unified": {}}
    found = host_memory(host(groups, "5:cpu,memory:/slurm/job\n0::/slurm/job\n"))
    assert (found.total, found.free) == (8 * GIB, 6 * GIB)


def test_files_that_are_only_cached_are_free(host):
    stat = f"anon {GIB}\nactive_file {2 * GIB}\ninactive_file {3 * GIB}\nfile {9 * GIB}\n"
    assert host_memory(host({"job": version_2(10 * GIB, 8 * GIB, stat)}, "0::/job\n")).free == 7 * GIB
    stat = f"active_file 1\ntotal_active_file {GIB}\ntotal_inactive_file {GIB}\n"
    assert host_memory(host({"memory/job": version_1(10 * GIB, 8 * GIB, stat)}, "2:memory:/job\n")).free == 4 * GIB


def test_a_group_over_its_limit_has_nothing_free(host):
    assert host_memory(host({"job": version_2(GIB, 2 * GIB)}, "0::/job\n")).free == 0


def test_a_system_that_does_not_tell_is_not_known(tmp_path):
    assert host_memory(tmp_path) is None


def test_this_host_has_some(monkeypatch):
    found = host_memory()
    assert 0 < found.free <= found.total
    assert free_memory() > 0
