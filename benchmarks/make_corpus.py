"""Make the quickstart's preference corpus: sample completions, label them, pair them, split by topic."""

import argparse
import json
import os
import random
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from launch.quickstart.gold import gold_reward
from policy.evaluation.compare import open_policy
from policy.evaluation.options import SamplingSettings
from policy.evaluation.sampling import sample_responses
from rlhf.core.errors import DataError, ModelError, UserError
from rlhf.core.files import digest, write_text
from rlhf.engine.ranks import single_rank
from rlhf.train.chat import load_chat
from rlhf.train.progress import Progress

HERE = Path(__file__).resolve().parent.parent / "launch" / "quickstart"
TEMPLATE = HERE / "chat.jinja"
COMPLETIONS = 6
"""Completions of each prompt."""
MAX_NEW_TOKENS = 40
"""A completion that has not ended by then is cut there."""
PROMPTS_AT_ONCE = 16
"""Prompts sampled between two writes. Without effect on the samples."""
PHRASINGS = (
    "Write one sentence about {}.",
    "In one sentence, what comes to mind about {}?",
    "Tell me something about {} in one sentence.",
    "Write the first sentence of a story about {}.",
)
HELD_OUT_SHARE = 0.2
PAIRS_PER_PROMPT = 3
SMALLEST_GAP = 0.1
UNWANTED = re.compile(
    r"https?:|www\.|shit|bitch|slut|asshole"
    r"|\b(?:nude|sex|negro\w*|slaves?|jew(?:s|ish)?|muslims?|islam\w*|isis|iraq|world war)\b",
    re.IGNORECASE,
)
"""Links, strong language and made-up statements about peoples, religions and wars, as met in the samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One writing prompt and the topic group it belongs to."""

    text: str
    topic: str


def read_topics() -> dict[str, list[str]]:
    """Topic group -> subjects, as shipped beside this file."""
    return json.loads((Path(__file__).parent / "topics.json").read_text(encoding="utf-8"))


def make_prompts(topics: dict[str, list[str]], seed: int) -> list[Prompt]:
    """One prompt per subject in shuffled order; the phrasings take turns."""
    subjects = [(topic, subject) for topic in sorted(topics) for subject in topics[topic]]
    random.Random(seed).shuffle(subjects)
    return [
        Prompt(text=PHRASINGS[index % len(PHRASINGS)].format(subject), topic=topic)
        for index, (topic, subject) in enumerate(subjects)
    ]


def held_out_topics(topics: Iterable[str], seed: int) -> set[str]:
    """The topic groups whose prompts nothing is trained on: about a fifth."""
    names = sorted(topics)
    return set(random.Random(seed).sample(names, round(HELD_OUT_SHARE * len(names))))


def usable(texts: Sequence[str]) -> list[str]:
    """Texts in their order without empty ones, repetitions, cut characters and what is ``UNWANTED``."""
    return [
        text for text in dict.fromkeys(texts) if text and "\ufffd" not in text and not UNWANTED.search(text)
    ]


def make_pairs(prompt: Prompt, texts: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Pairs without a common text, ``PAIRS_PER_PROMPT`` at most, each with a gap of ``SMALLEST_GAP`` or more.

    The better half of the texts meets the worse half in order: best against the best of the worse half. On a
    line this leaves the fewest pairs with too small a gap, and it avoids pairing the best with the worst.
    """
    ranked = sorted(zip(scores, texts, strict=True), reverse=True)
    half = len(ranked) // 2
    pairs = []
    for (high, chosen), (low, rejected) in zip(ranked[:half], ranked[-half:] if half else [], strict=True):
        if high - low >= SMALLEST_GAP:
            pairs.append(
                {
                    "prompt": prompt.text,
                    "chosen": chosen,
                    "rejected": rejected,
                    "chosen_score": high,
                    "rejected_score": low,
                    "topic": prompt.topic,
                }
            )
    return pairs[:PAIRS_PER_PROMPT]


def sample_all(folder: Path, prompts: Sequence[str], settings: SamplingSettings, cache: Path) -> list[list[str]]:
    """Completions of every prompt, as ``rlhf evaluate policy`` would draw them; a kill loses those of one batch.

    Raises:
        ModelError: if ``folder`` holds no model.
        DataError: if ``cache`` holds samples made with other settings, prompts or another model.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no Transformers model here (no config.json); make one with "
            f"'rlhf import-gguf smollm2 {folder}' or name another folder with --model"
        )
    done = _resume(cache, _header(folder, prompts, settings), len(prompts))
    if len(done) == len(prompts):
        return done
    model, chat = open_policy(folder), load_chat(folder, str(TEMPLATE))
    with Progress(single_rank(), len(prompts), len(done), "prompt") as progress, cache.open("a") as handle:
        for start in range(len(done), len(prompts), PROMPTS_AT_ONCE):
            part = prompts[start : start + PROMPTS_AT_ONCE]
            texts = [sample.text for sample in sample_responses(model, chat, part, settings, first=start)]
            rows = [texts[place : place + settings.samples] for place in range(0, len(texts), settings.samples)]
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
            handle.flush()
            os.fsync(handle.fileno())
            done.extend(rows)
            progress.advance(len(done), {})
    return done


def _header(folder: Path, prompts: Sequence[str], settings: SamplingSettings) -> str:
    """What the samples depend on, as the first line of the cache."""
    weights = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    model = digest((folder / "config.json").read_bytes(), json.dumps(weights))
    shown = digest(TEMPLATE.read_bytes(), *prompts)
    return json.dumps({**asdict(settings), "model": model, "prompts": shown}) + "\n"


def _resume(cache: Path, header: str, total: int) -> list[list[str]]:
    """The samples in ``cache``; half a line that a kill left is cut off."""
    if not cache.exists():
        write_text(cache, header)
        return []
    lines = cache.read_text(encoding="utf-8").splitlines(keepends=True)
    if not lines or lines[0] != header:
        raise DataError(
            f"{cache}: holds samples made with other settings, prompts or another model; delete it to start "
            "again, or name another folder with --output"
        )
    whole = [line for line in lines[1 : total + 1] if line.endswith("\n")]
    write_text(cache, header + "".join(whole))
    return [json.loads(line) for line in whole]


def write_corpus(
    output: Path, prompts: Sequence[Prompt], rows: Sequence[dict[str, Any]], held_out: set[str]
) -> None:
    """Four jsonl files in ``output``: pairs and prompts, for training and held out."""
    for name, wanted in (("train", False), ("heldout", True)):
        pairs = [row for row in rows if (row["topic"] in held_out) == wanted]
        kept = [prompt for prompt in prompts if (prompt.topic in held_out) == wanted]
        _write_rows(output / f"sentiment_pairs_{name}.jsonl", pairs)
        _write_rows(output / f"prompts_{name}.jsonl", [{"prompt": p.text, "topic": p.topic} for p in kept])


def describe(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What a reader wants to know of some pairs: counts, gold scores, gaps and length bias."""
    if len(rows) < 2:
        return {"pairs": str(len(rows))}
    scores = [row[key] for row in rows for key in ("chosen_score", "rejected_score")]
    gaps = [row["chosen_score"] - row["rejected_score"] for row in rows]
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    sizes = [len(row[key]) for row in rows for key in ("chosen", "rejected")]
    return {
        "pairs": str(len(rows)),
        "prompts with a pair": str(len({row["prompt"] for row in rows})),
        "topics": str(len({row["topic"] for row in rows})),
        "mean gold score": f"{statistics.fmean(scores):.3f}",
        "sd of the gold score": f"{statistics.stdev(scores):.3f}",
        "median gap": f"{statistics.median(gaps):.3f}",
        "longer one wins": f"{100 * statistics.fmean(longer):.1f} %",
        "characters per text": f"{statistics.fmean(sizes):.0f}",
    }


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _table(columns: dict[str, Sequence[dict[str, Any]]]) -> Table:
    described = {name: describe(rows) for name, rows in columns.items()}
    table = Table("", *described)
    for key in dict.fromkeys(key for values in described.values() for key in values):
        table.add_row(key, *(values.get(key, "") for values in described.values()))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.make_corpus", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="Transformers folder of the sampled model")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the four files; samples.jsonl is kept there too"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the split (default 0)")
    parser.add_argument("--prompts", type=int, help="stop after this many prompts, for a trial (default all)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Sample (or resume), label, pair, split, write, and print what came out."""
    if options.threads:
        torch.set_num_threads(options.threads)
    topics = read_topics()
    prompts = make_prompts(topics, options.seed)[: options.prompts]
    settings = SamplingSettings(samples=COMPLETIONS, max_new_tokens=MAX_NEW_TOKENS, seed=options.seed)
    samples = sample_all(options.model, [p.text for p in prompts], settings, options.output / "samples.jsonl")
    rows: list[dict[str, Any]] = []
    for prompt, texts in zip(prompts, map(usable, samples), strict=True):
        rows.extend(make_pairs(prompt, texts, gold_reward([prompt.text] * len(texts), texts)))
    held_out = held_out_topics(topics, options.seed)
    write_corpus(options.output, prompts, rows, held_out)
    console = Console()
    every = [text for texts in samples for text in texts]
    scores = gold_reward([""] * len(every), every)
    console.print(
        f"{len(every)} samples, {sum(len(usable(texts)) for texts in samples)} usable; "
        f"gold score {statistics.fmean(scores):.3f}, sd {statistics.stdev(scores):.3f}"
    )
    console.print(
        _table(
            {
                "train": [row for row in rows if row["topic"] not in held_out],
                "held out": [row for row in rows if row["topic"] in held_out],
            }
        )
    )


def main() -> int:
    """Command line; a fault of input is one line on standard error and status 2."""
    try:
        run(_parser().parse_args())
    except UserError as error:
        print(f"make_corpus: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
