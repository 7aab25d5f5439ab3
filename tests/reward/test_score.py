import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from launch.cli import main
from reward.building import build_reward_model
from reward.config import RewardModelConfig
from reward.saving import save_reward_model
from reward.scoring.__main__ import main as scoring
from rlhf.core import tokenizers
from rlhf.core.files import digest
from rlhf.data.options import ColumnConfig, DataConfig
from rlhf.data.portable import portable_tokenizer
from rlhf.data.preferences import load_preferences
from rlhf.data.templates import chat_format
from rlhf.models.manifest import Manifest, write_manifest
from rlhf.models.tokenizer import load_tokenizer
from rlhf.train.chat import load_chat
from rlhf.train.publishing import text_form

ROWS = [
    {"prompt": "the sun", "response": "is good"},
    {"prompt": "the rain", "chosen": "is good and happy", "rejected": "is bad"},
    {"prompt": "the tax form", "response": ""},
    {"prompt": "one day", "response": "was a happy day and so on and so on"},
]


@pytest.fixture(scope="module")
def final(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("published") / "final"
    tokenizer = load_tokenizer(tiny_model)
    config = RewardModelConfig(path=str(tiny_model), head_init_scale=30.0)
    model = build_reward_model(
        config, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id, vocabulary=len(tokenizer), seed=0
    )
    save_reward_model(model, folder)
    portable_tokenizer(chat_format(tokenizer, None)).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def score(final, rows, output, *options):
    return main(["score", "--model", str(final), "--data", str(rows), "--output", str(output), *options])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_those_of_plain_transformers(final, rows, tmp_path):
    assert score(final, rows, tmp_path / "scores.jsonl", "--batch-tokens", "40") == 1
    lines = read(tmp_path / "scores.jsonl")
    assert [(line["file"], line["row"]) for line in lines] == [("rows.jsonl", number) for number in (1, 2, 3, 4)]
    assert lines[1].keys() == {"file", "row", "chosen_reward", "rejected_reward", "reward_margin"}
    assert lines[1]["reward_margin"] == lines[1]["chosen_reward"] - lines[1]["rejected_reward"] != 0
    assert "empty" in lines[2]["error"]
    tokenizer = load_tokenizer(final)
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    messages = [{"role": "user", "content": "one day"}, {"role": "assistant", "content": ROWS[3]["response"]}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    with torch.no_grad():
        expected = float(model(torch.tensor([ids])).logits)
    assert lines[3]["reward"] == pytest.approx(expected, abs=1e-5)


def test_the_stage_writes_what_the_command_writes_and_refuses_rows_that_it_cannot_score(
    final, rows, tmp_path, tiny_pairs, capsys
):
    assert scoring([f"output={tmp_path}/stage", f"model={final}", f"data={tiny_pairs}"]) == 0
    assert score(final, tiny_pairs, tmp_path / "scores.jsonl", "--keep-rows") == 0
    assert (tmp_path / "stage" / "scored.jsonl").read_bytes() == (tmp_path / "scores.jsonl").read_bytes()
    assert scoring([f"output={tmp_path}/other", f"model={final}", f"data={rows}"]) == 2
    assert "1 rows could not be scored" in capsys.readouterr().err
    assert scoring([f"output={tmp_path}/third", f"model={tmp_path}/nowhere", f"data={rows}"]) == 2
    assert "nowhere: no model folder" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"heads": 3}, {"head": "bnrm", "head_hidden": 8}], ids=["heads", "bnrm"])
def test_heads_that_know_how_sure_they_are_say_so(tmp_path, tiny_model, rows, options):
    tokenizer = load_tokenizer(tiny_model)
    config = RewardModelConfig(path=str(tiny_model), head_init_scale=30.0, **options)
    model = build_reward_model(config, dtype=torch.float32, pad_token_id=2, vocabulary=len(tokenizer), seed=0)
    save_reward_model(model, tmp_path / "final")
    portable_tokenizer(chat_format(tokenizer, None)).save_pretrained(tmp_path / "final")
    assert score(tmp_path / "final", rows, tmp_path / "scores.jsonl") == 1
    lines = read(tmp_path / "scores.jsonl")
    assert lines[0]["reward_sd"] > 0 and lines[1]["chosen_reward_sd"] > 0 and lines[1]["rejected_reward_sd"] > 0


def test_rows_that_are_kept_are_data_with_the_margin_of_the_model(final, tmp_path, tiny_pairs):
    output = tmp_path / "scored.jsonl"
    assert score(final, tiny_pairs, output, "--keep-rows") == 0
    rows = read(output)
    assert [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows] == [
        {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in read(tiny_pairs)
    ]
    data = DataConfig(
        train=str(output),
        eval_share=0.0,
        columns=ColumnConfig(margin="reward_margin"),
        cache_dir=tmp_path / "cache",
    )
    margins = load_preferences(data, load_chat(final)).train.given_margins
    assert margins.tolist() == [row["reward_margin"] for row in rows]
    assert {row["reward_margin"] > 0 for row in rows} == {True, False}
    with_rows = output.read_text()
    assert score(final, tiny_pairs, output) == 2  # the same file without its rows would be another file
    assert output.read_text() == with_rows


def test_a_stopped_run_goes_on_after_its_last_whole_line(final, rows, tmp_path):
    output = tmp_path / "scores.jsonl"
    score(final, rows, output)
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"row": 3, "err')
    score(final, rows, output)
    for found, expected in zip(read(output), map(json.loads, whole.splitlines()), strict=True):
        assert found == pytest.approx(expected, abs=1e-5) if "error" not in expected else found == expected


def test_scores_of_another_model_or_of_other_data_are_not_kept(final, rows, tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    score(final, rows, output)
    before = output.read_text()
    shutil.copytree(final, tmp_path / "other")
    (tmp_path / "other" / "note.txt").write_text("trained further")
    assert score(tmp_path / "other", rows, output) == 2
    assert "its 4 rows are of another model; give another --output" in capsys.readouterr().err
    rows.write_text(rows.read_text() + json.dumps(ROWS[0]) + "\n")
    assert score(final, rows, output) == 2
    assert "are of another data" in capsys.readouterr().err
    (tmp_path / ".scores.jsonl.origin.json").unlink()
    assert score(final, rows, output) == 2
    assert "of unknown origin" in capsys.readouterr().err
    assert output.read_text() == before


def test_several_answers_and_groups_are_kept(final, tmp_path):
    path = tmp_path / "bench.jsonl"
    row = {"prompt": "the sun", "chosen": ["is good"], "rejected": ["is bad", "so"], "subset": "x"}
    path.write_text(json.dumps(row))
    score(final, path, tmp_path / "scores.jsonl", "--group-column", "subset")
    [line] = read(tmp_path / "scores.jsonl")
    assert (line["group"], type(line["chosen_reward"]), len(line["rejected_rewards"])) == ("x", float, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["--data", "no_such.jsonl"], "no_such.jsonl"),
    ],
)
def test_wrong_input_is_one_message(final, rows, tmp_path, arguments, message, capsys):
    command = ["score", "--model", str(final), "--data", str(rows), "--output", str(tmp_path / "s.jsonl")]
    command[command.index(arguments[0]) + 1] = arguments[1]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.jsonl").exists()


@pytest.mark.parametrize(("name", "change"), [("chat_template.jinja", "Be brief. {}"), ("tokenizer.json", None)])
def test_a_model_whose_form_of_text_was_changed_since_is_refused(final, rows, tmp_path, capsys, name, change):
    shutil.copytree(final, tmp_path / "final")
    write_manifest(tmp_path / "final", manifest_of(load_chat(final)))
    path = tmp_path / "final" / name
    assert score(tmp_path / "final", rows, tmp_path / "before.jsonl") == 1  # for the one bad row
    if change is None:
        settings = json.loads(path.read_text())
        settings["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(settings))
    else:
        path.write_text(change.format(path.read_text()))
    assert score(tmp_path / "final", rows, tmp_path / "after.jsonl") == 2
    assert "is not the one that the model was trained with" in capsys.readouterr().err
    assert not (tmp_path / "after.jsonl").exists()


def manifest_of(chat):
    return Manifest(
        stage="reward",
        base_model="tiny",
        **text_form(chat),
        head_kind="linear",
        head_dtype="float32",
        rewards=None,
        margin_statistics={},
        loss={},
        training_data="none",
    )


def test_an_output_of_other_data_is_not_overwritten(final, rows, tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    output.write_text('{"row": 1}\n' * 9)
    assert score(final, rows, output) == 2
    assert "holds 9 rows" in capsys.readouterr().err
    assert output.read_text() == '{"row": 1}\n' * 9


def test_a_missing_group_is_the_fault_of_its_row(final, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "the sun", "response": "is good"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"subset": "x"}) + "\n")
    assert score(final, path, tmp_path / "scores.jsonl", "--group-column", "subset") == 1
    first, second = read(tmp_path / "scores.jsonl")
    assert "group should be in 'subset'" in first["error"]
    assert second["group"] == "x" and "reward" in second


@pytest.mark.parametrize("eos", [None, "<|im_end|>"])
def test_a_manifest_of_an_earlier_version_is_accepted(final, rows, tmp_path, eos):
    shutil.copytree(final, tmp_path / "final")
    path = tmp_path / "final" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["ignore_merges"] = True  # as Llama 3's, which earlier versions did not look at
    path.write_text(json.dumps(settings))
    chat = load_chat(tmp_path / "final")
    named = {name: getattr(chat.tokenizer, name, None) for name in tokenizers._NAMED_TOKENS}
    named["eos_token"] = eos or named["eos_token"]
    former = digest(
        *tokenizers._model_parts(chat.tokenizer),
        json.dumps(named, sort_keys=True),
        json.dumps(chat.tokenizer(tokenizers._PROBE)["input_ids"]),
    )
    assert former != chat.tokenizer_digest
    write_manifest(tmp_path / "final", replace(manifest_of(chat), tokenizer_digest=former))
    assert score(tmp_path / "final", rows, tmp_path / "scores.jsonl") == 1  # for the one bad row
