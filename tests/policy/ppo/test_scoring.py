"""Rewards from models, ensembles and functions; and the critic that starts as a reward model."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from policy.generation.api import Response
from policy.ppo.config import CriticConfig
from policy.ppo.critic import ValueModel, build_critic, critic_start
from policy.ppo.reward_options import RewardSourceConfig, RewardTermConfig, scorer_roles
from policy.ppo.rollouts import Reencoded, Rollouts
from policy.ppo.scoring import ScorerParts, build_scorer, combine
from policy.ppo.stage import check_template
from reward.building import build_reward_model
from reward.config import RewardModelConfig
from reward.saving import load_reward_model, save_reward_model
from reward.score import load_scorer, score_tokens
from reward.serving.card import card_of
from rlhf.core.errors import ConfigError, DataError, ModelError
from rlhf.data.batching import length_bucket
from rlhf.data.messages import thoughts_and_answer
from rlhf.data.portable import portable_tokenizer
from rlhf.data.prompts import load_prompts
from rlhf.models.manifest import MANIFEST_NAME, read_manifest, write_manifest
from rlhf.models.options import BackboneConfig
from rlhf.models.roles import role_named
from rlhf.models.tokenizer import load_tokenizer, required_embedding_rows
from rlhf.train.batches import BatchMaker
from rlhf.train.chat import load_chat
from tests.lacking import imported


@pytest.fixture
def rollouts(make_task) -> Rollouts:
    return make_task().rollouts()


@pytest.fixture
def scorer_for(tiny_config, alone):
    """``scorer_for(template=None, **reward section)``: a scorer beside a policy with the template of the tests."""

    def build(template=tiny_config.data.template, tokens=200, prompts=(), **section):
        chat = load_chat(tiny_config.policy.path, template)
        parts = ScorerParts(
            ranks=alone,
            engine=tiny_config.engine,
            chat=chat,
            maker=BatchMaker(alone, replace(tiny_config.train, micro_batch_tokens=tokens)),
            prompts=prompts,
        )
        config = RewardSourceConfig(**section)
        return build_scorer(config, scorer_roles("reward model", "reward", config), parts)

    return build


def token_rows(rollouts, end):
    """Prompts with their responses, and ``end`` behind those that have no end token."""
    return [
        np.concatenate([prompt.tokens, response.tokens, [] if response.tokens[-1] == end else [end]]).astype(np.int64)
        for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True)
    ]


# Reward models.


def test_a_reward_model_says_what_rlhf_score_says_of_the_same_tokens(scorer_for, reward_folder, rollouts):
    scored = scorer_for(path=str(reward_folder)).score(rollouts)
    model, chat = load_scorer(reward_folder)
    rows = token_rows(rollouts, chat.tokenizer.eos_token_id)
    expected = torch.tensor(score_tokens(model, rows, batch_tokens=500))
    torch.testing.assert_close(scored.raw, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.std()) > 0.01
    statistics = read_manifest(reward_folder).rewards
    torch.testing.assert_close(scored.scores, (scored.raw - statistics.mean) / statistics.standard_deviation)


def test_scores_do_not_depend_on_the_token_budget(scorer_for, reward_folder, rollouts):
    small, large = (scorer_for(path=str(reward_folder), tokens=tokens).score(rollouts) for tokens in (40, 5000))
    torch.testing.assert_close(small.scores, large.scores, rtol=1e-4, atol=1e-5)


def test_raw_scores_are_left_alone_if_so_asked(scorer_for, reward_folder, rollouts):
    scored = scorer_for(path=str(reward_folder), standardize=False).score(rollouts)
    assert torch.equal(scored.raw, scored.scores)


def test_a_model_without_statistics_is_refused_unless_they_are_not_needed(
    scorer_for, reward_folder, rollouts, tmp_path
):
    shutil.copytree(reward_folder, tmp_path / "final")
    manifest = json.loads((tmp_path / "final" / MANIFEST_NAME).read_text()) | {"rewards": None}
    (tmp_path / "final" / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"no deviation of held-out rewards.*reward\.standardize=false"):
        scorer_for(path=str(tmp_path / "final"))
    scorer_for(path=str(tmp_path / "final"), standardize=False).score(rollouts)


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_sd"])
def test_an_ensemble_combines_standardized_scores(scorer_for, reward_folder, other_reward_folder, rollouts, how):
    paths = (str(reward_folder), str(other_reward_folder))
    members = [scorer_for(path=path).score(rollouts) for path in paths]
    table = np.stack([member.scores.double().numpy() for member in members])
    assert np.abs(table[0] - table[1]).min() > 1e-4
    expected = {
        "mean": table.mean(axis=0),
        "min": table.min(axis=0),
        "mean_minus_sd": table.mean(axis=0) - 0.7 * table.std(axis=0),
    }[how]
    scored = scorer_for(path=paths, combine=how, deviations=0.7).score(rollouts)
    np.testing.assert_allclose(scored.scores.numpy(), expected, rtol=1e-4, atol=1e-5)
    raw = np.mean([member.raw.numpy() for member in members], axis=0)
    np.testing.assert_allclose(scored.raw.numpy(), raw, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def sure_folders(tmp_path_factory, tiny_model, reward_folder):
    """Reward models that know how sure they are: of three heads, and with a Bayesian one; and what made them."""
    made = {}
    for name, options in {"heads": {"heads": 3}, "bnrm": {"head": "bnrm", "head_hidden": 8}}.items():
        folder = tmp_path_factory.mktemp(name) / "final"
        shutil.copytree(reward_folder, folder)
        config = RewardModelConfig(path=str(tiny_model), head_init_scale=20, **options)
        model = build_reward_model(config, dtype=torch.float32, pad_token_id=2, vocabulary=259, seed=0).eval()
        save_reward_model(model, folder)
        made[name] = folder
    return made


def test_heads_of_one_model_are_an_ensemble(scorer_for, sure_folders, rollouts):
    path = str(sure_folders["heads"])
    statistics = read_manifest(sure_folders["heads"]).rewards
    lowest, mean, careful = (
        scorer_for(path=path, combine=how, deviations=0.7).score(rollouts) for how in ("min", "mean", "mean_minus_sd")
    )
    np.testing.assert_allclose(lowest.raw.numpy(), mean.raw.numpy(), rtol=1e-5)
    expected = (mean.raw.numpy() - statistics.mean) / statistics.standard_deviation
    np.testing.assert_allclose(mean.scores.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (lowest.scores < mean.scores).all() and (careful.scores < mean.scores).all()
    assert scorer_for(path=path).identity != scorer_for(path=path, combine="min").identity


def test_the_deviation_that_a_bayesian_head_knows_is_taken_off(scorer_for, sure_folders, rollouts):
    path = str(sure_folders["bnrm"])
    mean, one, two = (
        scorer_for(path=path, combine=how, deviations=by).score(rollouts).scores
        for how, by in (("mean", 1.0), ("mean_minus_sd", 1.0), ("mean_minus_sd", 2.0))
    )
    assert (one < mean).all()
    torch.testing.assert_close(mean - two, 2 * (mean - one), rtol=1e-3, atol=1e-5)
    with pytest.raises(ModelError, match=r"combine = min needs an ensemble"):
        scorer_for(path=path, combine="min")


def test_a_model_of_one_head_is_no_ensemble(scorer_for, reward_folder):
    with pytest.raises(ModelError, match=r"has one head that knows no deviation.*model\.heads"):
        scorer_for(path=str(reward_folder), combine="mean_minus_sd")


def test_a_critic_starts_from_the_mean_of_such_heads(sure_folders):
    tokens = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for folder in sure_folders.values():
        start = critic_start(BackboneConfig(path=str(folder)), standardized=False)
        critic = build_critic(start, dtype=torch.float32, pad_token_id=2, vocabulary=259, seed=0)
        critic.train()
        expected = load_reward_model(folder).eval().score(tokens, mask)
        torch.testing.assert_close(critic.scorer.score(tokens, mask), expected, rtol=1e-4, atol=1e-5)


def test_of_three_models_the_deviation_is_over_three():
    scores = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]])
    found = combine(scores, "mean_minus_sd", 1.0)
    torch.testing.assert_close(found, torch.tensor([3 - math.sqrt((4 + 1 + 9) / 3), 0.0]))


def test_a_reward_model_of_another_family_is_refused_with_the_way_out(scorer_for, foreign_reward_folder):
    with pytest.raises(ModelError, match=r"its tokenizer .* and its chat template .*reward\.retokenize=true"):
        scorer_for(path=str(foreign_reward_folder))


def test_another_template_alone_is_refused_with_the_way_out(scorer_for, reward_folder):
    with pytest.raises(ModelError, match=r"its chat template .*data\.template.*reward\.retokenize=true") as refusal:
        scorer_for(template="plain", path=str(reward_folder))
    assert "its tokenizer" not in str(refusal.value)


def test_retokenized_texts_are_scored_as_rlhf_score_would(scorer_for, foreign_reward_folder, rollouts):
    scored = scorer_for(path=str(foreign_reward_folder), retokenize=True).score(rollouts)
    model, chat = load_scorer(foreign_reward_folder)
    rows = [
        chat.encode(prompt.messages, [{"role": "assistant", "content": text}])[0]
        for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True)
    ]
    assert {int(row[-1]) for row in rows} == {chat.tokenizer.eos_token_id}
    expected = torch.tensor(score_tokens(model, rows, batch_tokens=500))
    torch.testing.assert_close(scored.raw, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored.scores, (expected - 0.1) / 0.4, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.01


CLOCK = [{"type": "function", "function": {"name": "clock"}}]
SHOWS_TOOLS = "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
QUESTION = {"role": "user", "content": "why?"}
BRIEF = [{"role": "system", "content": "Be brief."}, QUESTION]


@pytest.mark.parametrize(
    ("row", "change", "fault"),
    [
        ({"prompt": [QUESTION], "tools": CLOCK}, "", r"does not show the tools of the conversation \(clock\)"),
        ({"prompt": BRIEF}, "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}", "no system"),
        ({"prompt": BRIEF}, "{% set messages = messages[-1:] %}", "system message 'Be brief.' is not in the"),
    ],
    ids=["tools", "refused", "dropped"],
)
def test_prompts_that_the_template_of_a_reward_model_cannot_show_are_refused_at_the_start(
    scorer_for, foreign_reward_folder, tiny_config, tmp_path, serving, row, change, fault
):
    folder, path = tmp_path / "final", tmp_path / "prompts.jsonl"
    shutil.copytree(foreign_reward_folder, folder)
    template = folder / "chat_template.jinja"
    template.write_text(change + template.read_text())
    path.write_text("".join(json.dumps(each) + "\n" for each in ({"prompt": "one"}, {"prompt": "two"}, row)))
    settings = replace(tiny_config.data, train=str(path), eval_share=0, template=SHOWS_TOOLS)
    prompts = load_prompts(settings, load_chat(tiny_config.policy.path, SHOWS_TOOLS)).train
    expected = rf"reward\.path = .* cannot show 1 of 3 prompts, such as prompts\.jsonl:3: .*{fault}"
    with pytest.raises(ModelError, match=expected):
        scorer_for(template=SHOWS_TOOLS, prompts=[prompts], path=str(folder), retokenize=True)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"template_digest": load_chat(str(folder)).digest}))
    server = serving(folder)
    with pytest.raises(ModelError, match=expected.replace("path", "url", 1)):
        scorer_for(template=SHOWS_TOOLS, prompts=[prompts], url=server.url, retokenize=True)
    assert not server.batcher.counts.rows
    settings = replace(settings, eval_share=0.5)
    data = load_prompts(settings, load_chat(tiny_config.policy.path, SHOWS_TOOLS))
    with pytest.raises(ModelError, match="cannot show 1 of 3 prompts"):
        scorer_for(template=SHOWS_TOOLS, prompts=[data.train, data.evals], path=str(folder), retokenize=True)


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3"])
def test_retokenized_answers_keep_what_the_template_hides(foreign_reward_folder, rollouts, name):
    """The families' own templates cut thoughts out of answers, or write others around them."""
    template = (Path(imported("trl").__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    chat = load_chat(str(foreign_reward_folder), template)
    said = ["<think>\nso on\n</think>\n\nit is good", "so on</think>it is good", " is good ", "", "<think>\nso on"]
    texts = [said[place % len(said)] for place in range(len(rollouts))]
    prompts = [
        replace(prompt, messages=(*prompt.messages, {"role": "assistant", "content": said[0]}, *prompt.messages[-1:]))
        for prompt in rollouts.prompts
    ]
    rows = Reencoded(Rollouts(prompts, rollouts.responses, texts, rollouts.groups), chat, cut=False)
    for place, text in enumerate(texts):
        row = rows.item(place).rows[0]
        shown = chat.tokenizer.decode(row.tokens[row.response])
        thoughts, answer = thoughts_and_answer({"role": "assistant", "content": text})
        assert thoughts in shown and answer in shown[shown.index(thoughts) + len(thoughts) :]
        assert int(row.tokens[-1]) in chat.end_token_ids


@pytest.fixture
def clean(rollouts, tiny_config):
    """Responses that survive decoding and encoding: with an end token, with a stop string in its place, cut off."""
    chat = load_chat(tiny_config.policy.path, tiny_config.data.template)
    texts = ["the sun is good", "a bad day", "happy"] * 5 + ["rain"]
    responses = []
    for place, (prompt, text) in enumerate(zip(rollouts.prompts, texts, strict=True)):
        tokens, _ = chat.encode(prompt.messages, [{"role": "assistant", "content": text}])
        assert np.array_equal(tokens[: len(prompt.tokens)], prompt.tokens)
        assert tokens[-1] in chat.end_token_ids
        written = tokens[len(prompt.tokens) : None if place % 4 < 2 else -1].astype(np.int64)
        responses.append(Response(written, *np.zeros((2, len(written)), np.float32), ended=place % 4 < 3))
    return Rollouts(rollouts.prompts, responses, texts, rollouts.groups)


@pytest.mark.parametrize("truncated", ["end", "score", "mask"])
def test_own_tokens_and_retokenized_texts_are_scored_by_one_rule(scorer_for, reward_folder, clean, truncated):
    direct, again = (
        scorer_for(path=str(reward_folder), retokenize=retokenize, truncated=truncated).score(clean).raw
        for retokenize in (False, True)
    )
    torch.testing.assert_close(again, direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("retokenize", [False, True])
def test_only_what_was_cut_off_is_scored_by_its_rule(scorer_for, reward_folder, clean, retokenize):
    """As rlhf score would score the text with an end token, and the text that goes on."""
    scored = {
        rule: scorer_for(path=str(reward_folder), truncated=rule, retokenize=retokenize).score(clean).raw
        for rule in ("end", "score")
    }
    model, chat = load_scorer(reward_folder)
    rows = token_rows(clean, chat.tokenizer.eos_token_id)
    ended = torch.tensor(score_tokens(model, rows, batch_tokens=500))
    cut = torch.tensor(score_tokens(model, [row[:-1] for row in rows], batch_tokens=500))
    assert float((ended - cut).abs().min()) > 1e-3
    assert not bool(clean.ended.all())
    torch.testing.assert_close(scored["end"], ended, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scored["score"], torch.where(clean.ended, ended, cut), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["preference", "sft", "ppo"])
def test_a_policy_is_no_reward_model(scorer_for, reward_folder, tmp_path, stage):
    shutil.copytree(reward_folder, tmp_path / "final")
    manifest = json.loads((tmp_path / "final" / MANIFEST_NAME).read_text()) | {"stage": stage}
    (tmp_path / "final" / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=f"the {stage} stage published it, it is no reward model"):
        scorer_for(path=str(tmp_path / "final"))


def test_a_plain_model_folder_is_no_reward_model(scorer_for, tiny_model):
    with pytest.raises(ModelError, match=r"no such file; expected a folder that margin-rlhf published"):
        scorer_for(path=str(tiny_model))


def test_a_name_for_a_scorer_changes_with_its_weights(scorer_for, reward_folder, other_reward_folder):
    paths = (str(reward_folder), str(other_reward_folder))
    names = [
        scorer_for(path=paths[0]).identity,
        scorer_for(path=paths[1]).identity,
        scorer_for(path=paths).identity,
        scorer_for(path=paths, combine="min").identity,
        scorer_for(function="rules:length").identity,
    ]
    assert len(set(names)) == len(names)
    assert scorer_for(path=paths[0]).identity == names[0]


# Policies that were published before.


def test_a_published_policy_keeps_the_form_of_text_that_it_was_trained_with(
    tiny_config, tiny_model, reward_folder, tmp_path, scorer_for
):
    """Its own tokenizer renders by a wrapped template; a reward model of the first template still reads it."""
    chat = load_chat(tiny_model, tiny_config.data.template)
    shutil.copytree(tiny_model, tmp_path / "final")
    portable_tokenizer(chat).save_pretrained(tmp_path / "final")
    manifest = replace(read_manifest(reward_folder), stage="preference", template_digest=chat.digest)
    write_manifest(tmp_path / "final", manifest)
    config = replace(
        tiny_config,
        policy=replace(tiny_config.policy, path=str(tmp_path / "final")),
        data=replace(tiny_config.data, template=None),
    )
    own = load_chat(config.policy.path)
    check_template(config, own)
    assert own.digest == chat.digest == read_manifest(reward_folder).template_digest
    other = replace(config, data=replace(config.data, template="plain"))
    with pytest.raises(ModelError, match=r"leave data\.template unset for the policy's own"):
        check_template(other, load_chat(config.policy.path, "plain"))


@pytest.mark.parametrize("change", ["Be brief. {}", "{{# mine #}}{}", "{} "])
def test_a_policy_whose_template_was_changed_since_is_refused(tiny_config, tiny_model, reward_folder, tmp_path, change):
    """Its manifest says what it was trained with; what it would be shown now is another text."""
    chat = load_chat(tiny_model, tiny_config.data.template)
    shutil.copytree(tiny_model, tmp_path / "final")
    portable_tokenizer(chat).save_pretrained(tmp_path / "final")
    manifest = replace(read_manifest(reward_folder), stage="sft", template_digest=chat.digest)
    write_manifest(tmp_path / "final", manifest)
    template = tmp_path / "final" / "chat_template.jinja"
    template.write_text(change.format(template.read_text()))
    config = replace(
        tiny_config,
        policy=replace(tiny_config.policy, path=str(tmp_path / "final")),
        data=replace(tiny_config.data, template=None),
    )
    with pytest.raises(ModelError, match=r"is not the one that it was trained with .*copy the folder anew"):
        check_template(config, load_chat(config.policy.path))


@pytest.mark.parametrize("template", [None, "plain", "{{ messages[0]['content'] + ' ' + messages[-1]['content'] }}"])
def test_models_trained_from_a_published_one_have_its_form_of_text(tiny_model, tmp_path, template):
    """SFT, a reward model from its final/, PPO from its final/ with that reward model: one form of text."""
    chat = load_chat(tiny_model, template)
    for _ in range(2):
        portable_tokenizer(chat).save_pretrained(tmp_path)
        again = load_chat(tmp_path)
        assert again.digest == chat.digest
        chat = again


# Functions.


def test_a_function_sees_prompts_and_responses_as_text(scorer_for, rollouts, monkeypatch):
    import rules

    seen = []
    monkeypatch.setattr(rules, "share_of_abc", lambda *texts: seen.append(texts) or range(len(texts[1])))
    scored = scorer_for(function="rules:share_of_abc").score(rollouts)
    assert scored.raw.tolist() == scored.scores.tolist() == list(range(16))
    ((prompts, responses),) = seen
    assert prompts == [prompt.messages[-1]["content"] for prompt in rollouts.prompts]
    assert responses == list(rollouts.texts)
    assert not any("<|" in text for text in responses)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"rules:raises failed on 16 responses: RuntimeError: the scoring service is down"),
        ("one_too_few", r"rules:one_too_few gave 15 scores for 16 responses; expected one number"),
        ("no_numbers", r"rules:no_numbers failed on 16 responses: ValueError: could not convert"),
        ("nothing", r"rules:nothing failed on 16 responses: TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_function_that_fails_is_named_with_what_it_did(scorer_for, rollouts, name, message):
    scorer = scorer_for(function=f"rules:{name}")
    with pytest.raises(DataError, match=message):
        scorer.score(rollouts)


def test_scores_that_are_not_finite_are_passed_on(scorer_for, rollouts):
    scored = scorer_for(function="rules:one_not_a_number").score(rollouts)
    assert [math.isnan(value) for value in scored.raw.tolist()] == [True] + [False] * 15


def test_what_is_no_function_is_refused_at_once(scorer_for):
    with pytest.raises(ConfigError, match="rules:A_NUMBER: expected a function, found a float"):
        scorer_for(function="rules:A_NUMBER")


@pytest.mark.parametrize("spec", ["rules", "rules:", "rules:no_such", "no_such_module:f", ":f", "broken_rules:f"])
def test_a_function_that_is_not_there_is_refused_at_once(scorer_for, tmp_path, monkeypatch, spec):
    (tmp_path / "broken_rules.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"{spec}.*expected module:function"):
        scorer_for(function=spec)


# The critic.


@pytest.fixture
def new_critic(tiny_config):
    """``new_critic(reward_path=None, standardized=True, **critic section)``."""

    def build(reward_path=None, standardized=True, vocabulary=None, **section) -> ValueModel:
        tokenizer = load_tokenizer(tiny_config.policy.path)
        reward = tiny_config.reward if reward_path is None else RewardSourceConfig(path=reward_path)
        config = replace(tiny_config, critic=CriticConfig(**section), reward=reward)
        role = role_named(config.models, "critic")
        return build_critic(
            critic_start(role.backbone, standardized=standardized),
            dtype=torch.float32,
            pad_token_id=tokenizer.pad_token_id,
            vocabulary=vocabulary or required_embedding_rows(tokenizer),
            seed=0,
        ).eval()

    return build


@pytest.mark.parametrize("standardized", [True, False])
def test_the_critic_begins_as_the_reward_of_what_is_written_so_far(new_critic, reward_folder, rollouts, standardized):
    critic, model = new_critic(str(reward_folder), standardized), load_reward_model(reward_folder).eval()
    statistics = read_manifest(reward_folder).rewards
    mean, deviation = (statistics.mean, statistics.standard_deviation) if standardized else (0, 1)
    for index in range(4):
        (row,) = rollouts.item(index).rows
        start = len(rollouts.prompts[index].tokens)
        with torch.no_grad():
            (values,) = critic((length_bucket([row]),))
            before = [row.tokens[:end] for end in range(start, len(row.tokens))]
            expected = (torch.tensor(score_tokens(model, before, batch_tokens=500)) - mean) / deviation
        torch.testing.assert_close(values[0, start - 1 :], expected, rtol=1e-4, atol=1e-5)
        assert not values[0, : start - 1].any()


def test_beside_a_function_the_critic_is_the_policy_with_a_new_head(new_critic, tiny_model):
    critic = new_critic()
    base = LlamaForCausalLM.from_pretrained(tiny_model).model.state_dict()
    for name, value in critic.scorer.hf.model.state_dict().items():
        assert torch.equal(value, base[name]), name
    assert float(critic.scorer.hf.score.weight.detach().abs().max()) < 0.5
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_a_path_of_its_own_wins_over_the_reward_model(new_critic, reward_folder, other_reward_folder):
    own = new_critic(str(reward_folder), path=str(other_reward_folder))
    expected = load_reward_model(other_reward_folder)
    assert torch.equal(own.scorer.hf.score.weight, expected.hf.score.weight)


def test_frozen_layers_of_the_critic_rest_and_its_head_learns(new_critic, reward_folder):
    for path in (None, str(reward_folder)):
        critic = new_critic(path, freeze_layers=2)
        frozen = {name for name, parameter in critic.named_parameters() if not parameter.requires_grad}
        assert any("embed_tokens" in name for name in frozen) and any("layers.1." in name for name in frozen)
        assert not any("layers.2." in name or ".score." in name for name in frozen)


def test_a_critic_that_does_not_know_the_policys_tokens_is_refused(new_critic, foreign_reward_folder):
    with pytest.raises(ModelError, match=r"critic\.path = .* knows 280 tokens, and the policy writes 321"):
        new_critic(path=str(foreign_reward_folder))


# Servers of reward models.


@pytest.mark.parametrize("truncated", ["end", "score"])
def test_a_server_says_what_its_model_says_here(scorer_for, serving, reward_folder, rollouts, truncated):
    server = serving(reward_folder)
    here = scorer_for(path=str(reward_folder), truncated=truncated)
    there = scorer_for(url=server.url, truncated=truncated)
    expected, found = here.score(rollouts), there.score(rollouts)
    torch.testing.assert_close(found.raw, expected.raw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert float(expected.raw.std()) > 0.01


def test_a_server_of_another_scale_is_another_reward(scorer_for, scripted, reward_folder):
    card = card_of(reward_folder)
    cards = (card, card, replace(card, mean=card.mean + 1), replace(card, deviation=card.deviation * 2))
    names = [scorer_for(url=scripted(each, lambda body: (500, "")).url).identity for each in cards]
    assert names[0] == names[1] and len(set(names)) == 3
    raw = [scorer_for(url=scripted(each, lambda body: (500, "")).url, standardize=False).identity for each in cards]
    assert set(raw) == {scorer_for(path=str(reward_folder), standardize=False).identity}


def test_a_server_of_another_family_is_asked_by_messages(scorer_for, serving, foreign_reward_folder, rollouts):
    server = serving(foreign_reward_folder)
    with pytest.raises(ModelError, match=rf"reward\.url = {server.url} was trained on another form .* its tokenizer"):
        scorer_for(url=server.url)
    expected = scorer_for(path=str(foreign_reward_folder), retokenize=True).score(rollouts)
    found = scorer_for(url=(server.url,), retokenize=True).score(rollouts)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)


def test_a_server_is_one_of_several_terms(scorer_for, serving, reward_folder, rollouts):
    server = serving(reward_folder)
    terms = ({"url": server.url, "weight": 2.0}, {"function": "rules:share_of_abc", "weight": -1.0})
    found = scorer_for(terms=tuple(RewardTermConfig(**term) for term in terms)).score(rollouts)
    alone = (
        scorer_for(path=str(reward_folder)).score(rollouts),
        scorer_for(function="rules:share_of_abc").score(rollouts),
    )
    torch.testing.assert_close(found.scores, 2 * alone[0].scores - alone[1].scores, rtol=1e-4, atol=1e-3)


def test_a_fault_of_a_term_is_told_by_the_key_of_the_term(scorer_for, serving, foreign_reward_folder, tiny_model):
    function = RewardTermConfig(function="rules:share_of_abc")
    model = RewardTermConfig(path=str(foreign_reward_folder))
    with pytest.raises(ModelError, match=rf"^reward\.terms\[1\]\.path = {foreign_reward_folder} was trained on"):
        scorer_for(terms=(function, model))
    server = serving(foreign_reward_folder)
    with pytest.raises(ModelError, match=rf"^reward\.terms\[1\]\.url = {server.url} was trained on"):
        scorer_for(terms=(function, RewardTermConfig(url=server.url)))


def test_a_server_that_says_what_is_no_number_ends_the_step(scorer_for, scripted, reward_folder, rollouts):
    server = scripted(
        card_of(reward_folder),
        lambda body: (
            200,
            json.dumps({"data": [{"index": n, "probs": [math.nan]} for n in range(len(body["input"]))]}),
        ),
    )
    with pytest.raises(ModelError, match=rf"{server.url}: the score of a text is nan: the weights that it serves"):
        scorer_for(url=server.url).score(rollouts)
