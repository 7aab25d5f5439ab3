"""What the doctor says of what stages ask for outside of this machine."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.doctor.inputs import judge_keys
from policy.judging.config import JudgeConfig
from policy.win_rate.config import WinRateConfig


@pytest.mark.parametrize(
    ("url", "variable", "missing"),
    [
        ("https://api.openai.com/v1", "OPENAI_API_KEY", True),
        ("https://elsewhere/v1", "MY_KEY", False),
        ("http://127.0.0.1:8000/v1", "OPENAI_API_KEY", False),
        ("http://localhost/v1", "NOTHING", False),
    ],
)
def test_a_judge_elsewhere_wants_a_key_before_hours_of_training(monkeypatch, url, variable, missing):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("MY_KEY", "k")
    judge = JudgeConfig(url=url, model="m", key_variable=variable)
    config = WinRateConfig(output=Path("o"), outputs=Path("a"), reference=Path("b"), judge=judge)
    stages = [SimpleNamespace(config=each) for each in (config, config, object())]
    found = [each.text for each in judge_keys(SimpleNamespace(stages=stages))]
    assert found == [f"judge.url = {url}: the environment variable {variable} holds no key"] * missing
