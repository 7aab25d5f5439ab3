import io
from types import SimpleNamespace

from rich.console import Console

from launch.pipeline import overview
from launch.stages import STAGES
from rlhf.train.status import new_status


def test_a_log_file_gets_a_line_of_progress_only_when_there_is_some(monkeypatch):
    monkeypatch.setattr(overview, "SECONDS_BETWEEN_LINES", -1.0)
    said = io.StringIO()
    at = lambda step: new_status("ppo", phase="training", step=step, total=7)  # noqa: E731
    stages = [SimpleNamespace(name="ppo", stage=STAGES["ppo"])]
    pipeline = SimpleNamespace(name="study", output="runs/study", stages=stages)
    with overview.Overview(pipeline, Console(file=said)) as view:
        for status in (at(1), at(1), None, at(1), at(2)):
            view.tick("ppo", status, 1.0)
    assert said.getvalue().splitlines() == ["ppo: training  step 1/7", "ppo: training  step 2/7"]
