import argparse
import json

import pytest

from launch.commands import data
from rlhf.core.errors import ConfigError, DataError, ModelError


@pytest.fixture
def check():
    """Run ``rlhf data check`` with these arguments and give its exit status."""
    parser = argparse.ArgumentParser()
    data.add_parser(parser.add_subparsers())

    def run(*arguments):
        options = parser.parse_args(["data", "check", *map(str, arguments)])
        return options.run(options)

    return run


def test_good_data_is_called_fit(check, write_rows, make_rows, capsys):
    train, evals = (
        write_rows("train.jsonl", make_rows(30)),
        write_rows("eval.jsonl", make_rows(5, word="rain")),
    )
    assert check(train, "--eval", evals) == 0
    printed = capsys.readouterr().out
    assert "30 x prompt text" in printed
    assert "Lengths in characters" in printed
    assert "100.0% (88.6%-100.0%)" in printed
    assert printed.endswith("Fit to train on.\n")


def test_unfit_data_gives_status_1_and_the_rows_to_look_at(check, write_rows, make_rows, capsys, tmp_path):
    rows = [
        *make_rows(4),
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ]
    path = write_rows("train.jsonl", [*rows, {"prompt": "[bold]p", "chosen": "", "rejected": "b"}])
    assert check(path, "--quarantine", tmp_path / "bad.jsonl") == 1
    printed = capsys.readouterr().out
    assert "both ways round: train.jsonl:" in printed
    assert "NOT FIT: train: 14.3% of the rows are bad, allowed are 1.0%" in printed
    assert "NOT FIT: train: 33.3% of the pairs contradict each other" in printed
    listed = json.loads((tmp_path / "bad.jsonl").read_text())
    assert (listed["line"], listed["reason"]) == (7, "empty text")


def test_columns_can_be_named(check, write_rows, capsys):
    path = write_rows("x.jsonl", [{"question": "p", "good": "a", "poor": "b", "margin": "none"}])
    names = (
        "--prompt-column",
        "question",
        "--chosen-column",
        "good",
        "--rejected-column",
        "poor",
        "--margin-column",
        "",
    )
    assert check(path, *names) == 0
    assert check(path) == 1


def test_a_model_folder_gives_tokens(check, write_rows, make_rows, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_rows("train.jsonl", make_rows(5))
    assert check(path, "--model", tmp_path / "model", "--max-tokens", 40) == 0
    printed = capsys.readouterr().out
    assert "Lengths in tokens" in printed
    assert "longer than 40 tokens" in printed
    with pytest.raises(ModelError, match="there is no such folder"):
        check(path, "--model", tmp_path / "nowhere")


def test_a_missing_file_is_a_fault_of_input(check, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        check(tmp_path / "x.jsonl")


def test_every_kind_of_rows_can_be_checked_and_is_guessed_from_its_columns(check, write_rows, capsys):
    talk = [{"from": "human", "value": "tea?"}, {"from": "gpt", "value": "no"}]
    rows = {
        "conversations": {"conversations": talk},
        "prompts": {"prompt": "tea?"},
        "labeled": {"prompt": "tea?", "completion": "no", "label": True},
        "pairs": {"prompt": "tea?", "chosen": "no", "rejected": "yes"},
    }
    for kind, row in rows.items():
        path = write_rows(f"{kind}.jsonl", [row, {**row, "extra": 1}])
        assert check(path) == 0
        printed = capsys.readouterr().out
        assert f"read as {kind}" in printed
        what = "for reward functions alone" if kind == "prompts" else "that are not read"
        assert f"columns {what}: extra" in printed
        assert check(path, "--kind", kind) == 0
    assert check(write_rows("sft.jsonl", [rows["conversations"]]), "--kind", "sft") == 0
    assert check(write_rows("kto.jsonl", [rows["labeled"]]), "--kind", "unpaired") == 0
    assert check(write_rows("sft.jsonl", [rows["conversations"]]), "--kind", "pairs") == 1
    assert "--kind conversations" in "".join(capsys.readouterr().out.split("\n")).replace("  ", "")


TURN = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("row", "settings", "kind"),
    [
        ({"messages": TURN, "good": "a", "bad": "b"}, ("chosen=good", "rejected=bad"), "pairs"),
        (
            {"prompt": "p", "replies": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]},
            ("answers=replies",),
            "pairs",
        ),
        ({"chosen": "the best", "output": "x", "prompt": "p"}, ("completion=output",), "conversations"),
        ({"messages": "ignored", "prompt": "p", "completion": "c", "ok": True}, ("label=ok",), "labeled"),
    ],
)
def test_what_rows_are_is_told_by_the_columns_that_are_set(check, write_rows, capsys, row, settings, kind):
    assert check(write_rows("rows.jsonl", [row]), *(f"data.columns.{setting}" for setting in settings)) == 0
    assert f"read as {kind}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"turns": [{"speaker": "a", "text": "b"}]}, "Columns of other names: data.columns.prompt=NAME"),
        ({"question": "q", "answer": "a", "rating": 5}, "One rated answer a row makes no pair"),
        ({"prompt": "q", "response": "a", "stars": 2}, 'a list "answers" of {"text": ..., "rating": ...}'),
    ],
)
def test_rows_that_lack_their_columns_are_told_how_to_name_them(check, write_rows, capsys, row, said):
    assert check(write_rows("rows.jsonl", [row]), "--kind", "pairs") == 1
    assert said in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_settings_are_spelled_as_in_recipes(check, write_rows, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_rows("x.jsonl", [{"q": "tea?", "more": "hot", "chosen": "no", "rejected": "yes"}])
    assert check(path, "data.columns.prompt=q", "data.columns.input=more") == 0
    model = ("--model", tmp_path / "model", "data.columns.prompt=q")
    assert check(path, *model, "data.template=chatml", "data.max_tokens=64") == 0
    with pytest.raises(ConfigError, match=r"columns\.promt"):
        check(path, "data.columns.promt=q")


def test_scores_that_contradict_the_pairs_make_data_unfit(check, write_rows, make_rows, capsys):
    rows = make_rows(20)
    for row in rows[:3]:
        row["chosen_score"], row["rejected_score"] = row["rejected_score"], row["chosen_score"]
    path = write_rows("x.jsonl", rows)
    assert check(path) == 1
    assert "in 15.0% of the pairs with scores, chosen has the lower one: are columns" in capsys.readouterr().out
    assert check(path, "--chosen-score-column", "", "--rejected-score-column", "") == 0


def test_answers_of_several_messages_and_a_single_prompt_are_named(check, write_rows, capsys):
    long = [{"role": role, "content": "so"} for role in ("assistant", "user", "assistant")]
    other = [[{"role": "assistant", "content": f"{number}"}] for number in range(3)]
    rows = [{"prompt": "tea?", "chosen": long, "rejected": each} for each in other]
    assert check(write_rows("x.jsonl", rows)) == 0
    printed = capsys.readouterr().out
    assert "answers of several messages count as a whole" in printed
    assert "all 3 pairs have the same prompt" in printed
    assert printed.endswith("Fit to train on, but see the warnings above.\n")


def test_a_recipe_is_checked_as_its_stage_would_read_it(check, write_rows, tiny_model, tmp_path, capsys):
    plain = write_rows("plain.jsonl", [{"prompt": f"p{n}", "chosen": "good", "rejected": "bad"} for n in range(20)])
    other = write_rows("other.jsonl", [{"question": f"q{n}", "good": "yes", "poor": "no"} for n in range(10)])
    recipe = tmp_path / "reward.yaml"
    recipe.write_text(
        f"output: {tmp_path}/run\nmodel: {{path: {tiny_model}}}\nmargin: {{kind: none}}\ndata:\n  train:\n"
        f"  - {plain}\n  - {{path: {other}, columns: {{prompt: question, chosen: good, rejected: poor}}}}\n"
    )
    assert check("--config", recipe) == 0
    printed = capsys.readouterr().out
    assert "30 x prompt text" in printed and "Lengths in tokens" in printed
    check("--config", recipe, "data.max_tokens=9")
    assert "longer than 9 tokens" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--config names the data already; leave out x\.jsonl"):
        check("x.jsonl", "--config", recipe)


def test_a_recipe_of_conversations_is_not_read_as_pairs(check, write_rows, tiny_model, tmp_path, capsys):
    rows = [{"q": f"p{n}", "a": "fine"} for n in range(9)]
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        f"output: {tmp_path}/run\nmodel: {{path: {tiny_model}}}\n"
        f"data: {{train: {write_rows('rows.jsonl', rows)}, columns: {{prompt: q, completion: a}}}}\n"
    )
    assert check("--config", recipe, "--stage", "sft") == 0
    assert capsys.readouterr().out.endswith("Fit to train on.\n")
