"""``rlhf check served``: does a server give the scores of plain Transformers, however it is asked?"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from reward.reload_check import own_scorer, plain_scorer
from reward.saving import OWN_MODEL_TYPES
from reward.score import check_scorer
from reward.serving.card import card_of
from reward.serving.client import RewardServers
from rlhf.core.errors import DataError
from rlhf.data.messages import Message
from rlhf.data.options import ColumnConfig, SourceConfig
from rlhf.data.records import to_conversations
from rlhf.data.sources import open_source
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.models.options import BackboneConfig
from rlhf.models.positions import places_of, settings_of
from rlhf.train.publishing import CONVERSATIONS
from rlhf.train.reloading import padded

LONGEST = 600
"""Tokens of the longest sample, where the model takes so many."""
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
CALLING: Sequence[Sequence[Message]] = (
    (
        {"role": "system", "content": "Be brief.", "tools": [CLOCK]},
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "I do not know."},
    ),
    (
        {"role": "user", "content": "What time is it?", "tools": [CLOCK]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}],
        },
        {"role": "tool", "content": "It is noon."},
        {"role": "assistant", "content": "It is noon."},
    ),
)
"""Conversations for templates that show what an assistant may call."""
SHARE = 0.01
"""What a score may be off unless told otherwise, as a share of the deviation of rewards."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One way of asking, beside plain Transformers in float32, text by text."""

    way: str
    texts: int
    worst: float
    """The largest difference, in logits."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a check."""

    comparisons: tuple[Comparison, ...]
    tolerance: float
    """What a score may be off, in logits."""
    deviation: float
    """The deviation of held-out rewards, or that of the samples, in logits."""
    differences: tuple[str, ...]
    """What the server's card says in another way than the folder."""

    @property
    def worst(self) -> float:
        return max((each.worst for each in self.comparisons), key=lambda worst: (math.isnan(worst), worst))

    @property
    def passed(self) -> bool:
        return not self.differences and all(each.worst <= self.tolerance for each in self.comparisons)


def check_served(url: str, folder: Path, *, data: str | None = None, rows: int = 64, share: float = SHARE) -> Verdict:
    """Compare the scores of a server with those of plain Transformers, over forms of request and sides of padding.

    Args:
        url: of the server.
        folder: of the model that it should serve.
        data: file of texts or pairs to compare besides those that are made up.
        rows: texts of it, at most.
        share: of the deviation of rewards that a score may be off.
    Raises:
        ModelError: if the server cannot be asked, or the folder is no reward model.
        DataError: if the model's template can show none of the samples.
    """
    chat = check_scorer(folder)
    servers = RewardServers([url], setting="served")
    differences = tuple(card_of(folder).differences(servers.card))
    samples = _samples(chat, folder, [*CONVERSATIONS, *CALLING, *(_of_file(data, rows) if data else ())])
    tokens = [chat.encode(each[:-1], each[-1:])[0] for each in samples]
    texts = [chat.render(each[:-1], each[-1:])[1] for each in samples]
    own = json.loads((folder / "config.json").read_text())["model_type"] in OWN_MODEL_TYPES.values()
    score, reads_left = (own_scorer if own else plain_scorer)(folder, False, {})
    pad = chat.tokenizer.pad_token_id
    lists = [row.tolist() for row in tokens]
    expected = torch.cat([score(*padded([row], pad, "right")) for row in lists])
    found: dict[str, tuple[Sequence[int], Sequence[float]]] = {}
    everything = range(len(samples))
    few = sorted(everything, key=lambda place: len(lists[place]))[:8]
    for side in ("right", "left") if reads_left else ("right",):
        blocks = score(*padded([lists[place] for place in few], pad, side))
        found[f"plain Transformers, padded on the {side}"] = few, blocks.tolist()
    found["/classify, messages"] = everything, servers.score_conversations(samples)
    found["/classify, texts"] = (
        everything,
        _asked(servers, "/classify", [{"input": text, "add_special_tokens": False} for text in texts]),
    )
    found["/classify, token ids"] = everything, _asked(servers, "/classify", [{"input": [row]} for row in lists])
    (at_once,) = servers.ask("/classify", [({"input": lists}, len(lists))])
    found["/classify, token ids, all in one request"] = everything, at_once
    pairs = [place for place in everything if [each["role"] for each in samples[place]] == ["user", "assistant"]]
    contents = [[message["content"] for message in samples[place]] for place in pairs]
    found["/score, pairs"] = (
        pairs,
        _asked(servers, "/score", [{"queries": question, "documents": answer} for question, answer in contents]),
    )
    deviation = servers.card.deviation or float(expected.std())
    comparisons = tuple(
        Comparison(
            way=way,
            texts=len(places),
            worst=float((torch.tensor(scores, dtype=torch.float32) - expected[list(places)]).abs().max()),
        )
        for way, (places, scores) in found.items()
        if places
    )
    return Verdict(comparisons=comparisons, tolerance=share * deviation, deviation=deviation, differences=differences)


def verdict_table(verdict: Verdict) -> Table:
    """A line for each way of asking."""
    table = Table(title="Scores beside those of plain Transformers", title_justify="left")
    table.add_column("asked by")
    for name in ("texts", "largest difference", ""):
        table.add_column(name, justify="right")
    for each in verdict.comparisons:
        word = "equal" if each.worst <= verdict.tolerance else "DIFFERS"
        table.add_row(each.way, str(each.texts), f"{each.worst:.2g}", word)
    return table


def verdict_line(verdict: Verdict, url: str, folder: Path) -> str:
    """The verdict in one line."""
    if verdict.differences:
        return f"{url} does not serve {folder}: other {', '.join(verdict.differences)} (here and there)"
    share = verdict.tolerance / verdict.deviation
    allowed = f"{verdict.tolerance:.2g} allowed, {share:.2g} of the deviation of rewards"
    if verdict.passed:
        return f"{url} gives the scores of {folder}: largest difference {verdict.worst:.2g} logits ({allowed})"
    return f"{url} gives OTHER scores than {folder}: up to {verdict.worst:.2g} logits off ({allowed})"


def _asked(servers: RewardServers, path: str, bodies: Sequence[dict[str, Any]]) -> list[float]:
    return [score for (score,) in servers.ask(path, [(body, 1) for body in bodies])]


def _samples(chat: ChatFormat, folder: Path, conversations: Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """Those that the template can show and the model takes; with a long one, and one answer for another."""
    limit = places_of(settings_of(BackboneConfig(path=str(folder)))) or LONGEST
    made = [*conversations, *(_long(chat, min(limit, LONGEST)))]
    kept = []
    for each in made:
        try:
            ids, _ = chat.encode(each[:-1], each[-1:])
        except TemplateFault:
            continue
        if len(ids) <= limit:
            kept.append(each)
    if not kept:
        raise DataError(f"{folder}: its chat template can show none of {len(made)} samples; give rows with --data")
    return kept


def _long(chat: ChatFormat, tokens: int) -> list[list[Message]]:
    """Two answers to one long question, of a bit less than so many tokens."""
    sentence = "The bridge over the river was closed in the spring, and nobody knew for how long. "
    each = len(chat.tokenizer(sentence, add_special_tokens=False)["input_ids"])
    question = {"role": "user", "content": (sentence * max(1, (tokens - 100) // each)).strip()}
    answers = ("That is sad.", "What a wonderful spring! Thank you, I love it.")
    return [[question, {"role": "assistant", "content": answer}] for answer in answers]


def _of_file(path: str, rows: int) -> list[list[Message]]:
    """Conversations of the first rows of a file.

    Raises:
        DataError: if a row holds none.
    """
    found: list[list[Message]] = []
    for row in open_source(SourceConfig(path=path)).rows():
        if len(found) >= rows:
            break
        if row.fault is not None or not isinstance(row.value, Mapping):
            raise DataError(f"{path}: row {row.line}: {row.fault or 'expected an object'}")
        for answers in to_conversations(row.value, ColumnConfig()).values():
            found += [[*prompt, *response] for prompt, response in answers if len(response) == 1]
    return found[:rows]
