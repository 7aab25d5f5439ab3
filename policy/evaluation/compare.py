"""What policies are worth: reward of fresh samples for held-out prompts, and how far they are from a reference."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from policy.evaluation.options import SamplingSettings
from policy.evaluation.results import PolicyEvaluation, markdown
from policy.evaluation.sampling import Sample, sample_responses
from policy.generation.check import check_sampling
from policy.model import PolicyModel
from policy.self_check import check_logprobs
from reward.function import RewardFunction
from rlhf.core.errors import DataError, ModelError
from rlhf.core.files import write_json, write_text
from rlhf.core.intervals import mean_with_interval
from rlhf.data.batching import length_bucket
from rlhf.data.options import TemplateChoice
from rlhf.engine.frozen import Frozen, ReplicatedModel
from rlhf.engine.ranks import single_rank
from rlhf.models.backbones import hide_loading_bars, load_causal_lm
from rlhf.models.options import BackboneConfig
from rlhf.models.stops import model_stop_tokens
from rlhf.train.chat import load_chat
from rlhf.train.progress import Progress

ROWS_AT_ONCE = 32


def evaluate_policies(
    policies: Mapping[str, Path],
    reference: Path,
    prompts: Sequence[str],
    reward: RewardFunction,
    *,
    template: str | TemplateChoice | None,
    settings: SamplingSettings,
    output: Path,
) -> list[PolicyEvaluation]:
    """Sample from every policy (the reference first) and compare; writes samples, evaluations.json and .md.

    Args:
        policies: Transformers folders by name.
        reference: the folder that KL and gains are counted from.
        prompts: held-out user messages.
        reward: ``(prompts, responses) -> rewards``.
        template: as ``data.template``.
        settings: of the samples; KL is estimated at temperature 1 and top_p 1 only when these are drawn so.
        output: folder to write into.
    Raises:
        ModelError: if a folder is no language model.
        DataError: if there is no prompt, or ``reward`` gives a wrong number of rewards or one that is not finite.
    """
    hide_loading_bars()
    for folder in (reference, *policies.values()):  # before anything takes time
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder}: not a model folder (no config.json); give the final/ folder of a run")
    chat = load_chat(reference, template)
    base = open_policy(reference)
    found: list[PolicyEvaluation] = []
    base_rewards: NDArray[np.float64] | None = None
    for name, folder in {"reference": reference, **policies}.items():
        model = base if folder == reference else open_policy(folder)
        with Progress(single_rank(), len(prompts) * settings.samples, 0, f"{name}: sample") as progress:
            own = replace(chat, stop_token_ids=model_stop_tokens(folder, chat.tokenizer))
            samples = sample_responses(model, own, prompts, settings, lambda done: progress.advance(done, {}))
        rewards = _rewards(reward, prompts, samples)
        ratios = np.zeros(len(samples))
        if model is not base:
            ratios = _own_logprobs(model, samples, settings) - _logprobs(base, samples)
        by_prompt = rewards.reshape(len(prompts), settings.samples).mean(axis=1)
        found.append(_summary(name, samples, by_prompt, base_rewards, ratios))
        base_rewards = by_prompt if base_rewards is None else base_rewards
        _write_samples(output / f"samples_{name}.jsonl", prompts, samples, rewards)
    write_json(output / "evaluations.json", [asdict(each) for each in found])
    write_text(output / "evaluations.md", markdown(found))
    return found


def read_prompts(path: Path) -> list[str]:
    """The "prompt" of each line of a jsonl file.

    Raises:
        DataError: naming the line that has none.
    """
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: expected an object with a text prompt") from error
    return prompts


def open_policy(folder: Path) -> Frozen:
    """The language model in a folder, in float32, to sample from and to ask for log-probabilities.

    Raises:
        ModelError: if the folder holds none.
    """
    hf = load_causal_lm(BackboneConfig(path=str(folder)), dtype=torch.float32, vocabulary=0)
    policy = PolicyModel(hf)
    check_logprobs(policy, str(folder))
    model = ReplicatedModel(policy, single_rank())
    check_sampling(model, str(folder))
    return model


def _rewards(reward: RewardFunction, prompts: Sequence[str], samples: Sequence[Sample]) -> NDArray[np.float64]:
    values = np.asarray(reward([prompts[s.prompt] for s in samples], [s.text for s in samples]), dtype=np.float64)
    if values.shape != (len(samples),) or not np.isfinite(values).all():
        raise DataError(
            f"the reward function gave {values.shape} values for {len(samples)} responses, "
            f"{int((~np.isfinite(values)).sum())} of them not finite; expected one finite number each"
        )
    return values


def _own_logprobs(model: Frozen, samples: Sequence[Sample], settings: SamplingSettings) -> NDArray[np.float64]:
    """What a model says of its own samples. It has said so when it drew them, if that was at temperature 1."""
    if settings.temperature == 1.0:
        return np.array([sample.logprob for sample in samples])
    return _logprobs(model, samples)


@torch.inference_mode()
def _logprobs(model: Frozen, samples: Sequence[Sample]) -> NDArray[np.float64]:
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].row.tokens))
    found = np.zeros(len(samples))
    for start in range(0, len(order), ROWS_AT_ONCE):
        places = order[start : start + ROWS_AT_ONCE]
        bucket = length_bucket([samples[place].row for place in places]).to(model.ranks.device)
        (values,) = model.forward((bucket,)).logprobs
        found[places] = values.sum(dim=1).double().cpu().numpy()
    return found


def _summary(
    name: str,
    samples: Sequence[Sample],
    by_prompt: NDArray[np.float64],
    base: NDArray[np.float64] | None,
    ratios: NDArray[np.float64],
) -> PolicyEvaluation:
    return PolicyEvaluation(
        name=name,
        reward=mean_with_interval(by_prompt),
        gain=None if base is None else mean_with_interval(by_prompt - base),
        kl=float(ratios.mean()),
        kl_k3=float((np.expm1(-ratios) + ratios).mean()),
        tokens=float(np.mean([sample.row.response.sum() for sample in samples])),
        ended_share=float(np.mean([sample.ended for sample in samples])),
        prompts=len(by_prompt),
        samples=len(samples),
    )


def _write_samples(
    path: Path, prompts: Sequence[str], samples: Sequence[Sample], rewards: NDArray[np.float64]
) -> None:
    rows = [
        {"prompt": prompts[sample.prompt], "response": sample.text, "reward": reward, "ended": sample.ended}
        for sample, reward in zip(samples, rewards.tolist(), strict=True)
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
