"""What tests of policies share."""

import pytest

from tests.policy.judging.stub import Stub


@pytest.fixture
def stub():
    """``stub(reply, *moods)``: an endpoint; see :class:`tests.policy.judging.stub.Stub`."""
    made = []

    def start(reply, *moods):
        made.append(Stub(reply, moods))
        return made[-1]

    yield start
    for each in made:
        each.close()
