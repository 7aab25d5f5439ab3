"""The audit of labels: planted wrong ones are found and counted; nothing is said that the data does not carry."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from launch.cli import main
from reward.__main__ import main as reward_main
from reward.audit import features
from reward.audit.estimate import OutOfFold, audited
from reward.audit.margins import Differences, folds_of
from reward.audit.mixture import Interval, fit_mixture, log_likelihoods, posterior_wrong, share_interval
from reward.audit.run import AuditOptions, audit_file
from reward.audit.verdict import verdict
from rlhf.core.errors import DataError, UserError
from rlhf.data.options import ColumnConfig
from rlhf.models.options import BackboneConfig
from rlhf.train.chat import load_chat


def planted_margins(share, pairs=8_000, temperature=2.0, seed=0):
    """Margins whose labels are right with the probability that they claim, then wrong in a share of the pairs."""
    draw = np.random.default_rng(seed)
    gaps = draw.normal(0, 3, pairs)
    right = np.where(draw.random(pairs) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)
    return np.where(draw.random(pairs) < share, -right, right) * temperature


@pytest.mark.parametrize("share", [0.0, 0.07, 0.2, 0.4])
def test_the_mixture_finds_the_share_of_wrong_labels_and_the_temperature(share):
    found = fit_mixture(planted_margins(share))
    assert found.share == pytest.approx(share, abs=0.03)
    if share < 0.3:  # with more wrong labels, many pairs of temperature and share are about as likely
        assert found.temperature == pytest.approx(2.0, rel=0.2)


def test_no_other_share_makes_the_labels_likelier():
    margins = planted_margins(0.15, pairs=500)
    found = fit_mixture(margins)
    draw = np.random.default_rng(1)
    for share, temperature in zip(draw.uniform(0, 0.5, 300), np.exp(draw.uniform(-2, 2, 300)), strict=True):
        assert log_likelihoods(margins, share, temperature).mean() <= found.log_likelihood + 1e-4


def test_the_posterior_is_bayes_rule():
    margins = np.array([-7.0, -0.3, 0.0, 2.5, 40.0])
    found = posterior_wrong(margins, 0.2, 1.5)
    for margin, value in zip(margins, found, strict=True):
        right = 1 / (1 + math.exp(-margin / 1.5))
        joint_wrong, joint_right = 0.2 * (1 - right), 0.8 * right
        assert value == pytest.approx(joint_wrong / (joint_wrong + joint_right), abs=1e-12)


def test_where_nothing_is_wrong_no_pair_is_suspected_however_small_its_margin():
    np.testing.assert_array_equal(posterior_wrong(np.array([-50.0, 0.0, 3.0]), 0.0, 1.0), np.zeros(3))


def test_expected_wrong_labels_are_as_many_as_the_share_says():
    margins = planted_margins(0.25)
    found = fit_mixture(margins)
    assert posterior_wrong(margins, found.share, found.temperature).mean() == pytest.approx(0.25, abs=0.03)


def test_intervals_hold_the_true_share_about_as_often_as_they_say():
    groups = np.arange(600, dtype=np.uint64)
    held = 0
    for seed in range(20):
        found = share_interval(planted_margins(0.2, pairs=600, seed=seed), groups, resamples=100)
        held += found.low - 1e-9 <= 0.2 <= found.high + 1e-9
    assert held >= 16


@pytest.mark.parametrize("margins", [[], [1.0, math.nan], [math.inf, 2.0]])
def test_margins_that_are_not_finite_are_refused(margins):
    with pytest.raises(ValueError, match="finite margins"):
        fit_mixture(np.array(margins))


def test_pairs_of_a_prompt_share_a_fold_and_folds_are_alike_in_size():
    groups = np.random.default_rng(0).integers(0, 40, 500).astype(np.uint64)
    fold_of = folds_of(groups, 5, seed=3)
    assert all(len(set(fold_of[groups == group])) == 1 for group in groups)
    sizes = np.bincount(fold_of)
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= np.bincount(groups.astype(int)).max()


def random_pairs(pairs, features=8):
    chosen, rejected = np.random.default_rng(0).normal(size=(2, pairs, features))
    return chosen + 0.4 * np.arange(features) / features, rejected


def test_margins_are_those_of_ridge_regressions_on_the_other_folds():
    chosen, rejected = random_pairs(70)
    labels = np.where(np.random.default_rng(1).random(70) < 0.3, -1.0, 1.0)
    fold_of = folds_of(np.arange(70, dtype=np.uint64), 4, seed=0)
    found = Differences.of(chosen, rejected).out_of_fold_margins(fold_of, [1.0, 3.0], 0.0, labels)[1]
    spread = np.concatenate([chosen, rejected]).std(0)
    for pair in range(70):
        others = [other for other in range(70) if fold_of[other] != fold_of[pair]]
        rows = labels[others, None] * (chosen[others] - rejected[others]) / spread
        every = ((chosen - rejected) / spread) ** 2
        penalty = 3.0 * every.sum() / 8
        stacked = np.concatenate([rows, math.sqrt(penalty) * np.eye(8)])
        head = np.linalg.lstsq(stacked, np.concatenate([np.ones(len(others)), np.zeros(8)]), rcond=None)[0]
        expected = labels[pair] * ((chosen[pair] - rejected[pair]) / spread) @ head
        assert found[pair] == pytest.approx(expected, abs=1e-10)


def test_the_label_of_a_pair_has_no_say_in_its_own_margin():
    chosen, rejected = random_pairs(60)
    fold_of = folds_of(np.arange(60, dtype=np.uint64), 4, seed=0)
    pairs, labels, pair = Differences.of(chosen, rejected), np.ones(60), 17
    before = pairs.out_of_fold_margins(fold_of, [1.0], 0.0, labels)[0]
    labels[pair] = -1
    after = pairs.out_of_fold_margins(fold_of, [1.0], 0.0, labels)[0]
    assert after[pair] == pytest.approx(-before[pair], rel=1e-9) and before[pair] != 0
    others = (fold_of == fold_of[pair]) & (np.arange(60) != pair)
    np.testing.assert_allclose(after[others], before[others], rtol=1e-9)
    assert not np.allclose(after[fold_of != fold_of[pair]], before[fold_of != fold_of[pair]])


def shared_answers(pairs=60, answers=45):
    """Pairs of answers that stand in several of them; the last ten share none."""
    draw = np.random.default_rng(5)
    numbers = np.array([draw.choice(answers, size=2, replace=False) for _ in range(pairs)])
    numbers[-10:] = answers + np.arange(20).reshape(10, 2)
    states = draw.normal(size=(answers + 20, 6))
    worth = states @ draw.normal(size=6) + 2 * draw.normal(size=len(states))
    swap = worth[numbers[:, 0]] < worth[numbers[:, 1]]
    numbers[swap] = numbers[swap, ::-1]
    return states, numbers


@pytest.mark.parametrize("effect", [0.3, 2.0])
def test_margins_with_answers_of_their_own_worth_are_those_of_ridge_regressions_on_their_columns(effect):
    states, numbers = shared_answers()
    labels = np.where(np.random.default_rng(1).random(60) < 0.3, -1.0, 1.0)
    fold_of = folds_of(np.arange(60, dtype=np.uint64), 4, seed=0)
    pairs = Differences.of(states[numbers[:, 0]], states[numbers[:, 1]], numbers)
    found = pairs.out_of_fold_margins(fold_of, [1.0, 3.0], effect, labels)[1]
    own = np.zeros((60, len(states)))
    own[np.arange(60), numbers[:, 0]] = 1
    own[np.arange(60), numbers[:, 1]] = -1
    penalty = math.sqrt(3.0 * np.square(pairs.values).sum() / 6)
    rows = np.concatenate([pairs.values, own * math.sqrt(effect)], axis=1)
    ridge = np.diag([penalty] * 6 + [1.0] * len(states))
    for fold in range(4):
        seen = fold_of != fold
        stacked = np.concatenate([rows[seen], ridge])
        head = np.linalg.lstsq(stacked, np.concatenate([labels[seen], np.zeros(len(ridge))]), rcond=None)[0]
        np.testing.assert_allclose(found[~seen], (labels * (rows @ head))[~seen], atol=1e-10)


def test_pairs_that_share_answers_find_each_others_wrong_labels():
    states, numbers = shared_answers(pairs=900, answers=120)
    labels = np.where(np.random.default_rng(2).random(900) < 0.2, -1.0, 1.0)
    groups = np.arange(900, dtype=np.uint64)
    areas = []
    for answers in (None, numbers):
        sides = states[numbers[:, 0]], states[numbers[:, 1]]
        found = audited(
            OutOfFold(differences=Differences.of(*sides, answers), prompts=groups, groups=groups, labels=labels),
            repeats=2,
        )
        wrong = labels < 0
        areas.append(float((found.margins[wrong][:, None] < found.margins[~wrong][None]).mean()))
    assert found.effect > 0 and areas[1] > areas[0] + 0.05


def test_where_no_answer_stands_twice_none_has_a_worth_of_its_own():
    states, numbers = shared_answers()
    alone = Differences.of(states[numbers[:, 0]], states[numbers[:, 1]], np.arange(120).reshape(60, 2))
    assert not alone.shares_answers
    groups = np.arange(60, dtype=np.uint64)
    pairs = OutOfFold(differences=alone, prompts=groups, groups=groups)
    assert pairs.effects == (0.0,) and pairs.heads(3) == 5 * (4 + 3)


def test_answers_whose_features_are_all_alike_are_not_told_apart():
    same = np.ones((40, 3))
    groups = np.arange(40, dtype=np.uint64)
    found = audited(OutOfFold(differences=Differences.of(same, same), prompts=groups, groups=groups), repeats=2)
    np.testing.assert_array_equal(found.margins, np.zeros(40))
    assert np.isfinite(found.wrong).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_planted_labels_are_counted_and_ranked(share):
    draw = np.random.default_rng(3)
    chosen, rejected = draw.normal(size=(2, 3000, 16))
    better = (chosen - rejected) @ draw.normal(size=16) > 0
    sides = np.where(better[:, None], chosen, rejected), np.where(better[:, None], rejected, chosen)
    labels = np.where(draw.random(3000) < share, -1.0, 1.0)
    groups = np.arange(3000, dtype=np.uint64)
    pairs = OutOfFold(differences=Differences.of(*sides), prompts=groups, groups=groups, labels=labels)
    found = audited(pairs, repeats=2)
    assert found.interval.share == pytest.approx((labels < 0).mean(), abs=0.03)
    assert found.interval.low - 0.01 <= (labels < 0).mean() <= found.interval.high + 0.01
    if share:
        assert found.wrong[labels < 0].mean() > 0.7 > 0.1 > found.wrong[labels > 0].mean()


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_pairs):
    """The tiny pairs, every eighth with its answers swapped."""
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    for row in rows[::8]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    for number, row in enumerate(rows):
        row |= {"source": "web" if number % 3 else "book", "note": number}
    path = tmp_path_factory.mktemp("planted") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def audit(tmp_path_factory, tiny_model, planted):
    """The folder of an audit of the planted pairs, with its cache of features beside it."""
    folder = tmp_path_factory.mktemp("audit") / "audit"
    assert run_audit(planted, tiny_model, folder) == 0
    return folder


def run_audit(pairs, model, folder, *options):
    cache = ("--cache-dir", str(folder.parent / "cache"), "--repeats", "2")
    return main(["data", "audit", str(pairs), "--model", str(model), "-o", str(folder), *cache, *options])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_swapped_pairs_head_the_list_of_suspects(audit):
    suspects = lines_of(audit / "suspects.jsonl")
    assert len(suspects) == 90
    planted_rows = {f"pairs.jsonl:{number + 1}" for number in range(0, 90, 8)}
    assert len(planted_rows & {line["row"] for line in suspects[:12]}) >= 8
    margins = [line["margin"] for line in suspects]
    assert margins == sorted(margins)
    assert suspects[0]["chosen"].split()[-1] == "sad"


def test_the_data_comes_back_in_order_with_columns_beside_its_own(audit, planted):
    before, after = lines_of(planted), lines_of(audit / "pairs.jsonl")
    assert [{name: row[name] for name in old} for old, row in zip(before, after, strict=True)] == before
    for row in after:
        assert row["audit_weight"] == pytest.approx(1 - row["audit_wrong"], abs=1e-5)
        assert row["audit_label"] == ("swap" if row["audit_wrong"] > 0.5 else "as_given")
        assert row["audit_margin_sd"] >= 0


def test_the_summary_has_the_share_with_its_interval_also_by_source(audit):
    summary = json.loads((audit / "summary.json").read_text())
    share = summary["share_wrong"]
    assert share["low"] <= share["estimate"] <= share["high"]
    assert 0.05 < share["estimate"] < 0.25
    assert {name: group["pairs"] for name, group in summary["by"]["source"].items()} == {"web": 60, "book": 30}
    assert summary["by"]["annotator"] == "no row has this column"


def test_the_page_says_what_was_found_beside_what_else_explains_it(audit, planted, tiny_model, capsys):
    page = (audit / "report.html").read_text()
    summary = json.loads((audit / "summary.json").read_text())
    assert summary["verdict"][1:] in page
    for said in ("Out-of-fold margins", "By source", "The most suspect labels", "The longer answer is the chosen one"):
        assert said in page
    first = lines_of(audit / "suspects.jsonl")[0]
    assert first["row"] in page and first["chosen"] in page
    assert main(["report", str(audit), "--output", str(audit.parent / "again.html")]) == 0
    assert "the labels look wrong" in capsys.readouterr().out


def test_annotators_who_stand_alone_against_others_are_named(tmp_path, tiny_model, tiny_pairs, capsys):
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()][:30]
    judged = [row | {"annotator": name} for row in rows for name in ("ada", "bo", "eve")]
    for row in judged:
        if row["annotator"] == "eve":
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in judged))
    assert run_audit(path, tiny_model, tmp_path / "audit") == 0
    summary = json.loads((tmp_path / "audit" / "summary.json").read_text())
    assert summary["judged_again"] == {"pairs": 30, "disagree": 30}
    against = {name: group["against_others"] for name, group in summary["by"]["annotator"].items()}
    assert against == {"ada": 0.0, "bo": 0.0, "eve": 1.0}
    page = (tmp_path / "audit" / "report.html").read_text()
    assert "30 pairs of answers were judged more than once" in page and "By annotator" in page
    assert "stand there the other way round" in page


RECIPE = """\
output: somewhere
model: {path: %s, head_init_scale: 10, lora: {rank: 4}}
data: {train: elsewhere}
optim: {learning_rate: 2e-2}
train: {global_batch_size: 24, max_steps: 10, epochs: 20, evaluate_every: 0, checkpoint_every: 0}
engine: {kind: local}
"""


def in_this_process(arguments, log):
    log.write_text("here")
    return reward_main([*arguments])


def test_lora_runs_of_the_reward_stage_are_judges_that_did_not_see_the_pair(tmp_path, tiny_model, planted):
    (tmp_path / "judge.yaml").write_text(RECIPE % tiny_model)
    options = AuditOptions(
        data=str(planted),
        model=None,
        output=tmp_path / "audit",
        columns=ColumnConfig(),
        judge=tmp_path / "judge.yaml",
        settings=("train.seed=3",),
        folds=2,
        repeats=1,
    )
    said = audit_file(options, start=in_this_process)
    assert "of the labels look wrong" in said
    suspects = lines_of(tmp_path / "audit" / "suspects.jsonl")
    planted_rows = {f"pairs.jsonl:{number + 1}" for number in range(0, 90, 8)}
    assert len(planted_rows & {line["row"] for line in suspects[:15]}) >= 7
    judges = tmp_path / "audit" / "judges" / "repeat-0"
    for fold in (0, 1):
        seen, judged = (
            {json.dumps(row) for row in lines_of(judges / f"fold-{fold}" / f"{part}.jsonl")}
            for part in ("training", "judged")
        )
        assert judged and not seen & judged
    summary = json.loads((tmp_path / "audit" / "summary.json").read_text())
    assert summary["judge"].endswith("judge.yaml") and summary["model"] is None and summary["layer"] is None
    again = audit_file(options, start=lambda *_: pytest.fail("the runs are there already"))
    assert again == said
    with pytest.raises(DataError, match="of another audit"):
        audit_file(replace(options, seed=5), start=in_this_process)
    with pytest.raises(UserError, match=r"ended with exit code 2; see .*log\.txt"):
        audit_file(replace(options, output=tmp_path / "failing"), start=lambda *_: 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either --model"),
        (["--model", "m", "--judge", "r"], "give either --model"),
        (["--judge", "nowhere.yaml"], "--judge nowhere.yaml: no such file"),
        (["--model", "m", "--set", "a=1"], "--set is for the recipe of --judge"),
    ],
)
def test_judges_that_cannot_be_meant_are_refused(tmp_path, planted, capsys, options, said):
    assert main(["data", "audit", str(planted), "-o", str(tmp_path / "a"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


def test_a_second_audit_of_the_same_pairs_needs_no_model_and_says_the_same(audit, planted, tiny_model, monkeypatch):
    monkeypatch.setattr(features, "_load", lambda *_: pytest.fail("the features are there already"))
    first = (audit / "pairs.jsonl").read_bytes()
    assert run_audit(planted, tiny_model, audit) == 0
    assert (audit / "pairs.jsonl").read_bytes() == first


def test_processes_share_the_reading_of_answers_and_equal_ones_are_read_once(tiny_model, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 20, size).astype(np.int32) for size in draw.integers(1, 12, 300)]
    rows += [row.copy() for row in rows[:100]]
    extraction = features.Extraction(model=BackboneConfig(path=str(tiny_model), layers=1), dtype=torch.float32)
    given = {"rows": rows, "extraction": extraction, "chat": load_chat(str(tiny_model), None), "batch_tokens": 64}
    alone = features._states(features._load(extraction, given["chat"]), rows, 64)
    monkeypatch.setattr(features, "BLOCK_ROWS", 32)
    read, told = [], []
    states_of = features._states

    def counting(model, block, tokens):
        read.extend(row.tobytes() for row in block)
        return states_of(model, block, tokens)

    monkeypatch.setattr(features, "_states", counting)
    for number in range(3):
        made = len(read)
        features.Reading(**given, cache=tmp_path).make(told.append, part=(number, 3))
        assert len(read) > made
    assert sorted(read) == sorted({row.tobytes() for row in rows}) and sum(told) == 400
    monkeypatch.setattr(features, "_load", lambda *_: pytest.fail("the features are there already"))
    np.testing.assert_allclose(features.Reading(**given, cache=tmp_path).states(), alone, atol=1e-5)


def test_what_another_process_keeps_elsewhere_is_read_again(tiny_model, tmp_path, monkeypatch):
    rows = [np.arange(size, dtype=np.int32) for size in range(1, 12)]
    extraction = features.Extraction(model=BackboneConfig(path=str(tiny_model), layers=1), dtype=torch.float32)
    given = {"rows": rows, "extraction": extraction, "chat": load_chat(str(tiny_model), None), "batch_tokens": 64}
    monkeypatch.setattr(features, "BLOCK_ROWS", 4)
    for number in range(4):  # more than there are blocks
        folder = tmp_path / ("here" if number == 0 else "elsewhere")
        features.Reading(**given, cache=folder).make(part=(number, 4))
    assert [len([*(tmp_path / name).rglob("*.npy")]) for name in ("here", "elsewhere")] == [1, 2]
    found = features.Reading(**given, cache=tmp_path / "here").states()
    alone = features._states(features._load(extraction, given["chat"]), rows, 64)
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_another_layer_has_features_of_its_own(audit, planted, tiny_model, monkeypatch):
    asked = []
    load = features._load
    monkeypatch.setattr(features, "_load", lambda *given: asked.append(given) or load(*given))
    assert run_audit(planted, tiny_model, audit.with_name("other"), "--layer", "2") == 0
    assert len(asked) == 1


def test_an_audit_of_an_audit_replaces_its_columns(audit, tiny_model):
    again = audit.with_name("again")
    assert run_audit(audit / "pairs.jsonl", tiny_model, again) == 0
    assert (again / "pairs.jsonl").read_text() == (audit / "pairs.jsonl").read_text()


def test_one_source_only_is_said_in_words(planted, tiny_model, tmp_path):
    rows = [row | {"source": "web"} for row in lines_of(planted)]
    pairs = tmp_path / "one.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_audit(pairs, tiny_model, tmp_path / "audit") == 0
    summary = json.loads((tmp_path / "audit" / "summary.json").read_text())
    assert summary["by"]["source"] == "all rows have web: nothing to compare"


@pytest.mark.parametrize(("prompts", "folds"), [(3, "5"), (1, "2")])
def test_fewer_prompts_than_folds_are_one_line(planted, tiny_model, tmp_path, capsys, prompts, folds):
    rows = [row | {"prompt": f"prompt {number % prompts}"} for number, row in enumerate(lines_of(planted))]
    pairs = tmp_path / "few.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_audit(pairs, tiny_model, tmp_path / "audit", "--folds", folds, "--unseen", "prompts") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "folds" in line]
    assert f"{prompts} different prompts make no {folds} folds" in line


def test_fewer_pairs_than_folds_are_one_line_and_a_pair_both_ways_round_is_one(planted, tiny_model, tmp_path, capsys):
    row = lines_of(planted)[0]
    pairs = tmp_path / "few.jsonl"
    turned = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    pairs.write_text("".join(json.dumps(each) + "\n" for each in (row, turned)))
    assert run_audit(pairs, tiny_model, tmp_path / "audit", "--folds", "2") == 2
    assert "1 different pairs make no 2 folds" in capsys.readouterr().err


def test_features_that_are_not_finite_are_one_line_and_are_not_kept(planted, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(features, "_states", lambda model, rows, tokens: np.full((len(rows), 4), np.nan, np.float32))
    assert run_audit(planted, tiny_model, tmp_path / "audit") == 2
    assert "are not finite for some answers" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_rows_that_cannot_be_read_are_counted_and_left_out(planted, tiny_model, tmp_path, capsys):
    pairs = tmp_path / "bad.jsonl"
    pairs.write_text(planted.read_text() + '{"prompt": "the sun", "chosen": 3}\nnot json\n')
    assert run_audit(pairs, tiny_model, tmp_path / "audit") == 0
    assert "2 rows are left out" in capsys.readouterr().err
    assert json.loads((tmp_path / "audit" / "summary.json").read_text())["rows_left_out"] == 2


@pytest.mark.parametrize(("low", "share", "warned"), [(0.0, 0.38, True), (0.02, 0.38, False), (0.0, 0.0, False)])
def test_the_verdict_says_where_there_may_be_no_wrong_label_at_all(low, share, warned):
    said = verdict(Interval(share=share, low=low, high=0.41), np.full(20, share))
    assert said.startswith(f"about {share:.0%} ({low:.0%} to 41%) of the labels look wrong")
    assert ("there may be none" in said) == warned
