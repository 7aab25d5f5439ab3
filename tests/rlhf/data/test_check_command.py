import argparse
import json

import pytest

from launch.commands import data
from rlhf.core.errors import DataError, ModelError


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
