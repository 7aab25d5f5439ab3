"""Rewards of PPO that see the row, add up, and leave responses out."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy.ppo.config import AdvantageConfig
from policy.ppo.experience import groups_that_differ, make_experience
from policy.ppo.reward_options import RewardSourceConfig, RewardTermConfig, scorer_roles
from policy.ppo.scoring import Scored, ScorerParts, build_scorer
from policy.ppo.stage import _reward_identity, run
from policy.ppo.task import _Clock
from rlhf.config import to_dict
from rlhf.core.errors import ConfigError, DataError
from rlhf.train.batches import BatchMaker
from rlhf.train.chat import load_chat
from rlhf.train.progress import Progress


@pytest.fixture
def rollouts(make_task, rows_file, tiny_config):
    return make_task(data=replace(tiny_config.data, train=str(rows_file))).rollouts()


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """Prompts whose rows say how many letters are wanted; every fourth does not."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"write {n}", "wanted": None if n % 4 == 0 else n % 7} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scorer_for(tiny_config, alone):
    def build(**section):
        chat = load_chat(tiny_config.policy.path, tiny_config.data.template)
        maker = BatchMaker(alone, tiny_config.train)
        parts = ScorerParts(ranks=alone, engine=tiny_config.engine, chat=chat, maker=maker, prompts=())
        config = RewardSourceConfig(**section)
        return build_scorer(config, scorer_roles("reward model", "reward", config), parts)

    return build


def wanted_of(rollouts):
    return [prompt.columns["wanted"] for prompt in rollouts.prompts]


def test_a_function_sees_the_columns_of_the_row_and_leaves_responses_out(scorer_for, rollouts):
    scored = scorer_for(function="rules:nearness").score(rollouts)
    wanted = wanted_of(rollouts)
    assert 0 < wanted.count(None) < len(wanted)
    assert scored.known.tolist() == [each is not None for each in wanted]
    expected = [
        0.0 if each is None else -abs(len(text) - each) for each, text in zip(wanted, rollouts.texts, strict=True)
    ]
    assert scored.scores.tolist() == scored.raw.tolist() == expected


def test_terms_are_added_up_by_weight_where_they_have_a_word(scorer_for, rollouts, reward_folder):
    terms = (
        RewardTermConfig(function="rules:nearness", weight=2.0),
        RewardTermConfig(function="rules:share_of_abc", weight=-0.5),
        RewardTermConfig(path=str(reward_folder), weight=3.0),
        RewardTermConfig(function="rules:share_of_abc", weight=1.0),
    )
    scored = scorer_for(terms=terms).score(rollouts)
    near, share, model = (
        scorer_for(function="rules:nearness").score(rollouts),
        scorer_for(function="rules:share_of_abc").score(rollouts),
        scorer_for(path=str(reward_folder)).score(rollouts),
    )
    torch.testing.assert_close(scored.scores, 2 * near.scores + 0.5 * share.scores + 3 * model.scores)
    assert scored.unknown is None, "every response has a score of some term"
    assert list(scored.terms) == ["nearness", "share_of_abc", "run", "share_of_abc 4"]
    only = scorer_for(terms=terms[:1]).score(rollouts)
    assert torch.equal(only.known, near.known)


def test_responses_that_a_function_fails_on_are_left_out_up_to_a_share(scorer_for, rollouts):
    failing = sum(len(text) % 2 for text in rollouts.texts)
    assert 0 < failing < 16
    term = RewardTermConfig(function="rules:fails_on_odd_lengths", failures=failing / 16)
    scored = scorer_for(terms=(term,)).score(rollouts)
    assert scored.failed == failing
    assert scored.known.tolist() == [len(text) % 2 == 0 for text in rollouts.texts]
    fewer = replace(term, failures=(failing - 0.5) / 16)
    with pytest.raises(DataError, match=f"failed on {failing} of 16 responses.*failures = .*ValueError: odd"):
        scorer_for(terms=(fewer,)).score(rollouts)


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_what_has_no_score_is_not_learned_from_and_moves_nothing(make_task, estimator):
    """Whatever number stands there. Of a group with one score left, that one is not learned from either."""
    shop = make_task(advantage=AdvantageConfig(estimator=estimator))
    rollouts = shop.rollouts()
    unknown = torch.zeros(16, dtype=torch.bool)
    unknown[[0, 4, 5]] = True
    measured = shop.task._measure(rollouts)
    found = []
    for filler in (0.0, 7.0):
        scores = torch.where(unknown, filler, torch.linspace(-1, 1, 16))
        found.append(make_experience(rollouts, Scored(scores, scores, unknown), measured, shop.config, 0.1))
    left = unknown.clone()
    left[1] = estimator == "grpo"
    assert torch.equal(found[0].mask, rollouts.mask & ~left[:, None])
    assert torch.equal(found[0].advantages, found[1].advantages)
    assert not found[0].advantages[left].any() and found[0].advantages[~left].any()


class Fixed:
    identity = "fixed"

    def __init__(self, unknown):
        self.unknown = unknown

    def score(self, rollouts):
        scores = torch.arange(len(rollouts)).float()
        return Scored(torch.where(self.unknown, 0, scores), torch.where(self.unknown, 0, scores), self.unknown)


def test_metrics_and_rollouts_tell_scores_from_none(make_task):
    unknown = torch.zeros(16, dtype=torch.bool)
    unknown[:3] = True
    shop = make_task(scorer=Fixed(unknown))
    metrics = shop.step().metrics
    assert metrics["unscored_share"] == pytest.approx(3 / 16)
    assert metrics["reward"] == pytest.approx(np.arange(3, 16).mean())
    rows = [json.loads(line) for line in (shop.config.output / "rollouts.jsonl").read_text().splitlines()]
    assert rows[0]["reward"] is None and rows[0]["score"] is None and rows[-1]["reward"] == 15.0


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"failures": 0.5}, True),
        ({"timeout_seconds": 9.0}, True),
        ({"concurrency": 2}, True),
        ({"patience_seconds": 9.0}, True),
        ({"weight": 2.0}, False),
        ({"columns": {"wanted": "level"}}, False),
    ],
)
def test_a_run_whose_judge_was_late_goes_on_with_more_patience(change, same):
    """Which the message that ended it advises."""
    term = RewardTermConfig(function="rules:nearness")
    sections = (RewardSourceConfig(terms=(each, term)) for each in (term, replace(term, **change)))
    before, after = (_reward_identity(to_dict(section)) for section in sections)
    assert (before == after) is same


def test_a_step_without_any_score_is_passed_over_and_named(make_task):
    shop = make_task(scorer=Fixed(torch.ones(16, dtype=torch.bool)))
    before = shop.weights()
    assert not shop.step().applied
    assert all(torch.equal(value, before[name]) for name, value in shop.weights().items())
    assert "score (None for every response)" in (shop.config.output / "skipped.jsonl").read_text()


def test_what_a_function_sees_of_a_row_does_not_depend_on_the_rows_beside_it(make_task, tiny_config, tmp_path, alone):
    """Columns that few rows have are there for all: whoever scores a row, and beside which others."""
    path = tmp_path / "few.jsonl"
    rows = [{"prompt": f"write {n}"} | ({"wanted": 1, "level": 2} if n == 97 else {}) for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shop = make_task(data=replace(tiny_config.data, train=str(path), eval_share=0))
    rollouts, prompts = shop.rollouts(), (shop.data.train,)
    parts = ScorerParts(ranks=alone, engine=tiny_config.engine, chat=shop.chat, maker=None, prompts=prompts)
    config = RewardSourceConfig(function="rules:tells_columns")
    scored = build_scorer(config, (), parts).score(rollouts)
    assert scored.raw.tolist() == [2.0] * 16, "both columns, with nothing in them"
    places = [place for place in range(16) if rollouts.prompts[place].columns]
    assert len(places) <= 2
    with pytest.raises(ConfigError, match="asks for 'absent'"):
        build_scorer(RewardSourceConfig(function="rules:asks_for_what_is_absent"), (), parts)


def test_rows_without_a_column_that_is_asked_for_are_refused_before_the_first_step(tiny_config, alone):
    config = replace(tiny_config, reward=RewardSourceConfig(function="rules:nearness"))
    with pytest.raises(ConfigError, match="rules:nearness asks for 'wanted', and the rows have no such column"):
        run(config, alone)
    assert not (config.output / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"function": "m:f", "terms": (RewardTermConfig(function="m:f"),)}, "give one of path"),
        ({"terms": (RewardTermConfig(path="a"), RewardTermConfig(path="b")), "combine": "min"}, "needs an ensemble"),
    ],
)
def test_a_source_is_one_thing(section, message):
    with pytest.raises(ValueError, match=message):
        RewardSourceConfig(**section)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({}, "give one of path"),
        ({"path": "a", "function": "m:f"}, "give one of path"),
        ({"path": "a", "failures": 0.5}, "path = a: options, columns and failures are those of a function"),
        ({"function": "m:f", "weight": math.inf}, "expected a finite number"),
    ],
)
def test_a_term_is_a_model_or_a_function(term, message):
    with pytest.raises(ValueError, match=message):
        RewardTermConfig(**term)


@pytest.mark.parametrize(
    ("terms", "limit"),
    [((RewardTermConfig(path="a"),), 10.0), ((RewardTermConfig(path="a"), RewardTermConfig(function="m:f")), None)],
)
def test_sums_of_models_alone_are_clipped_by_themselves(terms, limit):
    assert RewardSourceConfig(terms=terms).score_limit == limit


# Dynamic sampling.


class ByPrompt:
    """One score for all responses to a prompt whose number is no multiple of three, others differ."""

    identity = "by prompt"

    def score(self, rollouts):
        pairs = zip(numbers(rollouts), rollouts.texts, strict=True)
        scores = torch.tensor([1.0 if number % 3 else float(len(text)) for number, text in pairs])
        return Scored(scores, scores, failed=1, terms={"length": Scored(scores, scores)})


@pytest.fixture
def resampling(make_task, tiny_config):
    def make(rounds, **sections):
        rollout = replace(tiny_config.rollout, extra_rounds=rounds, stop=(), temperature=3.0)
        return make_task(scorer=ByPrompt(), advantage=AdvantageConfig(estimator="grpo"), rollout=rollout, **sections)

    return make


def collected(shop, step=0):
    return shop.task._sample_and_score(step, _Clock(), Progress(shop.policy.ranks, 10, 0))


def numbers(rollouts):
    return [int(prompt.text.split()[-1]) for prompt in rollouts.prompts]


def test_prompts_with_one_score_give_way_to_others(resampling):
    plain, _, shares = collected(resampling(0))
    flat = [number for number in numbers(plain)[::2] if number % 3]
    assert 2 <= len(flat) <= 7 and shares["flat_prompts_share"] >= len(flat) / 8
    shop = resampling(3)
    rollouts, scored, shares = collected(shop)
    found = numbers(rollouts)[::2]
    assert len(found) == len(set(found)) == 8 and not any(number % 3 for number in found)
    assert set(numbers(plain)) - set(flat) <= set(found), "those of the step itself stay"
    assert rollouts.groups.tolist() == [group for group in range(8) for _ in range(2)]
    assert 1 <= shares["extra_rounds"] <= 3
    again = ByPrompt().score(rollouts)
    assert torch.equal(scored.scores, again.scores) and torch.equal(scored.terms["length"].scores, again.scores)
    outcome = shop.step()
    assert outcome.metrics["rollouts"] == 16 and outcome.metrics["extra_rounds"] == shares["extra_rounds"]


@pytest.mark.parametrize(
    ("scores", "compared", "differ"),
    [
        ([1, 0, 1, 1], [1, 1, 1, 1], [True, False]),
        ([1, 0, 5, 1], [1, 0, 1, 0], [False, False]),
        ([1, 0, 5, 1], [0, 0, 1, 1], [False, True]),
        ([1, math.nan, 1, math.inf], [1, 1, 1, 1], [True, True]),
        ([1, math.nan, math.inf, math.inf], [1, 0, 1, 1], [False, False]),
    ],
)
def test_prompts_differ_in_the_scores_that_are_compared(scores, compared, differ):
    """One that is not finite is no reason to look for another prompt: the step is to name it."""
    groups = torch.tensor([0, 0, 1, 1])
    found = groups_that_differ(torch.tensor(scores, dtype=torch.float32), torch.tensor(compared) > 0, groups)
    assert found.tolist() == differ


class ByEnd:
    identity = "by end"

    def score(self, rollouts):
        return Scored(rollouts.ended.float(), rollouts.ended.float())


@pytest.mark.parametrize("truncated", ["mask", "end"])
def test_responses_that_are_masked_make_no_difference(make_task, tiny_config, truncated):
    """A step of prompts that differ by what was cut off alone would learn nothing."""
    shop = make_task(
        scorer=ByEnd(),
        reward=replace(tiny_config.reward, truncated=truncated),
        advantage=AdvantageConfig(estimator="grpo"),
        rollout=replace(tiny_config.rollout, extra_rounds=1, temperature=3.0),
    )
    rollouts, _, shares = collected(shop)
    assert 0 < int(rollouts.ended.sum()) < 16
    assert (shares["flat_prompts_share"] == 1) is (truncated == "mask")


def test_rounds_end_when_no_prompt_is_left_and_flat_ones_fill_the_step(resampling, tiny_config):
    shop = resampling(9, data=replace(tiny_config.data, max_train_prompts=10))
    rollouts, _, shares = collected(shop)
    assert len(rollouts) == 16 and shares["extra_rounds"] == 1
    assert any(number % 3 for number in numbers(rollouts))


def test_a_killed_step_finds_the_rounds_that_it_has_sampled(resampling, monkeypatch):
    shop = resampling(3)
    before, scored, _ = collected(shop)
    calls = []
    monkeypatch.setattr(shop.task, "_roll_out", lambda *given: calls.append(given))
    after, scored_again, _ = collected(shop)
    assert not calls
    assert [r.tokens.tolist() for r in after.responses] == [r.tokens.tolist() for r in before.responses]
    assert after.row_ids == before.row_ids and torch.equal(scored.scores, scored_again.scores)


def test_rounds_are_for_estimators_that_compare(tiny_config):
    with pytest.raises(ValueError, match=r"rollout\.extra_rounds = 2 .* gae does not compare"):
        replace(tiny_config, rollout=replace(tiny_config.rollout, extra_rounds=2))
