import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from reward.building import build_reward_model
from reward.config import RewardModelConfig
from reward.saving import load_reward_model, save_reward_model
from rlhf.core.errors import ModelError
from rlhf.core.masking import length_mask
from rlhf.data.batching import LengthBucket
from rlhf.models.options import LoraOptions

LENGTHS = [3, 11, 7]


def rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (length,), generator=generator) for length in LENGTHS]


def build(path, **options):
    config = RewardModelConfig(path=str(path), head_init_scale=30.0, **options)
    return build_reward_model(config, dtype=torch.float32, pad_token_id=0, vocabulary=259, seed=0).eval()


def padded(side):
    width = max(LENGTHS)
    tokens = torch.full((3, width), 2)
    mask = torch.zeros(3, width, dtype=torch.bool)
    for place, row in enumerate(rows()):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[place, span], mask[place, span] = row, True
    return tokens, mask


def bucket(tokens, mask):
    return LengthBucket(tokens=tokens, token_mask=mask, response_mask=mask)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Learned absolute positions: left padding must not shift them."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["tiny_model", "gpt2"])
@torch.no_grad()
def test_padding_side_and_batching_give_one_score(family, request):
    model = build(request.getfixturevalue(family))
    single = torch.cat([model.score(row[None], torch.ones(1, len(row)).bool()) for row in rows()])
    for side in ("right", "left"):
        torch.testing.assert_close(model.score(*padded(side)), single, rtol=0, atol=1e-5)
    torch.testing.assert_close(model((bucket(*padded("right")),)).rewards, single, rtol=0, atol=1e-5)
    assert single.std() > 1e-3


@torch.no_grad()
def test_length_buckets_give_the_scores_of_one_block(tiny_model):
    model = build(tiny_model)
    whole = model((bucket(*padded("right")),))
    split = model(tuple(bucket(row[None], length_mask(torch.tensor([len(row)]), len(row))) for row in rows()))
    torch.testing.assert_close(split.rewards, whole.rewards, rtol=0, atol=1e-5)
    torch.testing.assert_close(split.embeddings, whole.embeddings, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_encoder_scores_and_shows_what_its_head_reads(bert):
    model = build(bert)
    scores = model((bucket(*padded("right")),))
    single = torch.cat([model.score(row[None], torch.ones(1, len(row)).bool()) for row in rows()])
    torch.testing.assert_close(scores.rewards, single, rtol=0, atol=1e-5)
    assert model._head_input == []
    torch.testing.assert_close(model.hf.classifier(scores.embeddings).squeeze(-1), scores.rewards)


@torch.no_grad()
def test_rewards_are_float32_in_a_bfloat16_model(tiny_model):
    config = RewardModelConfig(path=str(tiny_model))
    model = build_reward_model(config, dtype=torch.bfloat16, pad_token_id=0, vocabulary=259, seed=0)
    scores = model((bucket(*padded("right")),))
    assert scores.embeddings.dtype == torch.bfloat16 and scores.rewards.dtype == torch.float32


def test_rewards_start_near_zero(tiny_model):
    config = RewardModelConfig(path=str(tiny_model))
    model = build_reward_model(config, dtype=torch.float32, pad_token_id=0, vocabulary=259, seed=0)
    assert model((bucket(*padded("right")),)).rewards.abs().max() < 0.6


def test_lora_trains_adapters_above_the_frozen_layers_and_the_head(tiny_model):
    model = build(tiny_model, lora=LoraOptions(rank=4), freeze_layers=2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score" in name for name in trained)
    assert all("layers.2." in name or "score" in name for name in trained)


@pytest.mark.parametrize(
    "options", [{}, {"lora": LoraOptions(rank=4)}, {"head": "mlp", "head_hidden": 8}, {"layers": 2}]
)
@torch.no_grad()
def test_a_saved_model_scores_the_same_after_loading(tiny_model, tmp_path, options):
    model = build(tiny_model, **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    before = model.score(*padded("right"))
    save_reward_model(model, tmp_path / "saved")
    after = load_reward_model(tmp_path / "saved").eval().score(*padded("left"))
    torch.testing.assert_close(after, before, rtol=3e-5, atol=1e-5)


def test_plain_transformers_refuses_a_two_layer_head(tiny_model, tmp_path):
    save_reward_model(build(tiny_model, head="mlp", head_hidden=8), tmp_path / "saved")
    with pytest.raises(ValueError, match="margin-rlhf-mlp-reward"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")


def test_a_language_model_is_not_taken_for_a_reward_model(tiny_model):
    with pytest.raises(ModelError, match="not a reward model"):
        load_reward_model(tiny_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 9}, "model.layers = 9"),
        ({"freeze_layers": 9}, "model.freeze_layers = 9"),
        ({"lora": LoraOptions(targets=["no_such"])}, "model.lora.targets"),
    ],
)
def test_impossible_parts_are_refused(tiny_model, options, message):
    with pytest.raises(ModelError, match=message):
        build(tiny_model, **options)


def test_the_embedding_grows_to_the_vocabulary_and_no_further(tiny_model):
    config = RewardModelConfig(path=str(tiny_model))
    model = build_reward_model(config, dtype=torch.float32, pad_token_id=347, vocabulary=348, seed=0)
    assert model.hf.get_input_embeddings().num_embeddings == 348


@pytest.mark.parametrize("family", ["tiny_model", "bert"])
@torch.no_grad()
def test_the_head_of_a_reward_model_is_where_more_training_begins(request, family, tmp_path):
    """Augmenting a reward model started from noise, unsaid."""
    path = request.getfixturevalue(family)
    first = build(path)
    assert first.head_origin == "a new one"
    asked = bucket(*padded("right"))
    expected = first((asked,)).rewards
    save_reward_model(first, tmp_path / "rm")
    again = build(tmp_path / "rm")
    torch.testing.assert_close(again((asked,)).rewards, expected)
    assert again.head_origin.startswith(f"the one of {tmp_path}/rm")
    fresh = build_reward_model(
        RewardModelConfig(path=str(tmp_path / "rm"), head_init_scale=90.0, new_head=True),
        dtype=torch.float32, pad_token_id=0, vocabulary=259, seed=1,
    ).eval()  # fmt: skip
    assert (fresh((asked,)).rewards - expected).abs().max() > 1e-2
    assert fresh.head_origin == f"a new one, in place of that of {tmp_path}/rm"
