"""Answers to questions in the formats of benchmarks."""

import json
from dataclasses import replace
from datetime import datetime
from decimal import Decimal

import pytest
from pyarrow import parquet, table

from launch.cli import main
from policy.answers import run as answering
from policy.answers.config import GenerateConfig
from policy.answers.formats import Answer, format_of, read_question, written
from policy.answers.run import generate, name_of
from policy.evaluation.compare import evaluate_policies
from policy.evaluation.options import SamplingSettings
from rlhf.config import load_config
from rlhf.core.errors import ConfigError, DataError
from rlhf.engine.ranks import single_rank

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["the sun", "and rain?"]},
    {"question_id": 111, "category": "math", "turns": ["a tax form"]},
]
ALPACA = [{"instruction": "the sun", "dataset": "koala"}, {"instruction": "a tax form", "dataset": "vicuna"}]
ARENA = [{"question_id": "a", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "the sun"}]}]
ARENA_2 = [{"uid": "u", "category": "hard_prompt", "prompt": "the sun"}]
PROMPTS = [{"prompt": "the sun"}, {"messages": [{"role": "system", "content": "so"}, {"role": "user", "content": "x"}]}]
SHORT = SamplingSettings(samples=1, max_new_tokens=5, batch_rows=1)


@pytest.fixture
def questions(tmp_path):
    def write(rows):
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def answer(tiny_model, tmp_path, questions):
    def start(rows, output="out", **changes):
        given = {"prompts": questions(rows), "sampling": SHORT, **changes}
        config = GenerateConfig(output=tmp_path / output, model=tiny_model, **given)
        config.output.mkdir(exist_ok=True)
        return generate(config, single_rank())

    return start


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (MT_BENCH, "mt_bench"),
        (ALPACA, "alpaca_eval"),
        (ARENA, "arena_hard"),
        (ARENA_2, "arena_hard"),
        (PROMPTS, "prompts"),
    ],
)
def test_columns_tell_the_format(rows, kind):
    assert {format_of(row) for row in rows} == {kind}


def test_answers_of_alpaca_eval(answer, tiny_model):
    path = answer(ALPACA)
    rows = json.loads(path.read_text())
    assert path.name == "outputs.json"
    assert [row["instruction"] for row in rows] == ["the sun", "a tax form"]
    assert {row["generator"] for row in rows} == {tiny_model.name} and rows[1]["dataset"] == "vicuna"
    assert all(row["output"] for row in rows)


def test_a_second_turn_is_asked_behind_the_answer_to_the_first(answer, monkeypatch):
    seen = []
    draw = answering.draw

    def watched(model, chat, asked, seeds, settings, **further):
        seen.append((asked, settings.temperature, settings.top_k))
        return draw(model, chat, asked, seeds, settings, **further)

    monkeypatch.setattr(answering, "draw", watched)
    path = answer(MT_BENCH, sampling=replace(SHORT, samples=2))
    writing, math = lines(path)
    assert (path.parent.name, path.name) == ("model_answer", "model.jsonl")
    assert writing["question_id"] == 81 and [choice["index"] for choice in writing["choices"]] == [0, 1]
    assert [len(choice["turns"]) for choice in (*writing["choices"], *math["choices"])] == [2, 2, 1, 1]
    assert len({choice["turns"][0] for choice in writing["choices"]}) == 2, "at temperature .7"
    assert len({choice["turns"][0] for choice in math["choices"]}) == 1, "greedy"
    first = writing["choices"][1]["turns"][0]
    assert [
        {"role": "user", "content": "the sun"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and rain?"},
    ] in [list(each) for asked, _, _ in seen for each in asked]
    assert {(temperature, top_k) for _, temperature, top_k in seen} == {(0.7, 0), (1.0, 1)}


def test_the_answers_are_those_of_an_evaluation_with_the_same_seed(answer, tiny_model, tmp_path):
    rows = lines(answer([*PROMPTS[:1], {"prompt": "a tax form"}], sampling=replace(SHORT, samples=3)))
    evaluate_policies(
        {}, tiny_model, ["the sun", "a tax form"], lambda answers: [0.0] * len(answers), template=None,
        settings=replace(SHORT, samples=3), output=tmp_path / "evaluation",
    )  # fmt: skip
    samples = lines(tmp_path / "evaluation" / "samples_reference.jsonl")
    assert [row["response"] for row in rows] == [row["response"] for row in samples]
    assert [row["row"] for row in rows[::3]] == ["questions.jsonl:1", "questions.jsonl:2"]


def test_a_stopped_run_goes_on_behind_what_it_has_kept(answer, monkeypatch, tmp_path):
    whole = answer(MT_BENCH, "whole").read_text().split('"tstamp"')[0]
    draw, calls = answering.draw, []

    def stops(*given, **further):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*given, **further)

    monkeypatch.setattr(answering, "draw", stops)
    with pytest.raises(KeyboardInterrupt):
        answer(MT_BENCH)
    kept = tmp_path / "out" / "answers.jsonl"
    assert len(kept.read_text().splitlines()) == 3, "what it answers, and two turns"
    with kept.open("ab") as handle:
        handle.write('{"place": [0, 0, 1], "text": "\u00e9'.encode()[:-1])  # killed within a character
    calls.clear()
    monkeypatch.setattr(answering, "draw", lambda *given, **further: calls.append(given) or draw(*given, **further))
    assert answer(MT_BENCH).read_text().split('"tstamp"')[0] == whole
    assert len(calls) == 1
    before = kept.read_text()
    answer(MT_BENCH)
    assert len(calls) == 1 and kept.read_text() == before, "nothing is asked again"


@pytest.mark.parametrize("end", ["\u2028", "\x85"])
def test_an_answer_with_an_end_of_line_of_another_kind_is_kept_whole(answer, tmp_path, monkeypatch, end):
    draw = answering.draw
    says = lambda *given, **further: [replace(each, text=f"one{end}two") for each in draw(*given, **further)]  # noqa: E731
    monkeypatch.setattr(answering, "draw", says)
    answer(ALPACA[:1])
    kept = (tmp_path / "out" / "answers.jsonl").read_bytes()
    answer(ALPACA[:1])
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == kept


@pytest.mark.dist
def test_two_ranks_answer_what_one_answers_though_one_has_less_to_do(run_ranks, tiny_model, questions, tmp_path):
    path = questions(PROMPTS[:1] * 3)  # three batches of one row on two ranks
    for ranks in (1, 2):
        run_ranks(
            [
                "-m", "policy.answers", f"output={tmp_path / str(ranks)}", f"model={tiny_model}", f"prompts={path}",
                "sampling={samples: 1, max_new_tokens: 4, batch_rows: 1}",
            ],
            ranks=ranks, timeout=60,
        )  # fmt: skip
    one, two = ((tmp_path / str(ranks) / "responses.jsonl").read_text() for ranks in (1, 2))
    assert one == two and len(one.splitlines()) == 3


def test_the_columns_of_a_table_stay_beside_the_answers_where_json_has_words_for_them(answer, tmp_path):
    rows = {
        "prompt": ["x", "y"],
        "when": [datetime(2026, 1, 2)] * 2,
        "image": [b"\x00"] * 2,
        "cost": [Decimal("1.5")] * 2,
    }
    parquet.write_table(table(rows), tmp_path / "rows.parquet")
    first, _ = lines(answer([], prompts=tmp_path / "rows.parquet"))
    assert (first["when"], first["image"], first["cost"]) == ("2026-01-02 00:00:00", None, "1.5")


@pytest.mark.parametrize("changes", [{"sampling": replace(SHORT, seed=1)}, {"system_prompt": "be brief"}, {}])
def test_answers_by_other_settings_or_to_other_questions_are_not_mixed(answer, changes):
    answer(ALPACA)
    with pytest.raises(ConfigError, match=r"answers\.jsonl: holds answers of another model, to other questions or by"):
        answer(ALPACA if changes else ALPACA[:1], **changes)
    answer(ALPACA, sampling=replace(SHORT, batch_rows=2), name="other")


def test_arena_hard_has_two_formats():
    for rows, expected in (
        (
            ARENA,
            {
                "question_id": "a",
                "model_id": "m",
                "choices": [{"index": 0, "turns": [{"content": "t", "token_len": 3}]}],
            },
        ),
        (ARENA_2, {"uid": "u", "model": "m", "metadata": {"token_len": 3}}),
    ):
        question = read_question("arena_hard", rows[0], "q:1")
        row = json.loads(written("arena_hard", [question], [[[Answer(text="t", tokens=3, ended=True)]]], "m", 1.5))
        assert row | expected == row and row["tstamp"] == 1.5
    assert row["messages"] == [
        {"role": "user", "content": "the sun"}, {"role": "assistant", "content": {"answer": "t"}}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("mt_bench", ALPACA[0], r"q:7: missing column: expected question_id and a list of turns; the row has instr"),
        ("mt_bench", {"question_id": 1, "turns": []}, "a list of turns"),
        ("mt_bench", {"question_id": 1, "turns": ["a", ""]}, "a question is .*expected a text"),
        ("alpaca_eval", {"prompt": "x"}, "expected a text; a file of AlpacaEval: rows with instruction"),
        ("alpaca_eval", ["x"], "expected an object with columns"),
        ("prompts", {"text": "x"}, "q:7: missing column"),
    ],
)
def test_a_row_of_another_format_is_named(kind, row, message):
    with pytest.raises(DataError, match=message):
        read_question(kind, row, "q:7")


def test_a_format_without_a_place_for_samples_refuses_them_before_anything_is_drawn(answer, monkeypatch):
    monkeypatch.setattr(answering, "open_policy", None)
    with pytest.raises(DataError, match="alpaca_eval has one answer to a question; set it to 1"):
        answer(ALPACA, sampling=replace(SHORT, samples=2))
    with pytest.raises(DataError, match="there are no questions"):
        answer([], "other")


def test_the_sampling_of_the_margin_paper_is_a_preset_that_single_settings_win_over():
    def config(*overrides):
        given = ["output=o", "model=m", "prompts=p", *overrides]
        return load_config(GenerateConfig, [], given, program="policy.answers")

    sampling = config("preset=margin_paper", "sampling.top_p=.5").sampling
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.7, 0.5, 1.1)
    assert (sampling.max_new_tokens, sampling.samples) == (1024, 1)
    assert not config("preset=greedy").category_temperatures and config().category_temperatures


def test_a_policy_is_called_by_its_run(tmp_path):
    assert name_of(tmp_path / "dpo" / "final") == "dpo" and name_of(tmp_path / "SmolLM2") == "SmolLM2"


def test_the_command(tiny_model, questions, tmp_path, capsys):
    given = ["generate", "--model", str(tiny_model), "--prompts", str(questions(PROMPTS)), "-o", str(tmp_path / "out")]
    assert main([*given, "--max-new-tokens", "3", "--template", "plain", "--system-prompt", "be brief"]) == 0
    assert f"answers: {tmp_path / 'out' / 'responses.jsonl'}" in capsys.readouterr().out
    first, second = lines(tmp_path / "out" / "responses.jsonl")
    assert first["prompt"][0] == {"role": "system", "content": "be brief"} and second["prompt"][0]["content"] == "so"
