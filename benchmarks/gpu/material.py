"""Models with random weights, and rows as tokens: made before anything is measured."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.world import World, device, has_gpu


def cells(world: World) -> list[Cell]:
    return [Cell(part="material", name="models and rows", function=f"{__name__}:make", seconds=40)]


def make(world: World) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from rlhf.models.tokenizer import load_tokenizer, required_embedding_rows

    tokenizer = load_tokenizer(str(world.tokenizer))
    vocabulary = required_embedding_rows(tokenizer)
    shared = {
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    found: dict[str, Any] = {}
    kinds: list[tuple[Path, Any, Mapping[str, int], dict[str, int]]] = [
        (world.policy, LlamaForCausalLM, world.sizes.model, {}),
        (world.reward, LlamaForSequenceClassification, world.sizes.model, {"num_labels": 1}),
        (world.small, LlamaForCausalLM, world.sizes.small, {}),
    ]
    for folder, kind, shape, more in kinds:
        torch.manual_seed(0)
        with torch.device(device()):
            model = kind(LlamaConfig(**shared, **shape, **more))
        if folder == world.policy and world.sizes.end_rate:
            _end_more_often(model, tokenizer, world)
        small = folder == world.small
        model.to(torch.float32 if small or not has_gpu() else torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[folder.name] = sum(parameter.numel() for parameter in model.parameters())
        del model
    _write_prompts(world)
    (world.work / "rows").mkdir()
    return found


def _end_more_often(model: Any, tokenizer: Any, world: World) -> None:
    import torch
    from ppo_workload import end_more_often

    lines = Path(world.prompts).read_text(encoding="utf-8").splitlines()[:16]
    messages = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in messages]
    sizes = world.sizes
    end_more_often(
        model.eval(),
        tokenizer,
        texts,
        Namespace(seed=0, end_rate=sizes.end_rate, response_tokens=min(64, sizes.response_tokens)),
    )
    assert torch.isfinite(model.get_output_embeddings().weight).all()


def _write_prompts(world: World) -> None:
    """The prompts as a user writes them, and as the model reads them."""
    from rlhf.train.chat import load_chat

    chat = load_chat(str(world.policy))
    lines = Path(world.prompts).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines][:256]
    rows = [{"prompt": text, "text": chat.render_prompt(({"role": "user", "content": text},))} for text in texts]
    (world.work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_file(world: World, name: str, tokens: int, stage: str) -> Path:
    """Tokens of all pairs for TRL, in the order in which ours takes them."""
    return world.work / "rows" / f"{name}-{tokens}-{stage}.jsonl"


def counts_of(world: World, name: str, tokens: int) -> list[dict[str, int]]:
    """Tokens of each pair: of the prompt, of both answers."""
    return json.loads((world.work / "rows" / f"{name}-{tokens}.json").read_text())


def write_rows(world: World, name: str, tokens: int) -> None:
    """Write the files of :func:`rows_file` and :func:`counts_of`, if they are not there."""
    import numpy as np

    from rlhf.data.batching import global_batch
    from rlhf.data.options import DataConfig
    from rlhf.data.preferences import load_preferences
    from rlhf.train.chat import load_chat

    counted = world.work / "rows" / f"{name}-{tokens}.json"
    if counted.is_file():
        return
    sizes, settings = world.sizes, world.settings_of(name, tokens)
    data = load_preferences(DataConfig(**settings), load_chat(str(world.policy))).train
    count = sizes.pairs * sizes.steps
    assert len(data) == count, f"{world.rows[name]}: {len(data)} pairs of at most {tokens} tokens, not {count}"
    steps = (global_batch(step, items=count, batch_size=sizes.pairs, seed=0) for step in range(sizes.steps))
    for_dpo, for_reward, counts = [], [], []
    for index in np.concatenate(list(steps)).tolist():
        chosen, rejected = data.item(index).rows
        starts = [int(np.flatnonzero(row.response)[0]) for row in (chosen, rejected)]
        start = min(starts)
        assert (chosen.tokens[:start] == rejected.tokens[:start]).all(), f"{name}: two prompts in one pair"
        whole = {"chosen_ids": chosen.tokens.tolist(), "rejected_ids": rejected.tokens.tolist()}
        for_reward.append(whole)
        for_dpo.append({"prompt_ids": whole["chosen_ids"][:start], **{k: v[start:] for k, v in whole.items()}})
        answers = len(chosen.tokens) + len(rejected.tokens) - 2 * start
        counts.append({"prompt": start, "answers": answers})
    for stage, rows in (("dpo", for_dpo), ("reward", for_reward)):
        path = rows_file(world, name, tokens, stage)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted.write_text(json.dumps(counts))
