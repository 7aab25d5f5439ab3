"""The command as users start it."""

import json

import pytest

from launch.cli import main

SFT = ["plan", "sft", "output=o", "data.train=absent.jsonl"]
H100 = ["--device", "h100-80gb", "--rows", "1000", "--mean-tokens", "300"]


def test_a_plan_that_fits_exits_with_0_and_says_so(capsys):
    assert main([*SFT, "model.path=smollm2-135m", *H100]) == 0
    text = capsys.readouterr().out
    for part in ("134.5 M", "FITS", "smallest configuration of ds_configs that fits: zero0", "steps of the run"):
        assert part in text


def test_a_plan_that_does_not_fit_exits_with_1_and_says_what_to_change(capsys):
    assert main([*SFT, "model.path=llama-3-8b", "engine.deepspeed=zero0", *H100]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "next knob: " in text


def test_json_has_the_same_numbers(capsys):
    assert main([*SFT, "model.path=llama-3-8b", "engine.deepspeed=zero3", "--json", "--nodes", "2", *H100]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert sum(found["device_peak"]["items"].values()) == found["device_peak"]["bytes"]
    assert found["device_free"] == found["cluster"]["device_memory"] - found["device_peak"]["bytes"]
    assert found["batches"]["steps_per_epoch"] == 16


def test_a_model_on_disk_and_its_data_are_counted(tiny_model, tiny_pairs, tmp_path, capsys):
    settings = [f"model.path={tiny_model}", f"data.train={tiny_pairs}", f"data.cache_dir={tmp_path}", "output=o"]
    assert main(["plan", "reward", *settings, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batches"]["lengths"] == "counted"
    assert 60 < found["batches"]["items"] < 90
    assert found["models"][0]["from"].endswith("config.json")


def test_a_host_that_is_too_small_is_no_fit(capsys):
    assert main([*SFT, "model.path=llama-3-8b", "engine.deepspeed=zero3_offload", "--host-memory", "64GiB", *H100]) == 1
    assert "too much for the host memory of a node" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.path=runs/none/final"], "model.path = runs/none/final: there is no such folder"),
        (["model.path=llama-3-8b", "--device", "h900"], "--device h900: expected one of h100-80gb"),
        (["model.path=llama-3-8b", "engine.deepspeed=zero7"], "zero7: no such DeepSpeed configuration"),
        (["model.path=llama-3-8b", "optim.learning_rte=1"], "did you mean optim.learning_rate?"),
        (["model.path=llama-3-8b", "--config", "absent.yaml"], "absent.yaml: no such file"),
        (["model.path=llama-3-8b", "model.layers=40"], "model.layers = 40, but llama-3-8b has 32"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments, message, capsys):
    assert main([*SFT, *H100, *arguments]) == 2
    text = capsys.readouterr()
    assert message in text.err
    assert text.out == ""


@pytest.mark.parametrize(
    "arguments", [["--device-memory", "80 bananas"], ["--utilization", "1.5"], ["--flops", "-1"], ["--nodes", "0"]]
)
def test_numbers_that_mean_nothing_are_refused_by_the_parser(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*SFT, "model.path=llama-3-8b", *arguments])
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err
