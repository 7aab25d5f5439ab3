"""A benchmark from recipe to table: texts are shared out over ranks by length, and scored once each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.benchmark.config import BenchmarkConfig
from policy.benchmark.implicit import response_logprobs
from policy.evaluation.compare import check_model_folders, open_policy
from reward.benchmarks.formulas import Scored
from reward.benchmarks.items import BenchmarkItem, Messages, read_items
from reward.benchmarks.results import BenchmarkResult, markdown, summarize, to_dict
from reward.saving import load_reward_model
from reward.score import check_scorer, score_tokens
from reward.serving.card import card_of
from reward.serving.client import RewardServers
from rlhf.core.errors import DataError, ModelError
from rlhf.core.files import write_text
from rlhf.core.findings import write_findings
from rlhf.data.batching import Row
from rlhf.data.options import TemplateChoice
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.build import DTYPES, check_precision, precision_of
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.backbones import hide_loading_bars
from rlhf.models.options import BackboneConfig
from rlhf.models.positions import places_of, settings_of
from rlhf.train.chat import check_same_tokens, load_chat
from rlhf.train.progress import Progress

CHUNK_ROWS = 512
"""Texts between two updates of the progress display, on each rank."""

Score = Callable[[Sequence[Row]], list[float]]


@dataclass(frozen=True)
class Judge:
    """A model that scores answers."""

    chat: ChatFormat
    limit: int | None
    """Tokens that it takes; ``None`` for any number."""
    open: Callable[[], Score]
    """Loads it. Every rank must call it."""
    servers: RewardServers | None = None
    """What scores in its place."""


def run_benchmark(config: BenchmarkConfig, ranks: Ranks) -> BenchmarkResult:
    """Score all answers, and write evaluation.json, items.jsonl and benchmark.md. Every rank must call it.

    Raises:
        DataError: if the rows are not those of the benchmark.
        ModelError: if the model cannot be read as asked for.
    """
    hide_loading_bars()
    judge = ranks.together(lambda: _judge(config, ranks))
    items, left_out = ranks.main_first(lambda: read_items(config.benchmark, config.data, config.split, config.columns))
    prompts = _other_prompts(items) if config.wrong_prompt else []
    texts = [(item.prompt, answer) for item in items for answer in item.answers]
    texts += [(prompt, answer) for prompt, item in zip(prompts, items, strict=bool(prompts)) for answer in item.answers]
    limit = min(filter(None, (config.max_tokens, judge.limit)), default=None)
    rows, cut = ranks.together(lambda: _tokenized(judge.chat, texts, items, limit))
    score = judge.open()
    scores = _scores(score, rows, ranks)
    sizes = [len(item.answers) for item in items]
    parts = np.split(np.array(scores), np.cumsum(sizes * (2 if prompts else 1))[:-1])
    own, elsewhere = parts[: len(items)], parts[len(items) :] if prompts else None
    lengths = [int(row.response.sum()) for row in rows[: sum(sizes)]]
    notes = [note for note in (left_out, f"{cut} texts were cut to {limit} tokens" if cut else "") if note]
    result = summarize(
        config.benchmark,
        str(config.model),
        [Scored(id=i.id, subset=i.subset, scores=s, right=i.right) for i, s in zip(items, own, strict=True)],
        lengths=np.split(np.array(lengths, float), np.cumsum(sizes)[:-1]),
        elsewhere=elsewhere,
        annotated=[item.annotated for item in items],
        notes=notes,
    )
    if ranks.is_main:
        served = {} if judge.servers is None else {"served": {"model": str(judge.servers.card)}}
        _write(config.output, to_dict(result) | served, items, own, elsewhere)
        write_text(config.output / "benchmark.md", markdown(result))
    return result


def _judge(config: BenchmarkConfig, ranks: Ranks) -> Judge:
    """The model of the recipe, by its files alone."""
    engine = EngineConfig(precision=config.precision)
    check_precision(engine, ranks.device, "precision")
    dtype = DTYPES[precision_of(engine)]
    check_model_folders(filter(None, (config.model, config.reference)))
    limit = places_of(settings_of(BackboneConfig(path=str(config.model))))
    choice = TemplateChoice(text=config.template)
    if config.reference is None:
        chat = check_scorer(config.model) if config.template is None else load_chat(config.model, choice)

        def open_reward_model() -> Score:
            model = ranks.together(lambda: load_reward_model(config.model, dtype=dtype)).eval().to(ranks.device)
            return lambda rows: score_tokens(model, [row.tokens for row in rows], batch_tokens=config.batch_tokens)

        if config.urls:
            servers = RewardServers(config.urls, setting="url")
            return Judge(chat, limit, lambda: ranks.together(lambda: _served(config, servers)), servers)
        return Judge(chat, limit, open_reward_model)
    chat = load_chat(config.model, choice)
    check_same_tokens("reference", str(config.reference), chat, f"model = {config.model}", trust_remote_code=False)
    reference = config.reference

    def open_pair() -> Score:
        policy, base = open_policy(config.model, dtype, ranks), open_policy(reference, dtype, ranks)

        def score(rows: Sequence[Row]) -> list[float]:
            found = (response_logprobs(model, rows, batch_tokens=config.batch_tokens) for model in (policy, base))
            return [own - other for own, other in zip(*found, strict=True)]

        return score

    return Judge(chat, limit, open_pair)


def _served(config: BenchmarkConfig, servers: RewardServers) -> Score:
    """The servers of the recipe, if they serve the model in its folder.

    Raises:
        ModelError: if they serve another one.
    """
    differ = card_of(config.model).differences(servers.card)
    if differ:
        raise ModelError(
            f"url = {', '.join(config.urls)}: does not serve model = {config.model}: other {', '.join(differ)} (here "
            "and there)"
        )
    return lambda rows: servers.score_tokens([row.tokens for row in rows])


def _other_prompts(items: Sequence[BenchmarkItem]) -> list[Messages]:
    """The prompt of another item for each: half the benchmark away, and not the same text.

    Raises:
        DataError: if all items have one prompt.
    """
    count = len(items)
    if all(item.prompt == items[0].prompt for item in items):
        raise DataError("wrong_prompt = true needs items with different prompts; set wrong_prompt=false")
    found = []
    for place, item in enumerate(items):
        ways = (items[(place + count // 2 + step) % count].prompt for step in range(count))
        found.append(next(prompt for prompt in ways if prompt != item.prompt))
    return found


def _tokenized(
    chat: ChatFormat, texts: Sequence[tuple[Messages, Messages]], items: Sequence[BenchmarkItem], limit: int | None
) -> tuple[list[Row], int]:
    """The rows of all texts, and how many of them were too long and lost the beginning of their prompt."""
    names = [item.id for item in items for _ in item.answers]
    rendered = []
    for place, (prompt, answer) in enumerate(texts):
        try:
            rendered.append(chat.render(prompt, answer))
        except TemplateFault as error:
            raise DataError(f"item {names[place % len(names)]}: the chat template cannot show it: {error}") from error
    rows, cut = [], 0
    for tokens, start in chat.tokenize(rendered):
        response = np.arange(len(tokens)) >= start
        if limit is not None and len(tokens) > limit:
            tokens, response, cut = tokens[-limit:], response[-limit:], cut + 1
        rows.append(Row(tokens, response))
    return rows, cut


def _scores(score: Score, rows: Sequence[Row], ranks: Ranks) -> NDArray[np.float64]:
    """``(n,)`` scores of all rows, on every rank; texts that come several times are scored once."""
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.tokens.tobytes() + row.response.tobytes(), []).append(place)
    distinct = sorted((same[0] for same in places.values()), key=lambda place: (-len(rows[place].tokens), place))
    mine = distinct[ranks.rank :: ranks.world_size]

    def score_mine() -> dict[int, float]:
        found: dict[int, float] = {}
        with Progress(ranks, max(1, len(mine)), 0, "texts of each rank") as progress:
            for start in range(0, len(mine), CHUNK_ROWS):
                chunk = mine[start : start + CHUNK_ROWS]
                found |= dict(zip(chunk, score([rows[place] for place in chunk]), strict=True))
                progress.advance(len(found), {})
        return found

    everything: dict[int, float] = {}
    for part in ranks.gather_objects(ranks.together(score_mine)):
        everything |= part
    scores = np.zeros(len(rows))
    for same in places.values():
        scores[same] = everything[same[0]]
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise ModelError(f"{bad} of {len(scores)} scores are not finite: the model's weights are broken")
    return scores


def _write(
    folder: Path,
    found: Mapping[str, Any],
    items: Sequence[BenchmarkItem],
    own: Sequence[NDArray[np.float64]],
    elsewhere: Sequence[NDArray[np.float64]] | None,
) -> None:
    lines = []
    for place, item in enumerate(items):
        line = {"id": item.id, "subset": item.subset, "right": item.right, "scores": own[place].tolist()}
        if elsewhere is not None:
            line["wrong_prompt_scores"] = elsewhere[place].tolist()
        lines.append(line)
    write_findings(folder, "benchmark", found, lines)
