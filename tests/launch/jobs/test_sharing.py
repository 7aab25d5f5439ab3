"""What stages get of a machine: their own devices, never more than there are, and the same ones in number each time."""

from dataclasses import replace

import pytest

from launch.jobs import launcher, sharing
from launch.jobs.launcher import HERE, Machine, stage_command, stage_environment
from launch.jobs.sharing import Sharing
from launch.runs import Pipeline, PipelineStage
from launch.stages import STAGES
from rlhf.core.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch):
    """``gpus(n)``: a machine with so many."""

    def make(count: int) -> None:
        for module in (launcher, sharing):
            monkeypatch.setattr(module, "visible_gpus", lambda: count)
        monkeypatch.setattr(launcher, "default_ranks", lambda: count or 2)

    return make


def stage(name: str, kind: str = "reward", **size: int) -> PipelineStage:
    return PipelineStage(name=name, stage=STAGES[kind], config=None, **size)


def taken(share: Sharing, *stages: PipelineStage) -> list:
    """The devices of each, or ``None`` for one that has to wait."""
    parts = [share.take(each) for each in stages]
    return [None if part is None else dict(part.devices) for part in parts]


def test_each_has_devices_of_its_own_and_takes_what_another_gives_back(gpus):
    gpus(8)
    a, b, c = (stage(name, ranks=4) for name in "abc")
    share = Sharing(Machine())
    assert taken(share, a, b, c) == [{HERE: (0, 1, 2, 3)}, {HERE: (4, 5, 6, 7)}, None]
    share.give_back(a)
    assert taken(share, stage("d", ranks=5), c) == [None, {HERE: (0, 1, 2, 3)}]


def test_one_that_says_nothing_has_all_devices_or_waits(gpus):
    gpus(4)
    share = Sharing(Machine())
    assert taken(share, stage("a", ranks=1), stage("b")) == [{HERE: (0,)}, None]
    share.give_back(stage("a"))
    assert taken(share, stage("b"), stage("a", ranks=1)) == [{HERE: (0, 1, 2, 3)}, None]


def test_ranks_of_the_command_line_are_the_first_devices_and_the_others_stay_untouched(gpus):
    gpus(8)
    share = Sharing(Machine(ranks=2))
    assert taken(share, stage("a"), stage("b"), stage("c", ranks=1)) == [{HERE: (0, 1)}, None, None]
    share.give_back(stage("a"))
    assert taken(share, stage("d", ranks=3)) == [{HERE: (0, 1, 2)}]  # its recipe says so


def test_an_import_needs_no_device(gpus):
    gpus(2)
    assert taken(Sharing(Machine()), stage("a"), stage("b", "import")) == [{HERE: (0, 1)}, {}]


@pytest.mark.parametrize(
    ("count", "at_once", "ranks"), [(8, 2, 4), (8, 3, 2), (8, 16, 1), (3, 2, 1)], ids=lambda each: str(each)
)
def test_several_at_a_time_that_say_nothing_have_equal_parts(gpus, tmp_path, count, at_once, ranks):
    gpus(count)
    share = Sharing(Machine(), at_once)
    names = [f"s{number}" for number in range(20)]
    pipeline = Pipeline(name="p", output=tmp_path, stages=(*map(stage, names), stage("own", ranks=2)))
    split = share.split(pipeline).stages
    assert {each.ranks for each in split[:-1]} == {ranks} and split[-1].ranks == 2
    at_work = [part for part in taken(share, *split[:-1]) if part is not None]
    assert len(at_work) == min(at_once, count // ranks)
    places = [place for part in at_work for place in part[HERE]]
    assert len({*places}) == len(places)


@pytest.mark.parametrize(
    ("hosts", "at_once", "size"),
    [
        ({"a": 8, "b": 8, "c": 8, "d": 8}, 2, (2, None)),
        ({"a": 8, "b": 8, "c": 8}, 2, (1, None)),
        ({"a": 8, "b": 8}, 3, (1, 4)),
        ({"a": 8, "b": 4}, 4, (1, 2)),
    ],
    ids=["two nodes each", "one rests", "two on a node", "the smaller one counts"],
)
def test_several_at_a_time_have_whole_nodes_where_there_are_enough(tmp_path, hosts, at_once, size):
    pipeline = Pipeline(name="p", output=tmp_path, stages=(stage("a"),))
    (found,) = Sharing(Machine(hosts=hosts, allocated=True), at_once).split(pipeline).stages
    assert (found.nodes, found.ranks) == size


def test_without_a_gpu_it_is_one_at_a_time_unless_more_are_asked_for_and_these_share_the_cores(gpus, monkeypatch):
    gpus(0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    assert taken(Sharing(Machine()), stage("a", ranks=1), stage("b", ranks=1)) == [{}, None]
    share = Sharing(Machine(), 2)
    parts = [share.take(each) for each in (stage("a"), stage("b", ranks=1), stage("c"))]
    assert parts[2] is None
    threads = [stage_environment(STAGES["reward"], part)["OMP_NUM_THREADS"] for part in parts[:2]]
    assert threads == ["3", "6"]  # of 6 cores: two ranks, one rank
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert stage_environment(STAGES["reward"], parts[0]) == {}
    assert stage_environment(STAGES["reward"], Sharing(Machine()).take(stage("a"))) == {}


def test_parts_of_nodes_have_ports_and_places_of_their_own(monkeypatch, program):
    program("scontrol", "echo NodeName=$3 NodeAddr=10.0.0.9 x=y")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    share = Sharing(Machine(hosts={"n1": 4, "n2": 4}, allocated=True))
    stages = [stage("a", nodes=1, ranks=2), stage("b", nodes=2, ranks=2), stage("c", nodes=1, ranks=2), stage("d")]
    parts = [share.take(each) for each in stages]
    assert parts[3] is None
    words = [stage_command(STAGES["reward"], (), part) for part in parts[:3]]
    said = [
        {key: line[line.index(key) + 1] for key in ("--address", "--port", "--slots", "--devices")} for line in words
    ]
    assert said == [
        {"--address": "10.0.0.1", "--port": "29500", "--slots": "2x1", "--devices": "0,1"},
        {"--address": "10.0.0.1", "--port": "29501", "--slots": "2x2", "--devices": "2,3/0,1"},
        {"--address": "10.0.0.9", "--port": "29502", "--slots": "2x1", "--devices": "2,3"},
    ]
    assert all("--overlap" in line for line in words) and "--nodelist=n2" in words[2]


def test_whole_nodes_need_no_option(monkeypatch):
    share = Sharing(Machine(hosts={"n1": 4, "n2": 4}, allocated=True))
    words = stage_command(STAGES["reward"], (), share.take(stage("a", nodes=1)))
    assert "--overlap" not in words and "--devices" not in words and "--nodelist=n1" in words


def test_how_many_ranks_there_are_does_not_depend_on_what_is_free():
    share = Sharing(Machine(hosts={"big": 8, "small": 4}, allocated=True))
    assert taken(share, stage("a", nodes=1), stage("b", nodes=1)) == [{"big": (*range(8),)}, None]


@pytest.mark.parametrize(
    ("size", "said"), [({"ranks": 5}, "ranks = 5: 4 GPUs are visible"), ({"nodes": 2}, "nodes = 2: the run has 1")]
)
def test_more_than_there_is_is_refused(gpus, size, said):
    gpus(4)
    with pytest.raises(ConfigError, match=f"stages.a.{said}; ask for no more"):
        Sharing(Machine()).check(stage("a", **size))


@pytest.mark.parametrize(("count", "ranks"), [(1, 2), (4, 8)])
def test_more_ranks_than_gpus_are_refused_not_waited_for(gpus, count, ranks):
    gpus(count)
    with pytest.raises(ConfigError, match=f"--ranks {ranks}: {count} GPUs are visible; ask for no more"):
        Sharing(Machine(ranks=ranks)).check(stage("a"))
    gpus(0)
    Sharing(Machine(ranks=ranks)).check(stage("a"))


def test_who_is_likely_to_be_at_work_together_is_as_deep_in_the_pipeline_and_fits(gpus):
    def of(name: str, *needs: str, **size: int) -> PipelineStage:
        return replace(stage(name, **size), needs=needs)

    gpus(4)
    stages = [of("a", ranks=2), of("b", "a", ranks=2), of("c", "a", ranks=1), of("d", "a", ranks=2), of("e", "b")]
    groups = Sharing(Machine()).together(stages)
    assert [[each.name for each in group] for group in groups] == [["b", "c"]]
    assert Sharing(Machine(), 1).together(stages) == ()
