"""One rank of steps on packed and on ordinary rows: python pack.py MODEL PAIRS ROWS FOLDER.

Writes, on the main rank, loss and gradients of a step of each case: of ordinary rows in plain torch, and of packed
rows under each ZeRO stage, in two ways of cutting the step into micro-batches.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad  # noqa: TID251

from policy.building import build_policy
from policy.generation.api import Response
from policy.options import PolicyConfig
from policy.ppo.config import PpoConfig, SurrogateConfig
from policy.ppo.critic import CriticStart, build_critic
from policy.ppo.experience import Experience, Measured
from policy.ppo.reward_options import RewardSourceConfig
from policy.ppo.rollouts import Rollouts
from policy.ppo.scoring import Scored
from policy.ppo.update import Updater
from policy.preference.config import LossConfig, PreferenceConfig
from policy.preference.reference import LiveReference
from policy.preference.task import PreferenceTask
from reward.building import build_reward_model
from reward.config import LossConfig as RewardLossConfig
from reward.config import MarginConfig, RewardConfig, RewardModelConfig
from reward.task import RewardTask
from rlhf.data.examples import load_examples
from rlhf.data.options import DataConfig, ExampleDataConfig, PromptDataConfig
from rlhf.data.preferences import load_preferences
from rlhf.data.prompts import Prompt
from rlhf.engine.build import build_engine
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import start_ranks, stop_ranks
from rlhf.models.options import BackboneConfig, LoraOptions
from rlhf.models.tokenizer import load_tokenizer
from rlhf.train.chat import load_chat
from rlhf.train.options import TrainConfig
from rlhf.train.packing import allow_packing

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, max_grad_norm=0.0)
NO_MARGIN = MarginConfig(kind="none")
LORA = LoraOptions(rank=4, alpha=8.0)
MODEL, PAIRS, ROWS, FOLDER = (Path(each) for each in sys.argv[1:])
STAGES = ["zero0", "zero1", "zero2", "zero3"]
ORDINARY = {"packing": "off", "micro_batch_tokens": 100_000}
WAYS = {"whole": {"packing": "auto", "micro_batch_tokens": 100_000}, "in parts": {"micro_batch_tokens": 300}}


@dataclass
class Case:
    """The engines of one run, and what they are asked for."""

    kind: str
    train: TrainConfig
    ranks: Any

    def __post_init__(self):
        self.gradients = {}

    def engine(self, module, name="model"):
        """An engine whose gradients are noted before its update; weights are moved, so that no adapter is zero."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        local = self.kind == "local"
        config = EngineConfig(kind="local" if local else "deepspeed", deepspeed="zero0" if local else self.kind,
                              precision="float32")  # fmt: skip
        built = build_engine(
            module, ranks=self.ranks, config=config, optimizer=OPTIMIZER, total_steps=9, hidden_size=32
        )
        assert self.train.packing == "off" or allow_packing(built)
        step = built.step

        def noted():
            for label, parameter in module.named_parameters():
                if parameter.requires_grad:
                    gradient = parameter.grad if local else safe_get_full_grad(parameter)
                    gradient = torch.zeros_like(parameter) if gradient is None else gradient
                    self.gradients[f"{name} {label}"] = (self.ranks.sum(gradient) if local else gradient).clone()
            return step()

        built.step = noted
        return built

    def step(self, engine, task) -> float:
        batches = task.micro_batches(0)
        assert all((batch.buckets.packing is not None) == (self.train.packing == "auto") for batch in batches)
        assert (len(batches) > 2) == (self.train.micro_batch_tokens == 300)
        for place, batch in enumerate(batches):
            engine.backward(task.loss(batch), last=place == len(batches) - 1)
        engine.step()
        return task.step_metrics()["loss"]


def reward(case: Case, *, loss="bradley_terry", margin=NO_MARGIN, **model) -> float:
    data = DataConfig(train=str(PAIRS), eval_share=0.2, cache_dir=FOLDER / "cache")
    config = RewardConfig(
        output=FOLDER / "reward", model=RewardModelConfig(path=str(MODEL), head_init_scale=30.0, **model), data=data,
        margin=margin, loss=RewardLossConfig(kind=loss), train=case.train,
    )  # fmt: skip
    tokenizer = load_tokenizer(MODEL)
    module = build_reward_model(
        config.model, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id, vocabulary=len(tokenizer), seed=0,
        with_lm_head=loss.startswith("grm"),
    )  # fmt: skip
    loaded = load_preferences(data, load_chat(str(MODEL), data.template))
    engine = case.engine(module)
    return case.step(engine, RewardTask(engine, config, loaded.train, loaded.evals, 9))


def policy(**model):
    config = PolicyConfig(path=str(MODEL), **model)
    return build_policy(config, dtype=torch.float32, vocabulary=len(load_tokenizer(MODEL)), seed=0)


def preference(case: Case, *, loss, **model) -> float:
    objective = LossConfig(kind=loss, scope="global_batch")
    chat = load_chat(str(MODEL))
    sections = {"data": DataConfig(train=str(PAIRS), eval_share=0.2, cache_dir=FOLDER / "cache")}
    if objective.objective.unpaired:
        unpaired = ExampleDataConfig(train=str(ROWS), eval_share=0.2, cache_dir=FOLDER / "cache")
        sections, loaded = {"data": None, "unpaired": unpaired}, load_examples(unpaired, chat, kind="unpaired")
    else:
        loaded = load_preferences(sections["data"], chat)
    config = PreferenceConfig(
        output=FOLDER / "preference", model=PolicyConfig(path=str(MODEL), **model), loss=objective, train=case.train,
        **sections,
    )  # fmt: skip
    reference = LiveReference(ReplicatedModel(policy(), case.ranks))
    assert case.train.packing == "off" or allow_packing(reference.model)
    engine = case.engine(policy(**model))
    return case.step(engine, PreferenceTask(engine, config, loaded.train, loaded.evals, (reference, reference), 9))


def ppo(case: Case, **model) -> float:
    """An update of policy and critic, from made-up rollouts: three answers to each of four prompts."""
    draw = np.random.default_rng(0)
    vocabulary = len(load_tokenizer(MODEL))
    prompts = [
        Prompt(f"prompts.jsonl:{n}", draw.integers(3, vocabulary, 6 + 5 * n), messages=())
        for n in range(4)
        for _ in "abc"
    ]
    lengths = draw.integers(2, 16, len(prompts))
    none = np.zeros(0, np.float32)
    responses = [Response(draw.integers(3, vocabulary, size), none, none, ended=True) for size in lengths]
    rollouts = Rollouts(prompts, responses, [""] * len(prompts), torch.arange(4).repeat_interleave(3))
    noise = torch.Generator().manual_seed(1)
    column = [torch.randn(rollouts.mask.shape, generator=noise) * rollouts.mask for _ in range(4)]
    measured = Measured(column[0] - 5, column[0].abs(), column[1] - 5, column[2], torch.zeros(1))
    scores = torch.randn(len(prompts), generator=noise)
    scored = Scored(scores, scores)
    experience = Experience(rollouts, scored, measured, 0.0, scores, rollouts.mask, column[3], column[2] + column[3])
    config = PpoConfig(
        output=FOLDER / "ppo", policy=PolicyConfig(path=str(MODEL), **model), data=PromptDataConfig(train=str(PAIRS)),
        reward=RewardSourceConfig(function="none:at_all"), loss=SurrogateConfig(epochs=1, entropy=0.01),
        train=replace(case.train, global_batch_size=len(prompts)),
    )  # fmt: skip
    start = CriticStart(backbone=BackboneConfig(path=str(MODEL), **model), is_reward_model=False, statistics=None)
    pad = load_tokenizer(MODEL).pad_token_id
    critic = build_critic(start, dtype=torch.float32, pad_token_id=pad, vocabulary=vocabulary, seed=0)
    engines = case.engine(policy(**model), "policy"), case.engine(critic, "critic")
    found = Updater(*engines, config).run(0, experience, 0.1).metrics()
    return found["policy/loss"] + found["critic/loss"]


CASES = {
    "plan and checkpointing": lambda case: reward(
        case, margin=MarginConfig(kind="ot", parameters={"scope": "global_batch"}), gradient_checkpointing=True
    ),
    "GRM and LoRA": lambda case: reward(case, loss="grm_sft", lora=LORA),
    "dpo and checkpointing": lambda case: preference(case, loss="sigmoid", gradient_checkpointing=True),
    "plan of policies and LoRA": lambda case: preference(case, loss="ot_margin", lora=LORA),
    "kto, LoRA and checkpointing": lambda case: preference(case, loss="kto", lora=LORA, gradient_checkpointing=True),
    "ppo": ppo,
    "ppo, LoRA and checkpointing": lambda case: ppo(case, lora=LORA, gradient_checkpointing=True),
}


def main() -> None:
    ranks = start_ranks()
    found = {}
    for name, run in CASES.items():
        for kind, way in [("local", "ordinary"), *((stage, way) for stage in STAGES for way in WAYS)]:
            train = TrainConfig(global_batch_size=14, **(ORDINARY if way == "ordinary" else WAYS[way]))
            case = Case(kind, train, ranks)
            loss = run(case)
            found[name, kind, way] = loss, case.gradients
    if ranks.is_main:
        torch.save(found, FOLDER / "found.pt")
    ranks.barrier()
    stop_ranks()


main()
