import subprocess
import sys

import pytest

from launch.cli import main
from reward.__main__ import main as reward_main


def test_reward_help_lists_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        reward_main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for option in ("margin.parameters", "train.micro_batch_tokens", "engine.deepspeed", "data.over_length"):
        assert option in text
    assert "Entropic regularization of the transport plan" in text


def test_dry_run_prints_a_recipe_that_gives_the_same_run(capsys, tmp_path):
    arguments = ["output=runs/a", "model.path=m", "data.train=d.jsonl", "optim.learning_rate=1e-5", "--dry-run"]
    assert reward_main(arguments) == 0
    first = capsys.readouterr().out
    (tmp_path / "copy.yaml").write_text(first)
    assert reward_main(["--config", str(tmp_path / "copy.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == first
    assert not (tmp_path / "runs").exists()


def test_all_problems_are_named_at_once_with_the_nearest_key(capsys):
    settings = ["output=o", "model.path=m", "data.train=d", "margin.parameters.epsilon=0", "optim.learning_rte=1"]
    code = reward_main(settings)
    text = capsys.readouterr().err
    assert code == 2
    assert "2 problems" in text
    assert "margin.parameters.epsilon = 0" in text and "did you mean optim.learning_rate?" in text


def test_a_margin_that_the_loss_cannot_take_is_refused(capsys):
    code = reward_main(["output=o", "model.path=m", "data.train=d", "loss.kind=focal"])
    assert code == 2
    assert "loss.kind = focal has no place for a margin" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["score"]])
def test_incomplete_commands_show_their_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: rlhf" in capsys.readouterr().err


def test_importing_the_toolkit_imports_nothing():
    heavy = "[name for name in ('torch', 'deepspeed', 'transformers') if name in sys.modules]"
    script = f"import sys, rlhf, reward; print({heavy})"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
