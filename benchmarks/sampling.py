"""Sample several completions per prompt from a small chat model; a kill loses one batch."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf.core.errors import DataError, ModelError
from rlhf.core.files import digest, write_text


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What the samples depend on, besides the prompts and the machine's rounding."""

    seed: int = 0
    completions: int = 6
    """Completions per prompt."""
    max_new_tokens: int = 40
    """A completion that has not ended by then is cut there."""
    batch_prompts: int = 16
    """Prompts sampled together; part of the seeding, so another value gives other samples."""


def load_sampler(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a Transformers folder, in float32 and ready for left-padded generation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no Transformers model here (no config.json); make one with "
            f"'rlhf import-gguf smollm2 {folder}' or name another folder with --model"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, tokenizer


@torch.inference_mode()
def sample_batch(
    model: Any, tokenizer: Any, template: str, prompts: Sequence[str], settings: SamplingSettings, seed: int
) -> tuple[list[list[str]], int]:
    """Completions of each prompt at temperature 1, nothing cut off, and the number of new tokens."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats,
        chat_template=template,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=settings.max_new_tokens,
        num_return_sequences=settings.completions,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    new = output[:, batch["input_ids"].shape[1] :]
    ended = (new == tokenizer.eos_token_id).cumsum(dim=1)
    count = int((ended - (new == tokenizer.eos_token_id).long() == 0).sum())
    texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    each = settings.completions
    return [texts[start : start + each] for start in range(0, len(texts), each)], count


def sample_all(
    folder: Path, template: str, prompts: Sequence[str], settings: SamplingSettings, cache: Path
) -> list[list[str]]:
    """Completions of every prompt; finished batches are kept in ``cache`` and not sampled again.

    Raises:
        DataError: if ``cache`` holds samples made with other settings, prompts or another model.
    """
    header = _header(folder, template, prompts, settings)
    done = _resume(cache, header, len(prompts), settings.batch_prompts)
    if len(done) == len(prompts):
        return done
    model, tokenizer = load_sampler(folder)
    with _progress() as progress, cache.open("a", encoding="utf-8") as handle:
        task = progress.add_task("sampling", total=len(prompts), completed=len(done), rate="")
        for start, batch in _batches(prompts, len(done), settings.batch_prompts):
            seed = settings.seed * 1_000_003 + start
            texts, tokens = sample_batch(model, tokenizer, template, batch, settings, seed)
            handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts))
            handle.flush()
            os.fsync(handle.fileno())
            done.extend(texts)
            progress.update(task, advance=len(batch), rate=_rate(progress.tasks[task], tokens))
            if not progress.console.is_terminal:
                print(f"sampled {len(done)} of {len(prompts)} prompts", flush=True)
    return done


def _batches(prompts: Sequence[str], first: int, size: int) -> Iterator[tuple[int, Sequence[str]]]:
    for start in range(first, len(prompts), size):
        yield start, prompts[start : start + size]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )


def _rate(task: Any, tokens: int) -> str:
    """New tokens per second over the time since the last batch."""
    elapsed = task.elapsed or 0.0
    seconds = elapsed - task.fields.get("last", 0.0)
    task.fields["last"] = elapsed
    return f"{tokens / max(seconds, 1e-9):.0f} tokens/s"


def _header(
    folder: Path, template: str, prompts: Sequence[str], settings: SamplingSettings
) -> dict[str, Any]:
    weights = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    config = (folder / "config.json").read_text(encoding="utf-8") if weights else ""
    return {
        **asdict(settings),
        "model": digest(config, json.dumps(weights)),
        "prompts": digest(template, *prompts),
    }


def _resume(cache: Path, header: dict[str, Any], total: int, batch_prompts: int) -> list[list[str]]:
    """Samples of the whole batches in ``cache``; what a kill left of the next batch is cut off."""
    first = json.dumps(header) + "\n"
    if not cache.exists():
        write_text(cache, first)
        return []
    lines = cache.read_text(encoding="utf-8").splitlines(keepends=True)
    if not lines or lines[0] != first:
        raise DataError(
            f"{cache}: holds samples made with other settings, prompts or another model; delete it to start "
            "again, or name another folder with --output"
        )
    whole = [line for line in lines[1:] if line.endswith("\n")]
    if len(whole) < total:
        whole = whole[: len(whole) - len(whole) % batch_prompts]
    write_text(cache, first + "".join(whole))
    return [json.loads(line) for line in whole]
