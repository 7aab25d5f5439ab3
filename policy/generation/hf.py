"""Sampling with the policy's own Transformers model: left-padded rows, cached keys, ended rows make room for others."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

from policy.generation.api import Response, row_uniforms, sampler_tolerance
from policy.generation.attention import sampling_attention
from policy.generation.cache import expand, new_cache, settle, takes_more_rows
from policy.generation.draw import draw_tokens
from policy.generation.options import SamplingConfig
from policy.generation.recorded import Record, RecordedForwards, can_be_recorded, cuda_graph
from policy.generation.repetition import RepetitionPenalty
from policy.generation.rows import LiveRows, Written
from policy.generation.stopping import StopRule
from policy.model import DecodeStep, PolicyModel, policy_of
from rlhf.core.errors import ModelError
from rlhf.engine.frozen import Frozen
from rlhf.train.batches import asking
from rlhf.train.shortage import is_shortage

REFILL_SHARE = 8
"""New rows come in as soon as one place in so many is free: each time, what is cached is copied once."""

_NOT_RECORDED: "weakref.WeakSet[PolicyModel]" = weakref.WeakSet()
"""Policies whose forwards were found not to be the same when they are recorded."""

log = logging.getLogger(__name__)


class HfSampler:
    """A sampler on top of Transformers; see :class:`policy.generation.api.Sampler`.

    Up to ``batch_rows`` rows are written together, those with the longest prompts first. A prompt is computed once for
    all of its responses that begin together, then one token a row at a time. Rows that have ended cost nothing any
    more, and their places go to prompts that wait, where the model's cache can take rows in; else these wait for the
    last one. Where the rows do not fit into memory, half as many are written together from then on.

    On a GPU the forward of a token is recorded and replayed (:mod:`policy.generation.recorded`), and compared with the
    model's own at first. Where it cannot be, or there is no memory for it, tokens are written without.

    Args:
        model: its module is a :class:`policy.model.PolicyModel`; weights may change between calls.
        config: how tokens are drawn.
        eos_token_ids: tokens that end a response.
        pad_token_id: any token; it is never seen.
        tokenizer: for stop strings; not needed without.
        repetition_penalty: see :class:`RepetitionPenalty`; 1 for none. The log-probabilities of responses are then
            those under the changed logits.
        synced: the model is sharded, so that a forward needs all ranks: they stay together, forward by forward,
            and a rank that is done makes forwards for company. Every rank must then call :meth:`generate`, be it
            without prompts.
        record: how forwards are recorded; ``None`` for a CUDA graph on a GPU, and not at all elsewhere.
    """

    def __init__(
        self,
        model: Frozen,
        config: SamplingConfig,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        tokenizer: Any | None = None,
        repetition_penalty: float = 1.0,
        synced: bool = False,
        record: Record | None = None,
    ) -> None:
        self._model, self._config, self._penalty = model, config, repetition_penalty
        self._stop = StopRule(eos_token_ids, config.stop, tokenizer)
        self._pad, self._synced = pad_token_id, synced
        self._device = model.ranks.device
        self._rows = config.batch_rows
        if record is None and self._device.type == "cuda":
            record = cuda_graph
        self._record = record if config.cuda_graphs and not synced else None

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        advance: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """One response to each prompt; see :meth:`policy.generation.api.Sampler.generate`.

        Raises:
            ValueError: if there are not as many seeds as prompts, or a prompt is empty.
            ModelError: if the model's logits are not finite.
        """
        rows = [np.asarray(prompt, np.int64) for prompt in prompts]
        if len(seeds) != len(rows) or not all(map(len, rows)):
            raise ValueError(f"{len(rows)} prompts, {len(seeds)} seeds: expected one each, and no empty prompt")
        written = Written(len(rows), self._config.max_new_tokens, self._device)
        jobs = _Jobs(rows, seeds, written, advance)
        with asking(self._model), sampling_attention(policy_of(self._model).hf):
            while jobs.waiting:
                try:
                    self._write(jobs)
                    continue
                except Exception as error:
                    together = min(self._rows, len(prompts) - written.count)
                    if self._synced or together == 1 or not is_shortage(error):
                        raise
                    said = str(error).strip().partition("\n")[0] or type(error).__name__
                self._halve(together, said)  # the frames that held the cache are gone
                jobs.begin_anew()
            if self._synced:
                self._keep_company()
        responses = written.responses()
        self._check_finite(responses)
        return responses

    def _write(self, jobs: "_Jobs") -> None:
        """Write all rows that wait."""
        live: LiveRows | None = None
        recorded = None
        if self._record is not None and policy_of(self._model) not in _NOT_RECORDED:
            columns = jobs.longest_prompt + self._config.max_new_tokens
            recorded = RecordedForwards(policy_of(self._model), self._record, self._rows, columns)
        while jobs.waiting or live is not None:
            if jobs.waiting and self._has_room(live):
                count = self._rows if live is None else self._rows - len(live)
                live = _together(live, self._begin(jobs, jobs.take(count), all_columns=recorded is not None))
                jobs.tell()
            if live is not None:
                logits = self._go_on(live, recorded, more=bool(jobs.waiting))
                live.advance()
                live = self._draw(live, logits, jobs.written)
        jobs.tell()

    def _has_room(self, live: LiveRows | None) -> bool:
        if live is None:
            return True
        return len(live) <= self._rows - max(1, self._rows // REFILL_SHARE) and takes_more_rows(live.cache)

    def _halve(self, rows: int, said: str) -> None:
        """``rows`` at once were too many."""
        self._rows = rows // 2
        self._empty_cache()
        log.warning(
            "rank %d: %d responses at once do not fit into memory (%s): %d from now on, with the same results. A "
            "smaller batch_rows does so from the start",
            self._model.ranks.rank,
            rows,
            said[:200],
            self._rows,
        )

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _begin(self, jobs: "_Jobs", places: list[int], *, all_columns: bool) -> LiveRows | None:
        """Read the prompts of some rows and draw their first tokens; those that go on.

        All rows that are written together need caches of one kind; see :func:`new_cache`.
        """
        prompts = [jobs.prompts[place] for place in places]
        cache = new_cache(policy_of(self._model).hf.config, all_columns=all_columns)
        logits, columns = self._read_prompts(prompts, cache)
        penalty = None
        if self._penalty != 1:
            penalty = RepetitionPenalty(self._penalty, prompts, logits.shape[1], self._device)
        uniforms = np.stack([row_uniforms(jobs.seeds[place], self._config.max_new_tokens) for place in places])
        rows = LiveRows(
            np.array(places),
            np.array([len(prompt) for prompt in prompts]),
            torch.from_numpy(uniforms).to(self._device),
            cache,
            penalty,
            columns,
        )
        return self._draw(rows, logits, jobs.written)

    def _draw(self, rows: LiveRows, logits: Tensor, written: Written) -> LiveRows | None:
        """Append a token to each row; those that go on."""
        config = self._config
        if rows.penalty is not None:
            logits = rows.penalty.apply(logits)
        drawn = draw_tokens(
            logits, rows.uniforms(), temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        going_on = written.add(rows, drawn, self._stop)
        if not len(going_on):
            return None
        rows.keep(going_on)
        return rows

    def _read_prompts(self, prompts: list[NDArray[np.int64]], cache: Cache) -> tuple[Tensor, int]:
        """The ``(B, V)`` logits of the first tokens behind the prompts, and the columns that these take."""
        first: dict[bytes, int] = {}
        source = [first.setdefault(prompt.tobytes(), len(first)) for prompt in prompts]
        distinct = [prompts[source.index(place)] for place in range(len(first))]
        width = max(map(len, distinct))
        tokens = np.full((len(distinct), width), self._pad, np.int64)
        real = np.zeros(tokens.shape, bool)
        for place, prompt in enumerate(distinct):
            tokens[place, width - len(prompt) :] = prompt
            real[place, width - len(prompt) :] = True
        positions = np.maximum(real.cumsum(axis=1) - 1, 0)
        places = torch.tensor(source, device=self._device)
        mask = None if real.all() else torch.from_numpy(real).to(self._device)
        logits = self._ask(torch.from_numpy(tokens), mask, torch.from_numpy(positions), cache)
        expand(cache, places)
        return logits[places], width

    def _go_on(self, live: LiveRows, recorded: RecordedForwards | None, *, more: bool) -> Tensor:
        """The ``(B, V)`` logits behind the last tokens of the rows."""
        policy = policy_of(self._model)
        if recorded is None or policy in _NOT_RECORDED or not can_be_recorded(policy, live):
            return self._ask_by_itself(live)
        try:
            found, fault = self._replay(live, recorded, more=more)
        except Exception as error:  # whatever a model's own code does that cannot be recorded; or a lack of memory
            fault = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        if not fault:
            return found
        _NOT_RECORDED.add(policy)
        recorded.forget()
        self._empty_cache()
        log.warning(
            "rank %d: %s writes responses without a CUDA graph, kernel by kernel, as a recorded forward does not do "
            "what the model does (%s)",
            self._model.ranks.rank,
            type(policy.hf).__name__,
            fault,
        )
        return self._ask_by_itself(live)

    def _replay(self, live: LiveRows, recorded: RecordedForwards, *, more: bool) -> tuple[Tensor, str]:
        """The same by a recording, and what is wrong with it, if that is looked at."""
        recording = recorded.recording(live, more=more)
        expected = self._ask_by_itself(live) if recording.is_unproved(live) else None
        found = recording.logits(live)
        return found, "" if expected is None else self._difference(found, expected)

    def _ask_by_itself(self, live: LiveRows) -> Tensor:
        """The logits by a forward of its own, whatever the columns behind those of the rows hold by now."""
        settle(live.cache, len(live), live.columns)
        return self._ask(live.tokens[:, None], live.mask(), live.positions[:, None], live.cache)

    def _difference(self, found: Tensor, expected: Tensor) -> str:
        """What is wrong with logits that are further from others than rounding takes them; else nothing."""
        one, other = found.log_softmax(dim=-1), expected.log_softmax(dim=-1)
        gaps = torch.where(one == other, 0, (one - other).abs())
        gap = float((other.exp() * gaps).sum(dim=-1).max())
        allowed = sampler_tolerance(policy_of(self._model).hf.dtype)
        return "" if gap <= allowed else f"log-probabilities differ by {gap:.3g} nats, more than {allowed:.2g}"

    def _ask(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        """``(B, V)`` logits of what follows ``(B, t)`` tokens."""
        if self._synced:
            self._model.ranks.any(True)
        step = DecodeStep(
            tokens=tokens.to(self._device),
            attention_mask=mask,
            position_ids=positions.to(self._device),
            cache=cache,
        )
        return self._model.forward(decode=step)

    def _check_finite(self, responses: Sequence[Response]) -> None:
        """Ranks that stay together see the same count: all of them raise, or none."""
        bad = sum(not np.isfinite(response.logprobs).all() for response in responses)
        if self._synced:
            bad = int(self._model.ranks.sum(torch.tensor(bad, device=self._device)))
        if bad:
            raise ModelError(
                f"{bad} responses were drawn from logits that are not finite: the model's weights are broken"
            )

    def _keep_company(self) -> None:
        """Forwards that give the others their weights, until nobody needs one."""
        while self._model.ranks.any(False):
            one = torch.zeros((1, 1), dtype=torch.long, device=self._device)
            cache = new_cache(policy_of(self._model).hf.config)
            self._model.forward(decode=DecodeStep(tokens=one, attention_mask=None, position_ids=one, cache=cache))


class _Jobs:
    """The rows that are asked for, and those that nobody has begun yet: the longest prompts first, equal ones together.

    Args:
        prompts: tokens of each row.
        seeds: of each row.
        written: what there is of them.
        advance: told how many are done.
    """

    def __init__(
        self,
        prompts: Sequence[NDArray[np.int64]],
        seeds: Sequence[int],
        written: Written,
        advance: Callable[[int], None] | None,
    ) -> None:
        self.prompts, self.seeds, self.written, self._advance = prompts, seeds, written, advance
        self._order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), prompts[place].tobytes()))
        self.waiting = list(self._order)
        self.longest_prompt = max(map(len, prompts), default=0)
        self._told = 0

    def take(self, count: int) -> list[int]:
        """The places of the next rows."""
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def begin_anew(self) -> None:
        """All rows wait that are not done: what they had written is drawn again, from the same seeds."""
        self.waiting = [place for place in self._order if not self.written.is_done(place)]
        self.written.forget(self.waiting)

    def tell(self) -> None:
        if self._advance is not None and self.written.count > self._told:
            self._told = self.written.count
            self._advance(self._told)


def _together(live: LiveRows | None, more: LiveRows | None) -> LiveRows | None:
    if live is None or more is None:
        return more if live is None else live
    live.join(more)
    return live
