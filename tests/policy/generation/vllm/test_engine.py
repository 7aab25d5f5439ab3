"""The real vLLM: equal completions, weights that arrive or are refused, engines that are killed."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from policy.evaluation.compare import open_policy
from policy.generation.api import row_seed
from policy.generation.hf import HfSampler
from policy.generation.options import SamplingConfig
from policy.generation.vllm.client import Weights
from policy.generation.vllm.pool import EnginePool
from policy.generation.vllm.sampler import VllmSampler, launch_of
from policy.generation.vllm.weights import WeightPush, WeightSource, _Writer
from rlhf.core.errors import ModelError
from rlhf.engine.frozen import ReplicatedModel
from rlhf.models.gguf import embedded_model, import_gguf
from rlhf.models.options import LoraOptions
from rlhf.train.chat import load_chat
from tests.conftest import SHARED_DATA
from tests.lacking import lacking
from tests.policy.generation.vllm.conftest import AGREE, assert_same, move
from tests.policy.generation.vllm.pushes import (
    GREEDY,
    LONG,
    assert_a_killed_engine_comes_back,
    assert_pushes_change_completions,
    assert_ranks_push,
    both_samplers,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def newest(pool: EnginePool) -> int:
    """The version that the engine of a pool has."""
    return 0 if pool._weights is None else max(0, int(pool._client(0).state()["version"]), pool._weights.version)


@pytest.fixture
def pushing(shared_pool, alone, tmp_path):
    """``pushing(policy)``: a push to the shared engine, and both samplers of the policy."""

    def make(policy, config=GREEDY):
        model = ReplicatedModel(policy, alone)
        push = WeightPush(model, shared_pool, tmp_path)
        shared_pool._of_before = newest(shared_pool)
        return push, *both_samplers(model, shared_pool, config)

    return make


def test_pushed_weights_give_the_completions_of_the_policy_that_was_pushed(pushing, wide_policy, prompts, seeds):
    policy = wide_policy()
    push, ours, own = pushing(policy)
    assert_pushes_change_completions(policy, push, ours, own, prompts, seeds)


def test_weights_of_the_head_arrive_where_it_shares_them_with_the_embedding(pushing, wide_policy, prompts, seeds):
    policy = wide_policy()
    push, ours, own = pushing(policy)
    push.push()
    with torch.no_grad():
        policy.hf.get_input_embeddings().weight.mul_(1.7)
    push.push()
    assert_same(ours.generate(prompts, seeds), own.generate(prompts, seeds))


def test_adapters_arrive_merged(pushing, wide_policy, prompts, seeds, tmp_path):
    policy = wide_policy(lora=LoraOptions(rank=4, alpha=8))
    move(policy, 0.1)
    push, ours, own = pushing(policy)
    push.push()
    assert_same(ours.generate(prompts, seeds), own.generate(prompts, seeds))
    sent = dict(WeightSource(ReplicatedModel(policy, own._model.ranks)))
    merged = dict(policy.merged().named_parameters())
    assert sent.keys() == merged.keys()
    for name, weight in sent.items():
        torch.testing.assert_close(weight, merged[name].detach(), rtol=0, atol=0)


def test_a_push_that_is_skipped_is_found(pushing, shared_pool, wide_policy, prompts, seeds, monkeypatch):
    policy = wide_policy()
    push, ours, _ = pushing(policy)
    push.push()
    move(policy)
    monkeypatch.setattr(EnginePool, "_push", lambda self, number: None)
    push.push()
    with pytest.raises(ModelError, match="asked for weights of version"):
        ours.generate(prompts, seeds)


def test_weights_that_are_not_new_under_a_new_version_are_found(pushing, shared_pool, wide_policy):
    policy = wide_policy()
    push, _, _ = pushing(policy)
    push.push()
    old = shared_pool._weights
    sums = {name: "0" * 16 if name == "1" else value for name, value in old.sums.items()}
    with pytest.raises(ModelError, match=r"are not what was sent: layers 1 \(1 of"):
        shared_pool.set_weights(Weights(old.folder, old.version + 1, sums))


@pytest.mark.parametrize(
    "left_out", ["layers.1.self_attn.v_proj", "layers.2.mlp.up_proj", "embed_tokens", "model.norm"]
)
def test_a_tensor_that_is_left_out_is_found(pushing, wide_policy, monkeypatch, left_out):
    policy = wide_policy()
    push, _, _ = pushing(policy)
    push.push()
    move(policy)
    add = _Writer.add
    monkeypatch.setattr(_Writer, "add", lambda self, name, weight: left_out in name or add(self, name, weight))
    with pytest.raises(ModelError, match="are not what was sent"):
        push.push()


def test_pushes_out_of_order_are_refused_and_the_newer_weights_stay(pushing, shared_pool, wide_policy, prompts, seeds):
    policy = wide_policy()
    push, ours, own = pushing(policy)
    push.push()
    older = shared_pool._weights
    move(policy)
    push.push()
    newer = shared_pool._weights
    with pytest.raises(ModelError, match=f"weights of version {older.version} came after those of version"):
        shared_pool.set_weights(older)
    shared_pool._weights = newer
    assert_same(ours.generate(prompts, seeds), own.generate(prompts, seeds))


def test_sampling_repeats_itself_and_knows_its_log_probabilities(pushing, wide_policy, prompts, seeds):
    config = SamplingConfig(max_new_tokens=12, temperature=0.8, batch_rows=32)
    push, ours, _ = pushing(wide_policy(), config)
    push.push()
    first, second = ours.generate(prompts, seeds), ours.generate(prompts, seeds)
    assert_same(first, second)
    fewer = ours.generate(prompts[:3], seeds[:3])
    assert_same(fewer, first[:3])
    other = ours.generate(prompts, [seed + 1 for seed in seeds])
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


def test_samples_come_from_the_distribution_that_their_log_probabilities_say(pushing, wide_policy):
    config = SamplingConfig(max_new_tokens=1, temperature=0.7, batch_rows=32)
    policy = wide_policy()
    push, ours, _ = pushing(policy, config)
    push.push()
    prompt, count = np.array([5, 9, 40]), 600
    drawn = ours.generate([prompt] * count, [row_seed("draw", place) for place in range(count)])
    with torch.no_grad():
        logits = policy.plain()(torch.from_numpy(prompt)[None]).logits[0, -1]
    expected = torch.log_softmax(logits / 0.7, dim=-1)
    for each in drawn:
        assert abs(float(expected[each.tokens[0]]) - float(each.logprobs[0])) < AGREE
    tops = expected.exp().topk(5)
    for token, chance in zip(tops.indices.tolist(), tops.values.tolist(), strict=True):
        share = sum(each.tokens[0] == token for each in drawn) / count
        assert abs(share - chance) < 4 * (chance * (1 - chance) / count) ** 0.5


def test_a_stop_string_ends_a_response_as_with_the_own_sampler(pushing, wide_policy, tiny_tokenizer, prompts, seeds):
    config = SamplingConfig(max_new_tokens=24, top_k=1, stop=("e", "a"), batch_rows=32)
    policy = wide_policy()
    push, _, _ = pushing(policy)
    push.push()
    model = ReplicatedModel(policy, push._ranks)
    options = {"eos_token_ids": (2,), "tokenizer": tiny_tokenizer}
    own = HfSampler(model, config, pad_token_id=2, **options).generate(prompts, seeds)
    assert_same(VllmSampler(push._ranks, push._pool, config, **options).generate(prompts, seeds), own)
    assert any(each.ended for each in own)


def test_a_repetition_penalty_is_that_of_the_own_sampler(pushing, wide_policy, prompts, seeds):
    policy = wide_policy()
    push, _, _ = pushing(policy)
    push.push()
    options = {"eos_token_ids": (2,), "tokenizer": None, "repetition_penalty": 1.4}
    own = HfSampler(ReplicatedModel(policy, push._ranks), GREEDY, pad_token_id=2, **options)
    ours = VllmSampler(push._ranks, push._pool, GREEDY, **options)
    found, expected = ours.generate(prompts, seeds), own.generate(prompts, seeds)
    assert [each.tokens.tolist() for each in found] == [each.tokens.tolist() for each in expected]


def test_an_engine_that_is_killed_in_a_rollout_comes_back_with_the_weights_of_now(
    pushing, shared_pool, wide_policy, seeds, caplog
):
    policy = wide_policy()
    push, ours, own = pushing(policy, LONG)
    assert_a_killed_engine_comes_back(policy, push, ours, own, shared_pool, caplog)


def test_smollm2_says_the_same_on_both_backends_to_50_prompts(tmp_path, alone, engine_options):
    if not SHARED_DATA.is_dir():
        lacking(f"{SHARED_DATA} is not there")
    folder = tmp_path / "smollm2"
    import_gguf(embedded_model(), folder)
    model, chat = open_policy(folder), load_chat(folder, None)
    config = SamplingConfig(max_new_tokens=16, top_k=1, vllm=engine_options)
    with gzip.open(SHARED_DATA / "alpaca_eval_instructions.json.gz", "rt") as file:
        texts = [row["instruction"] for row in json.load(file) if len(row["instruction"]) < 160][:50]
    shown = [chat.render_prompt([{"role": "user", "content": text}]) for text in texts]
    prompts = [np.array(tokens) for tokens in chat.tokenizer(shown, add_special_tokens=False)["input_ids"]]
    pool = EnginePool(launch_of(config, dtype=torch.float32, folder=tmp_path, tokenizer=folder))
    options = {"eos_token_ids": chat.end_token_ids, "tokenizer": chat.tokenizer}
    try:
        WeightPush(model, pool, tmp_path / "weights").push()
        found = VllmSampler(alone, pool, config, **options).generate(prompts, range(50))
    finally:
        pool.close()
    own = HfSampler(model, config, pad_token_id=chat.tokenizer.pad_token_id, **options)
    assert_same(found, own.generate(prompts, range(50)))


def test_a_folder_on_its_way_is_a_model_folder(pushing, shared_pool, wide_policy):
    policy = wide_policy()
    push, _, _ = pushing(policy)
    push.push()
    folder = Path(shared_pool._weights.folder)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors.index.json"}
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    torch.testing.assert_close(stored["model.norm.weight"], policy.hf.model.norm.weight.detach())


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "ranks", "lora"), [("zero2", 2, 0), ("zero3", 2, 0), ("zero3", 2, 4), ("zero1", 1, 0), ("local", 1, 0)]
)
def test_weights_arrive_from_ranks_that_share_them(
    run_ranks, wide_model, shared_pool, wide_policy, pushing, tmp_path, monkeypatch, kind, ranks, lora
):
    pushing(wide_policy())[0].push()  # which starts the engine
    assert_ranks_push(
        run_ranks, shared_pool, monkeypatch, tmp_path, wide_model, "folder", kind=kind, ranks=ranks, lora=lora
    )
