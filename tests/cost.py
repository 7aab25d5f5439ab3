"""A pytest plugin: what tests cost in CPU seconds, which does not depend on what else the machine is doing.

A test without the marker ``slow`` may take ``LIMIT`` CPU seconds, and fails above ``SPREAD`` times that;
``--file-times N`` shows the files that took longest. Under pytest-xdist (``--dist loadfile``) the files of the long
tests are started first.
"""

import os
import resource
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.forked import cpu_seconds_of_forks

LIMIT = 10.0
"""CPU seconds of a test by itself, without the fixtures that it shares with others."""
SPREAD = 1.5
"""How many times slower than usual a machine may be before a test fails for it."""
TOGETHER = {
    "tests/launch/slurm/test_jobs.py": "the SLURM cluster of a session",
    "tests/launch/slurm/test_pipelines.py": "the SLURM cluster of a session",
    "tests/launch/slurm/test_allocations.py": "the SLURM cluster of a session",
    "tests/launch/slurm/test_queue.py": "the SLURM cluster of a session",
    "tests/launch/doctor/test_checks.py": "how long things take, and their memory",
    "tests/launch/plan/test_measured.py": "how long things take, and their memory",
}
"""Files that go to one worker, since they share what is expensive, or would disturb each other, and go there first."""
LONG = ("slow", "dist")
"""Markers of tests that are started first, so that none is left to one worker in the end."""


def cpu_seconds() -> float:
    """Of this process, of the children that it has waited for and of forked ranks."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used) + cpu_seconds_of_forks()


class Meter:
    """What one phase of a test takes, and how much of it is for fixtures that others use, too."""

    def __init__(self) -> None:
        self.total = self.shared = 0.0
        self._since = 0.0
        self._sharing = 0

    def start(self) -> None:
        self.total = self.shared = 0.0
        self._since = cpu_seconds()

    def stop(self) -> float:
        """CPU seconds of the test by itself."""
        self.total = cpu_seconds() - self._since
        return self.total - self.shared

    def share(self) -> Iterator[None]:
        """Around the setup of a shared fixture; one that asks for another counts once."""
        began, self._sharing = cpu_seconds(), self._sharing + 1
        try:
            yield
        finally:
            self._sharing -= 1
            if not self._sharing:
                self.shared += cpu_seconds() - began


@dataclass
class Cost:
    seconds: float = 0.0
    cpu_seconds: float = 0.0


SPENT = pytest.StashKey[float]()
_meter = Meter()
_files: dict[str, Cost] = defaultdict(Cost)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--file-times", type=int, default=0, metavar="N", help="show the N files that took longest")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    if fixturedef.scope == "function":
        return (yield)
    sharing = _meter.share()
    next(sharing)
    try:
        return (yield)
    finally:
        sharing.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    _meter.start()
    try:
        return (yield)
    finally:
        item.stash[SPENT] = _meter.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    _meter.start()
    try:
        result = yield
    finally:
        own = item.stash[SPENT] + _meter.stop()
    if own > LIMIT * SPREAD and item.get_closest_marker("slow") is None:
        pytest.fail(f"took {own:.1f} CPU seconds, more than {LIMIT:g}: mark it slow, or let it do less", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.cpu_seconds = _meter.total if report.when != "teardown" else 0.0
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cost = _files[report.nodeid.partition("::")[0]]
    cost.seconds += report.duration
    cost.cpu_seconds += getattr(report, "cpu_seconds", 0.0)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    wanted = config.getoption("file_times")
    if not wanted:
        return
    terminalreporter.section(f"slowest {wanted} files")
    terminalreporter.line("seconds  CPU s  file")
    slowest = sorted(_files.items(), key=lambda item: -item[1].seconds)[:wanted]
    for path, cost in slowest:
        terminalreporter.line(f"{cost.seconds:7.1f} {cost.cpu_seconds:6.1f}  {path}")
    total = Cost(sum(each.seconds for each in _files.values()), sum(each.cpu_seconds for each in _files.values()))
    terminalreporter.line(f"{total.seconds:7.1f} {total.cpu_seconds:6.1f}  all {len(_files)} files")


# ---- pytest-xdist


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files of long tests first; inside a file the order stays."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
        items.sort(key=lambda item: (item.nodeid.partition("::")[0] not in TOGETHER, item.path not in long))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """``--dist loadfile``, where some files count as one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByGroupsOfFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return TOGETHER.get(path, path)

    config.option.loadscopereorder = False
    return ByGroupsOfFiles(config, log)
