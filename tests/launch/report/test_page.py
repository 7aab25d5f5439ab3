"""The page: what it says, that nothing in it runs but its own script, and that it needs nothing else."""

import base64
import hashlib
import io
import json
import math
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.cli import main
from launch.commands.report import end_with_report
from launch.report.diff import marked
from launch.report.figures import Figure, Line, smoothed, thinned
from launch.report.frontier import frontier_of, parting
from launch.report.page import embedded, is_current, render, report_of, write_report
from launch.report.reading import read_runs
from launch.report.svg import draw, ticks_between
from rlhf.core.files import write_json, write_text
from rlhf.train.status import new_status, write_status
from tests.launch.report.made_up import (
    HOSTILE,
    benchmark_run,
    evaluate_run,
    judged_pipeline,
    lines,
    pipeline,
    ppo_run,
    preference_run,
    reward_run,
    sft_run,
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return render(report_of([pipeline(tmp_path_factory.mktemp("runs") / "study", text=HOSTILE)]))


def test_hostile_texts_are_shown_and_are_no_markup(page):
    assert "window.hacked = 1" in page
    assert "<script>window" not in page and "<img" not in page
    assert page.count("<script") == 2  # the figures' numbers, and the page's own script


def test_only_the_pages_own_script_may_run(page):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    (own,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert "default-src &#39;none&#39;" in policy and f"script-src &#39;sha256-{digest}&#39;;" in policy
    assert "connect-src &#39;none&#39;" in policy


def test_the_page_refers_to_nothing_outside_itself(page):
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page)) == {"data:,"}
    targets = set(re.findall(r'href="#([^"]+)"', page))
    assert targets <= set(re.findall(r'id="([^"]+)"', page))


@pytest.mark.parametrize("text", ["</script><script>x", "<!-- <script>", "&lt;", "\u2028"])
def test_no_text_ends_the_element_that_holds_the_numbers(text):
    assert not set("<>&\u2028") & set(embedded({"name": text}))


def test_every_figure_of_every_stage_is_there(page):
    for key in ("reward-margins", "reward-margin-gap", "reward-margin-similarity", "reward-calibration", "reward-gaps"):
        assert f'id="{key}"' in page
    for key in ("preference-drift-of-log-probabilities", "preference-resting", "ppo-frontier", "ppo-kl", "ppo-entropy"):
        assert f'id="{key}"' in page
    for key in ("ppo-length", "evaluate-rewards", "evaluate-reward-kl", "cost-tokens", "cost-memory"):
        assert f'id="{key}"' in page
    for title in ("Misranked pairs", "Hard pairs", "Easy pairs", "Largest gains", "Held-out prompts"):
        assert title in page


def test_responses_without_a_reward_are_shown_and_are_no_gain(tmp_path):
    ppo, evaluation = ppo_run(tmp_path / "p" / "ppo"), evaluate_run(tmp_path / "p" / "evaluate")
    for path in (ppo / "rollouts.jsonl", evaluation / "samples_ppo.jsonl"):
        first, *others = [json.loads(line) for line in path.read_text().splitlines()]
        lines(path, [first | {"reward": None}, *others])
    report = report_of([tmp_path / "p"])
    readings = {each.title: each.passages for section in report.sections for each in section.readings}
    assert readings["Rollouts of the first and of the last step"][0].title.startswith(
        "step 1, prompts.jsonl:1: reward none"
    )
    assert readings["Evenly spread prompts"][0].texts[1].title == "ppo: none"
    for kind in ("Largest gains", "Largest losses"):
        assert readings[kind] and "prompt 1" not in {each.title for each in readings[kind]}


def test_benchmarks_and_fine_tuning_have_their_sections(tmp_path):
    benchmark_run(tmp_path / "p" / "bench", text=HOSTILE)
    sft_run(tmp_path / "p" / "tune")
    report = report_of([tmp_path / "p"])
    page, said = render(report), report.lines()
    assert any(line.startswith("Benchmarks: Accuracy on hh: ") and "40 items" in line for line in said)
    assert "Supervised fine-tuning: Perplexity 7.389 on 30 held-out conversations." in said
    assert 'id="benchmark-benchmark"' in page and 'id="sft-loss"' in page and "note" in page
    assert "<script>window" not in page
    figure = next(each for each in report.figures if each.key == "benchmark-benchmark")
    assert [line.name for line in figure.lines] == ["model", "longer answer wins", "wrong prompt"]
    for key in ("rewards", "calibration", "by_length_difference", "by_score_gap"):
        assert f'id="benchmark-{key}"' in page
    rewards = next(each for each in report.figures if each.key == "benchmark-rewards")
    right, wrong = (np.average(line.x, weights=line.y) for line in rewards.lines)
    assert right - wrong == pytest.approx(1.0, abs=0.4)
    assert [sum(line.y) for line in rewards.lines] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("by_length", "elsewhere", "told"),
    [
        (0.3, 0.4, []),
        (0.3, 0.62, ["hh: under another item's prompt it does as well (62.0 %)"]),
        (0.9, 0.4, ["hh: it is no better than a rule that takes the longer answer (90.0 %)"]),
        (0.3, None, []),
    ],
)
def test_a_benchmark_that_length_or_a_wrong_prompt_would_pass_is_doubted(tmp_path, by_length, elsewhere, told):
    found = json.loads((benchmark_run(tmp_path / "bench") / "evaluation.json").read_text())
    (first, *_), (length, *_), (wrong, *_) = (found[name] for name in ("measures", "by_length", "wrong_prompt"))
    found["measures"] = [first | {"value": 0.7, "low": 0.6, "high": 0.8}]
    found["by_length"] = [length | {"value": by_length}]
    found["wrong_prompt"] = [] if elsewhere is None else [wrong | {"value": elsewhere}]
    write_json(tmp_path / "bench" / "evaluation.json", found)
    said = [each.text for each in report_of([tmp_path / "bench"]).advice]
    assert [text.partition(": it judges")[0].removesuffix(".") for text in said] == told


def test_a_stage_of_which_nothing_is_to_be_said_has_no_section(tmp_path):
    folder = reward_run(tmp_path / "p" / "reward").parent / "backbone"
    write_status(folder, new_status("import", state="finished"))
    report = report_of([folder.parent])
    assert [section.title for section in report.sections] == ["Reward model"]
    assert [each.run.name for each in report.abouts] == ["backbone", "reward"]


def test_steps_are_those_of_training_alone(tmp_path):
    folder = reward_run(tmp_path / "p" / "reward").parent / "evaluate"
    write_status(evaluate_run(folder), new_status("evaluation", state="finished", step=85, total=85))
    write_json(folder.parent / ".pipeline" / "evaluate.json", {"output": str(folder), "seconds": 60.0})
    report = report_of([folder.parent])
    rows = {row[0].text: row[1].text for row in report.costs[0].rows}
    assert rows == {"reward": "40", "evaluate": "–"}
    facts = {each.run.name: dict(each.facts) for each in report.abouts}
    assert "step" not in facts["evaluate"] and facts["reward"]["step"] == "40 of 40"


@pytest.mark.parametrize(
    ("hosts", "start"),
    [
        (["a"], "python -m reward "),
        (["a", "a"], "torchrun --nproc-per-node=2 -m reward "),
        (
            ["a", "a", "b", "b"],
            "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --nproc-per-node=2 -m reward ",
        ),
    ],
)
def test_the_command_that_repeats_a_run_has_its_ranks(tmp_path, hosts, start):
    folder = reward_run(tmp_path / "reward")
    ranks = [{"host": host, "device": "cpu", "device_bytes": None} for host in hosts]
    write_json(folder / "environment.json", {"ranks": ranks})
    report = report_of([folder])
    assert report.abouts[0].command == f"{start}--config {folder}/config.yaml output=FOLDER"
    assert (f"on each of its {len(set(hosts))} hosts" in render(report)) == (len(set(hosts)) > 1)


def test_planned_memory_has_a_column_where_it_is_known(tmp_path):
    folder = reward_run(tmp_path / "reward")
    (without,), (beside,) = report_of([folder]).costs, report_of([folder], planned={"reward": 2.0**30}).costs
    assert "planned GiB" not in without.headings and "rlhf report adds" in without.note
    assert beside.headings[-1] == "planned GiB" and beside.rows[0][-1].text == "1.00"
    assert all(len(each.rows[0]) == len(each.headings) for each in (without, beside))


def test_no_line_ends_between_a_number_and_its_sign(page):
    assert "95\N{NO-BREAK SPACE}% interval" in page and "75.0\N{NO-BREAK SPACE}% of" in page


def test_what_rlhf_evaluate_wrote_by_hand_is_shown_too(tmp_path):
    for make, name in ((benchmark_run, "bench"), (evaluate_run, "policies")):
        make(tmp_path / "p" / name)
        (tmp_path / "p" / name / "status.json").unlink()
    choices = [
        {"n": n, "kl": n - 1.0, "proxy": {"value": n, "low": n - 1, "high": n + 1}, "gold": gold}
        for n, gold in ((1, {"value": 0.2, "low": 0.1, "high": 0.3}), (4, {"value": 0.5, "low": 0.4, "high": 0.6}))
    ]
    write_json(tmp_path / "p" / "choices" / "evaluation.json", {"kind": "best_of_n", "choices": choices})
    report = report_of([tmp_path / "p"])
    assert {section.title for section in report.sections} == {"Benchmarks", "Policies compared", "Best of n"}
    line = "Best of n: The gold reward is highest for the best of 4, at a KL of 3.00 nats: 0.500."
    assert line in report.lines() and "best-of-n-best-gold" in render(report)


def test_judged_answers_are_shown_with_their_texts_inert(tmp_path):
    report = report_of([judged_pipeline(tmp_path / "p", text=HOSTILE)])
    said, page = report.lines(), render(report)
    won = f"Win rates: {HOSTILE} new wins 65.0 % against old (standard error 5.7 %, 60 questions): better"
    assert any(line.startswith(won) for line in said)
    assert any(
        line.startswith("Graded answers: dpo is graded 6.11 of 10") and line.endswith("better.") for line in said
    )
    cost = f"{HOSTILE} task, acc: 0.5000 before, 0.4600 after (change -0.0600 to -0.0200, 400 items): cost."
    assert f"What training has cost: {cost}" in said and f"warning: win_rate: {HOSTILE} note" in said
    assert "<script>window" not in page and "own answer" in page and 'data-radar="8"' in page
    figure = next(each for each in report.figures if each.key == "grade-radar")
    assert figure.categories[:3] == ("writing", "roleplay", "reasoning") and figure.to_dict()["radar"] == 10


def test_warnings_are_said_once_with_what_to_change(tmp_path):
    reward_run(tmp_path / "p" / "reward", text="odd")
    preference_run(tmp_path / "p" / "preference")
    said = report_of([tmp_path / "p"]).lines()
    assert [line for line in said if "odd warning" in line] == ["warning: reward: odd warning: set a=b"]
    assert any("lost 0.60 nats per token" in line and "loss.nll_weight" in line for line in said)
    assert any("67% of the pairs of the last step rest" in line for line in said)


def test_steps_that_were_not_logged_count_in_minutes_and_among_the_skipped(tmp_path):
    folder = reward_run(tmp_path / "reward", steps=40)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines(
        folder / "metrics.jsonl",
        [row | {"step_skipped": float(row["step"] == 40)} for row in rows if not row["step"] % 10],
    )
    lines(folder / "skipped.jsonl", [{"step": step, "not_finite": "loss", "rows": []} for step in (3, 7, 40)])
    write_status(folder, new_status("reward", state="finished", step=40, total=40, metrics={"time/minutes": 1.25}))
    report = report_of([folder])
    (row,) = report.costs[0].rows
    assert row[report.costs[0].headings.index("minutes in steps")].order == 1.25
    assert any("3 steps were skipped" in line for line in report.lines())


def test_compared_runs_share_figures_and_lead_to_each_other(tmp_path):
    folders = [reward_run(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    page = render(report_of(folders))
    assert page.count('id="reward-loss"') == 1
    assert "Settings that differ: reward" in page and "train.seed" in page
    card = page.partition('id="run-0"')[2].partition("</article>")[0]
    assert '<a href="#run-1">second</a>' in card
    assert page.count('<a href="#run-1">second</a>') >= 3  # of tables, too


# The frontier


def test_the_second_scorer_parts_at_its_peak(tmp_path):
    (run,) = read_runs([ppo_run(tmp_path / "ppo")])
    found = frontier_of(run)
    assert found is not None and found.parted == 6
    assert (found.steps[6], found.kl[6]) == (7, 10.5)
    said = report_of([run.folder]).lines()
    assert any("parted at step 7, at a KL of 10.5 nats" in line for line in said)
    assert any("kl.coefficient" in line and line.startswith("warning") for line in said)


def test_scorers_that_rise_together_have_not_parted(tmp_path):
    folder = ppo_run(tmp_path / "ppo", parts=False)
    assert any("have not parted" in line for line in report_of([folder]).lines())


@pytest.mark.parametrize(
    ("proxy", "gold", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 0.9, 0.6], None),  # fell, but not by enough
        ([0, 1, 2, 3], [0, 1, 0.9, 0.5], 1),
        ([0, 3, 2, 1], [0, 1, 0.5, 0.0], None),  # both fell
        ([0], [0], None),
    ],
)
def test_parting_by_hand(proxy, gold, expected):
    assert parting(proxy, gold) == expected


# Pieces


@given(st.text(), st.text())
def test_a_marked_text_is_still_the_text(before, after):
    assert "".join(part for part, _ in marked(before, after)) == after


def test_marked_words_are_those_that_were_not_there():
    assert marked("a red fox", "a grey fox ran") == (
        ("a ", False),
        ("grey", True),
        (" fox", False),
        (" ran", True),
    )


def test_smoothing_and_thinning_by_hand():
    assert smoothed([2, 4, 6, 8], 2) == [2, 3, 5, 7]
    assert thinned([1.0] * 3) == [1.0] * 3
    long = thinned([float(value) for value in range(1000)])
    assert len(long) == 400 and sum(long) / 400 == pytest.approx(499.5, abs=0.5)


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("spike", [0.0, 1e17, -3e300])
def test_behind_a_spike_the_means_are_as_without_it(window, spike):
    values = [1.0, 2.0, spike, *(float(value % 5) for value in range(20))]
    expected = [math.fsum(values[max(0, at + 1 - window) : at + 1]) / min(at + 1, window) for at in range(len(values))]
    assert smoothed(values, window) == pytest.approx(expected, rel=1e-12)


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6))
def test_ticks_are_round_and_within(low, span):
    found = ticks_between(low, low + span)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)


@pytest.mark.parametrize("kind", ["line", "points", "bars"])
@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [-1.0, 5.0, 2.0], [1.0, 1.0 + 2**-52], [-1e-6, -1.0000000000000002e-6], [1e300, 2e300]],
)
def test_figures_are_drawn_whatever_they_hold(kind, values):
    line = Line(name=HOSTILE, x=[*range(len(values))], y=values, low=values, high=values, kind=kind)
    drawn = draw(
        Figure(key="k", title="t", x=HOSTILE, y="y", lines=(line,), categories=(HOSTILE,), marks=((0, HOSTILE),))
    )
    assert "nan" not in drawn and "<script" not in drawn and "<img" not in drawn


@pytest.mark.parametrize("content", ["[1]", '{"rows": 3}', "null"])
def test_a_study_of_another_program_is_let_be(tmp_path, content):
    reward_run(tmp_path / "p" / "reward")
    (tmp_path / "p" / "study.json").write_text(content)
    assert [section.key for section in report_of([tmp_path / "p"]).sections] == ["reward"]


@pytest.mark.parametrize("content", ['{"accuracy": 0.7}', '{"accuracy": {"value": 0.7}}'])
def test_what_cannot_be_drawn_is_said_and_the_work_before_it_counts(tmp_path, content):
    folder = reward_run(tmp_path / "p" / "reward")
    (folder / "evaluation.json").write_text(content)
    screen = Console(file=io.StringIO())
    end_with_report(screen, tmp_path / "p")
    assert screen.file.getvalue().startswith("no report: ")


def test_a_page_is_current_until_a_run_has_something_new(tmp_path):
    folder = reward_run(tmp_path / "run" / "reward")
    report = report_of([tmp_path / "run"])
    page = tmp_path / "run" / "report.html"
    assert not is_current(page, report)
    write_report(page, report, interactive=False)
    assert is_current(page, report)
    later = page.stat().st_mtime_ns + 1
    os.utime(folder / "metrics.jsonl", ns=(later, later))
    assert not is_current(page, report)


# The command


def test_the_command_writes_the_page_and_says_the_same_in_short(tmp_path, capsys):
    folder = evaluate_run(tmp_path / "evaluate")
    assert main(["report", str(folder), "-o", str(tmp_path / "out.html"), "--no-plan"]) == 0
    said = capsys.readouterr().out
    assert "Policy ppo gains +0.500 of reward over reference" in said
    assert "(95 % interval +0.300 to +0.700, 6 prompts): better." in said
    assert said.endswith(f"report: {tmp_path}/out.html\n")
    assert "gains +0.500 of reward" in (tmp_path / "out.html").read_text()


def test_a_folder_as_output_and_a_run_that_is_none_are_refused(tmp_path, capsys):
    folder = evaluate_run(tmp_path / "evaluate")
    assert main(["report", str(folder), "-o", str(tmp_path)]) == 2
    assert "a folder; expected a file" in capsys.readouterr().err
    write_text(tmp_path / "file", "x")
    assert main(["report", str(tmp_path / "file")]) == 2
    assert "file: no such folder" in capsys.readouterr().err
