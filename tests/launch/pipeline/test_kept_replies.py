"""What a judge has said is paid for once: its stage's folder stays where it is when a setting changes."""

import json

import pytest

from launch.pipeline.state import Action, Decision, Progress, load_remembering

SETTINGS = {
    "win-rate": {"outputs": "a.json", "reference": "a.json"},
    "grade": {"answers": {"a": "a.json"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_setting_keeps_the_replies_of_a_judge(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('[{"instruction": "why?", "output": "so"}]')
    recipe = tmp_path / "pipeline.yaml"
    settings = SETTINGS[name] | {"judge": {"url": "http://127.0.0.1:9", "model": "m"}}
    recipe.write_text(json.dumps({"output": "out", "stages": {name: {"set": settings}}}))
    pipeline = load_remembering(recipe)
    (stage,) = pipeline.stages
    progress = Progress(pipeline)
    progress.start(stage, progress.decide(stage))
    (stage.output / "judge.jsonl").write_text("{}\n")
    changed = load_remembering(recipe, [f"{name}.judge.max_tokens=9"])
    progress = Progress(changed)
    decision = progress.decide(changed.stages[0])
    assert decision.action is Action.REDO and "max_tokens" in decision.reason
    progress.start(changed.stages[0], Decision(action=Action.REDO, parts=decision.parts))
    assert (stage.output / "judge.jsonl").read_text() == "{}\n"
