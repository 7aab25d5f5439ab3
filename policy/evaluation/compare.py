"""What policies are worth: reward of fresh samples for held-out prompts, and how far they are from a reference."""

import functools
import gc
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.evaluation.options import SamplingSettings
from policy.evaluation.results import PolicyEvaluation, markdown
from policy.evaluation.sampling import Sample, sample_responses
from policy.generation.check import check_sampling
from policy.generation.vllm.training import Engines, engines_of
from policy.model import PolicyModel
from policy.ppo.telemetry import response_kl
from policy.self_check import check_logprobs
from reward.function import Answers, RewardFunction, served_cards
from rlhf.core.errors import DataError, ModelError
from rlhf.core.files import write_json, write_text
from rlhf.core.findings import EVALUATION, KIND
from rlhf.core.intervals import Estimate, mean_with_interval
from rlhf.data.batching import length_bucket
from rlhf.data.messages import Asked, BadRow, as_messages
from rlhf.data.options import PromptColumns, TemplateChoice
from rlhf.data.plain_rows import plain_rows
from rlhf.data.records import to_prompt
from rlhf.data.templates import ChatFormat
from rlhf.engine.build import DTYPES, check_precision, precision_of
from rlhf.engine.frozen import Frozen, ReplicatedModel
from rlhf.engine.options import EngineConfig, Precision
from rlhf.engine.ranks import Ranks, single_rank
from rlhf.models.backbones import hide_loading_bars, load_causal_lm
from rlhf.models.options import BackboneConfig
from rlhf.models.stops import model_stop_tokens
from rlhf.train.chat import check_same_tokens, load_chat
from rlhf.train.progress import Progress

ROWS_AT_ONCE = 32
T = TypeVar("T")


REFERENCE = "reference"


@dataclass(frozen=True)
class Drawn:
    """This rank's samples of one policy."""

    samples: Sequence[Sample]
    logprobs: Sequence[Tensor]
    """``(T,)`` of the tokens of each response under the policy itself."""


def evaluate_policies(
    policies: Mapping[str, Path],
    reference: Path,
    prompts: Sequence[Asked],
    reward: RewardFunction,
    *,
    template: str | TemplateChoice | None,
    settings: SamplingSettings,
    output: Path,
    precision: Precision | Literal["auto"] = "auto",
    ranks: Ranks | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
) -> list[PolicyEvaluation]:
    """Sample from every policy and from the reference and compare; writes samples_NAME.jsonl, evaluation.json and .md.

    One model is held at a time: the reference, which is asked about the samples of all, comes last; then the rewards.

    Args:
        policies: Transformers folders by name.
        reference: the folder that KL and gains are counted from.
        prompts: held-out ones.
        columns: the other columns of their rows, for reward functions; ``None`` for none.
        reward: of answers. Those that it gives ``None`` for are left out.
        template: as ``data.template``.
        settings: of the samples; only where they come from the policy as it is, their mean log-ratio is called KL.
        output: folder to write into.
        precision: of all models.
        ranks: who share the prompts, and must all call it; ``None`` for this process by itself.
    Returns:
        The reference, then the policies.
    Raises:
        ModelError: if a folder is no language model, or has another tokenizer than the reference.
        ConfigError: if the precision is not there.
        DataError: if there is no prompt, the template cannot show one, or ``reward`` gives a wrong number of rewards or
            one that is not finite.
    """
    hide_loading_bars()
    ranks = ranks or single_rank()
    engine = EngineConfig(precision=precision)
    check_precision(engine, ranks.device, "precision")
    dtype = DTYPES[precision_of(engine)]
    check_model_folders([reference, *policies.values()])  # before anything takes time
    chat = load_chat(reference, template)
    for name, folder in policies.items():
        check_same_tokens(f"policies.{name}", str(folder), chat, f"reference = {reference}", trust_remote_code=False)
    for prompt in prompts:
        chat.render_prompt(as_messages(prompt))
    rows = [{}] * len(prompts) if columns is None else columns
    names = {REFERENCE: reference, **policies}
    drawn, against = _drawn_from_each(names, chat, prompts, settings, dtype, ranks, output)
    found: list[PolicyEvaluation] = []
    base_rewards: NDArray[np.float64] | None = None
    for name in names:
        samples = _all_of(drawn[name].samples, ranks)
        logprobs = _padded(_all_of(drawn[name].logprobs, ranks))
        other = _padded(_all_of(against[name], ranks))
        rewards = ranks.on_main(functools.partial(_rewards, reward, prompts, rows, samples))
        by_prompt = mean_by_prompt(rewards.reshape(len(prompts), settings.samples))
        ratios = response_kl(logprobs, other)
        found.append(_summary(name, samples, by_prompt, base_rewards, ratios, named=settings.from_the_policy))
        base_rewards = by_prompt if base_rewards is None else base_rewards
        if ranks.is_main:
            _write_samples(output / f"samples_{name}.jsonl", prompts, samples, rewards)
    if ranks.is_main:
        write_json(
            output / EVALUATION,
            {KIND: "evaluation", "policies": [asdict(each) for each in found], **served_cards(reward=reward)},
        )
        write_text(output / "evaluation.md", markdown(found))
    return found


def _drawn_from_each(
    names: Mapping[str, Path],
    chat: ChatFormat,
    prompts: Sequence[Asked],
    settings: SamplingSettings,
    dtype: torch.dtype,
    ranks: Ranks,
    output: Path,
) -> tuple[dict[str, Drawn], dict[str, Sequence[Tensor]]]:
    """Samples of each policy, and what the reference says of them. One model is held at a time, the reference last."""
    reference = names[REFERENCE]
    others = dict.fromkeys(folder for folder in names.values() if folder != reference)
    drawn: dict[str, Drawn] = {}
    against: dict[str, Sequence[Tensor]] = {}
    for folder in (*others, reference):
        model = open_policy(folder, dtype, ranks)
        own = replace(chat, stop_token_ids=model_stop_tokens(folder, chat.tokenizer))
        same = [name for name, other in names.items() if other == folder]
        with engines_of(model, own, settings, output / "vllm" / same[0]) as engines:
            of_this = _draw(model, own, prompts, settings, same[0], engines)
        drawn |= dict.fromkeys(same, of_this)
        if folder == reference:
            against = {name: _logprobs(model, each.samples) for name, each in drawn.items() if each is not of_this}
            against |= dict.fromkeys(same, of_this.logprobs)
        del model
        _free()
    return drawn, against


def _draw(
    model: Frozen,
    chat: ChatFormat,
    prompts: Sequence[Asked],
    settings: SamplingSettings,
    name: str,
    engines: Engines | None,
) -> Drawn:
    """Responses to this rank's share of the prompts."""
    ranks = model.ranks
    first, end = (len(prompts) * place // ranks.world_size for place in (ranks.rank, ranks.rank + 1))
    mine, total = prompts[first:end], (end - first) * settings.samples
    with Progress(ranks, max(total, 1), 0, f"{name}: sample") as progress:
        samples: Sequence[Sample] = ()
        if mine or engines is not None:
            samples = sample_responses(
                model, chat, mine, settings, lambda n: progress.advance(n, {}), first=first, engines=engines
            )
    samples = [replace(sample, prompt=first + sample.prompt) for sample in samples]
    return Drawn(samples, _own_logprobs(model, samples, settings))


def _all_of(mine: Sequence[T], ranks: Ranks) -> list[T]:
    """What all ranks have, in the order of the prompts."""
    return [each for part in ranks.gather_objects(list(mine)) for each in part]


def _padded(values: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)


def _free() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def mean_by_prompt(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(N,)`` means over the samples of each prompt; NaN for a prompt without rewards.

    Args:
        rewards: ``(N, samples)``; NaN where there is none.
    """
    counts = np.isfinite(rewards).sum(axis=1)
    return np.where(counts > 0, np.nansum(rewards, axis=1) / np.maximum(counts, 1), np.nan)


def read_prompts(path: Path) -> tuple[list[Asked], list[Mapping[str, Any]]]:
    """The prompts of a file of rows, as the stages read them, and the other columns of the rows.

    A prompt that is one text of the user comes as that text.

    Raises:
        DataError: naming the row that has none.
    """
    prompts: list[Asked] = []
    columns: list[Mapping[str, Any]] = []
    for place, row in plain_rows(path):
        try:
            record, _ = to_prompt(row, PromptColumns(), row_id=place, source=str(path))
        except BadRow as error:
            raise DataError(f"{path}, {place}: {error}") from error
        lone = len(record.prompt) == 1 and record.prompt[0].keys() == {"role", "content"}
        prompts.append(record.prompt[0]["content"] if lone else record.prompt)
        columns.append(record.columns)
    return prompts, columns


def check_model_folders(folders: Iterable[Path]) -> None:
    """Refuse a folder that holds neither a model nor an adapter.

    Raises:
        ModelError: naming the folder.
    """
    for folder in folders:
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: not a model folder (no config.json); give the final/ folder of a run")


def open_policy(folder: Path, dtype: torch.dtype = torch.float32, ranks: Ranks | None = None) -> Frozen:
    """The language model in a folder, to sample from and to ask for log-probabilities. Every rank must call it.

    Args:
        folder: of the model.
        dtype: of its weights.
        ranks: ``None`` for this process by itself.
    Raises:
        ModelError: if the folder holds none.
    """
    ranks = ranks or single_rank()

    def load() -> PolicyModel:
        policy = PolicyModel(load_causal_lm(BackboneConfig(path=str(folder)), dtype=dtype, vocabulary=0))
        if ranks.is_main:
            check_logprobs(policy, str(folder))
        return policy

    model = ReplicatedModel(ranks.together(load), ranks)
    check_sampling(model, str(folder))
    return model


def _rewards(
    reward: RewardFunction,
    prompts: Sequence[Asked],
    columns: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
) -> NDArray[np.float64]:
    """``(N,)`` rewards; NaN for those that there is none of."""
    answers = Answers(
        prompts=[prompts[sample.prompt] for sample in samples],
        responses=[sample.text for sample in samples],
        token_ids=[sample.row.tokens[sample.row.response].tolist() for sample in samples],
        ended=[sample.ended for sample in samples],
        columns=[columns[sample.prompt] for sample in samples],
    )
    given = list(reward(answers))
    known = np.array([value for value in given if value is not None], dtype=np.float64)
    if len(given) != len(samples) or not np.isfinite(known).all():
        raise DataError(
            f"the reward function gave {len(given)} values for {len(samples)} responses, "
            f"{int((~np.isfinite(known)).sum())} of them not finite; expected one finite number (or None) each"
        )
    if not len(known):
        raise DataError(f"the reward function gave None for all of {len(samples)} responses: nothing can be compared")
    return np.array([np.nan if value is None else value for value in given], dtype=np.float64)


def _own_logprobs(model: Frozen, samples: Sequence[Sample], settings: SamplingSettings) -> Sequence[Tensor]:
    """What a model says of its own samples. It has said so when it drew them, if that was from its own logits."""
    if settings.temperature == settings.repetition_penalty == 1.0:
        return [torch.from_numpy(sample.logprobs) for sample in samples]
    return _logprobs(model, samples)


@torch.inference_mode()
def _logprobs(model: Frozen, samples: Sequence[Sample]) -> list[Tensor]:
    """``(T,)`` of the tokens of each response."""
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].row.tokens))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), ROWS_AT_ONCE):
        places = order[start : start + ROWS_AT_ONCE]
        bucket = length_bucket([samples[place].row for place in places]).to(model.ranks.device)
        (values,) = model.forward((bucket,)).logprobs
        of_responses = zip(places, values.float().cpu(), bucket.response_mask[:, 1:].cpu(), strict=True)
        found |= {place: row[mask] for place, row, mask in of_responses}
    return [found[place] for place in range(len(samples))]


def _summary(
    name: str,
    samples: Sequence[Sample],
    by_prompt: NDArray[np.float64],
    base: NDArray[np.float64] | None,
    ratios: Mapping[str, float],
    *,
    named: bool,
) -> PolicyEvaluation:
    """``named``: the log-ratios of the samples may be called KL."""
    return PolicyEvaluation(
        name=name,
        reward=mean_with_interval(by_prompt[np.isfinite(by_prompt)]),
        gain=None if base is None else _gain(by_prompt - base),
        kl=ratios["kl"] if named else None,
        kl_k3=ratios["kl_k3"] if named else None,
        log_ratio=ratios["kl"],
        tokens=float(np.mean([sample.row.response.sum() for sample in samples])),
        ended_share=float(np.mean([sample.ended for sample in samples])),
        prompts=int(np.isfinite(by_prompt).sum()),
        samples=len(samples),
    )


def _gain(by_prompt: NDArray[np.float64]) -> Estimate | None:
    """The mean gain on the prompts that both have rewards for; ``None`` if there is none."""
    both = by_prompt[np.isfinite(by_prompt)]
    return mean_with_interval(both) if len(both) else None


def _write_samples(
    path: Path, prompts: Sequence[Asked], samples: Sequence[Sample], rewards: NDArray[np.float64]
) -> None:
    of_each = len(samples) // len(prompts)
    rows = [
        {
            "id": f"{sample.prompt}/{place % of_each}",
            "prompt": prompts[sample.prompt],
            "response": sample.text,
            "reward": reward if np.isfinite(reward) else None,
            "ended": sample.ended,
        }
        for place, (sample, reward) in enumerate(zip(samples, rewards.tolist(), strict=True))
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
