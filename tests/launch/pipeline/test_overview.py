import io
from types import SimpleNamespace

from rich.console import Console

from launch.pipeline import overview


def test_a_log_file_gets_a_line_of_progress_only_when_there_is_some(monkeypatch):
    monkeypatch.setattr(overview, "SECONDS_BETWEEN_LINES", -1.0)
    said = io.StringIO()
    pipeline = SimpleNamespace(name="study", output="runs/study", stages=[SimpleNamespace(name="ppo", kind="ppo")])
    with overview.Overview(pipeline, Console(file=said)) as view:
        for progress in ("step 1/7", "step 1/7", None, "step 1/7", "step 2/7"):
            view.tick("ppo", progress, 1.0)
    assert said.getvalue().splitlines() == ["ppo: step 1/7", "ppo: step 2/7"]
