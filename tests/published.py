"""Reward models with random weights, as the reward stage publishes them."""

import shutil
from pathlib import Path

import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from reward.building import build_reward_model
from reward.config import RewardModelConfig
from reward.saving import save_reward_model
from reward.serving.vllm_settings import write_vllm_settings
from rlhf.data.options import TemplateChoice
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import chat_format
from rlhf.models.manifest import Manifest, RewardStatistics, write_manifest
from rlhf.models.tokenizer import load_tokenizer, required_embedding_rows
from rlhf.train.publishing import text_form

SPOKEN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"

WITH_TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "\n{% endfor %}"
)


def published(source: Path, folder: Path, template: TemplateChoice | None = None, **model) -> Path:
    """A reward model with random weights, as the reward stage publishes it."""
    chat = chat_format(load_tokenizer(source), template)
    config = RewardModelConfig(path=str(source), head_init_scale=30.0, **model)
    built = build_reward_model(
        config,
        dtype=torch.float32,
        pad_token_id=chat.tokenizer.pad_token_id,
        vocabulary=required_embedding_rows(chat.tokenizer),
        seed=0,
    )
    save_reward_model(built, folder)
    portable_tokenizer(chat).save_pretrained(folder)
    manifest = Manifest(
        stage="reward",
        base_model="tiny",
        **text_form(chat),
        head_kind=config.head,
        head_dtype="float32",
        rewards=RewardStatistics(mean=0.1, standard_deviation=0.4, count=8),
        margin_statistics={},
        loss={},
        training_data="none",
    )
    write_manifest(folder, manifest)
    write_vllm_settings(folder, chat)
    return folder


def with_begin_token(source: Path, folder: Path) -> Path:
    """A copy of a model whose tokenizer puts a token before every text, as Llama's do, and pads on the left."""
    shutil.copytree(source, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    begin = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.padding_side, tokenizer.chat_template = "left", SPOKEN
    tokenizer.save_pretrained(folder)
    return folder
