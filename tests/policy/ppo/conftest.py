"""PPO in this process: tiny model, plain engine, one rank, a rule or a tiny reward model as reward."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policy.building import build_policy
from policy.generation.training import TrainingSampler
from policy.options import PolicyConfig
from policy.ppo.config import (
    AdvantageConfig,
    CriticConfig,
    KlConfig,
    PpoConfig,
    RolloutConfig,
    SurrogateConfig,
    WatchConfig,
)
from policy.ppo.critic import build_critic, critic_start
from policy.ppo.reference import ReferenceModel
from policy.ppo.replay import Replay
from policy.ppo.reward_options import RewardSourceConfig
from policy.ppo.rollouts import Rollouts
from policy.ppo.scoring import Scored
from policy.ppo.task import Engines, PpoTask, Roles
from reward.building import build_reward_model
from reward.config import RewardConfig, RewardModelConfig
from reward.saving import save_reward_model
from reward.stage import run as run_reward
from rlhf.data.options import DataConfig, PromptDataConfig
from rlhf.data.portable import portable_tokenizer
from rlhf.data.prompts import load_prompts
from rlhf.data.templates import chat_format
from rlhf.engine.frozen import ReplicatedModel
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.manifest import MANIFEST_NAME, Manifest, RewardStatistics, write_manifest
from rlhf.models.roles import role_named
from rlhf.models.tokenizer import load_tokenizer, pad_policy, required_embedding_rows
from rlhf.train.options import TrainConfig
from rlhf.train.progress import Progress

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
HERE = Path(__file__).resolve().parent
SHORT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
"""Next to no tokens around the messages: tests are quick."""

STEADY = {"schedule": "constant", "warmup_share": 0.0}


@pytest.fixture(scope="session")
def short_template() -> str:
    return SHORT_TEMPLATE


@pytest.fixture(scope="session")
def alone() -> Ranks:
    return ALONE


@pytest.fixture(scope="session", autouse=True)
def rules_on_the_path() -> Iterator[None]:
    """Recipes name reward functions as ``rules:function``."""
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> Path:
    """40 different prompts of unequal lengths."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = ["sun", "rain", "day", "tax", "form", "dentist", "write", "one", "sentence", "about", "happy", "sad"]
    rows = [{"prompt": " ".join(words[: 1 + number % 7]) + f" {number}"} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def prompt_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prompt_cache")


@pytest.fixture
def tiny_config(tmp_path, tiny_model, prompts_file, prompt_cache) -> PpoConfig:
    """16 responses a step in two minibatches; responses end at an "e", so that their lengths differ."""
    return PpoConfig(
        output=tmp_path / "ppo",
        policy=PolicyConfig(path=str(tiny_model)),
        reward=RewardSourceConfig(function="rules:share_of_abc"),
        data=PromptDataConfig(train=str(prompts_file), eval_share=0.2, template=SHORT_TEMPLATE, cache_dir=prompt_cache),
        rollout=RolloutConfig(prompts=8, samples=2, max_new_tokens=10, stop=("e",)),
        advantage=AdvantageConfig(estimator="gae"),
        kl=KlConfig(coefficient=0.1),
        critic=CriticConfig(optim=OptimizerConfig(learning_rate=1e-2, **STEADY)),
        loss=SurrogateConfig(epochs=1),
        watch=WatchConfig(action="none"),
        optim=OptimizerConfig(learning_rate=1e-2, **STEADY),
        train=TrainConfig(
            global_batch_size=8,
            micro_batch_tokens=400,
            epochs=10,
            evaluate_every=0,
            checkpoint_every=0,
            publish="none",
            tensorboard=False,
            best_metric="eval/selection",
        ),
        engine=EngineConfig(kind="local"),
    )


class TextScorer:
    """A scorer whose scores are what ``judge`` says of each response's text."""

    identity = "a rule of the test"

    def __init__(self, judge: Callable[[str], float]) -> None:
        self._judge = judge

    def score(self, rollouts: Rollouts) -> Scored:
        values = torch.tensor([float(self._judge(text)) for text in rollouts.texts])
        return Scored(values, values)


@pytest.fixture(scope="session")
def text_scorer() -> type[TextScorer]:
    return TextScorer


def share_of_vowels(text: str) -> float:
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


@dataclass
class Workshop:
    """A task with its parts, and a way to take steps."""

    config: PpoConfig
    task: PpoTask
    policy: LocalEngine
    critic: LocalEngine | None
    roles: Roles
    data: SimpleNamespace
    chat: object

    def step(self, number: int = 0):
        """The outcome of step ``number``."""
        return self.task.step(number, Progress(ALONE, 100, 0))

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the policy's weights."""
        return {name: value.detach().clone() for name, value in self.policy.module.state_dict().items()}

    def critic_weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.critic.module.state_dict().items()}

    def rollouts(self, step: int = 0) -> Rollouts:
        """The responses of ``step`` to its prompts, as the task draws them."""
        prompts = [self.data.train.prompt(place) for place in self.task._places(step)]
        return self.task._roll_out(prompts, self.config.rollout.samples, ("train", step))


@pytest.fixture
def make_task(tiny_config):
    """``make_task(noise=0.0, scorer=..., second=None, conversations=None, change=None, **sections)`` gives a Workshop.

    ``noise`` moves the policy away from its reference, ``change`` is called with the policy before anything is asked,
    ``total_steps`` are those of the schedules.
    """

    def make(
        *, noise: float = 0.0, scorer=None, second=None, conversations=None, change=None, total_steps=1000, **sections
    ) -> Workshop:
        config = replace(tiny_config, **sections)
        config.output.mkdir(parents=True, exist_ok=True)
        chat = chat_format(load_tokenizer(config.policy.path), config.data.template)
        data = load_prompts(config.data, chat)
        vocabulary = required_embedding_rows(chat.tokenizer)

        def new_policy(model=config.policy):
            return build_policy(model, dtype=torch.float32, vocabulary=vocabulary, seed=0)

        model = new_policy()
        move(model, noise)
        if change is not None:
            change(model)
        policy = LocalEngine(model, ranks=ALONE, optimizer=config.optim, total_steps=total_steps)
        critic = None
        role = role_named(config.models, "critic")
        if role is not None:
            module = build_critic(
                critic_start(role.backbone, standardized=config.reward.standardize),
                dtype=torch.float32,
                pad_token_id=chat.tokenizer.pad_token_id,
                vocabulary=vocabulary,
                seed=0,
            )
            critic = LocalEngine(module, ranks=ALONE, optimizer=config.critic.optim, total_steps=total_steps)
        if config.policy.lora is not None:
            reference = ReferenceModel(policy, adapters_off=True)
        else:
            reference = ReferenceModel(ReplicatedModel(new_policy(), ALONE))
        roles = Roles(
            engines=Engines(policy, critic),
            sampler=TrainingSampler(policy, chat, config.rollout, new_policy, config.rollout.gather),
            reference=reference,
            scorer=scorer or TextScorer(share_of_vowels),
            second=second,
        )
        replay = Replay(config.output / "replay", ALONE, "a test")
        task = PpoTask(config, roles, data, chat, replay, 1000, conversations)
        return Workshop(config, task, policy, critic, roles, data, chat)

    return make


def move(model: torch.nn.Module, noise: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory, tiny_model, tiny_pairs) -> Path:
    """``final/`` of a short run of the reward stage, with the template of the tests."""
    folder = tmp_path_factory.mktemp("reward")
    config = RewardConfig(
        output=folder / "run",
        model=RewardModelConfig(path=str(tiny_model), head_init_scale=10),
        data=DataConfig(
            train=str(tiny_pairs), eval_share=0.2, template=SHORT_TEMPLATE, cache_dir=folder / "cache"
        ),
        optim=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(
            global_batch_size=12, micro_batch_tokens=2000, max_steps=6, evaluate_every=0, checkpoint_every=0,
            tensorboard=False,
        ),
        engine=EngineConfig(kind="local"),
    )  # fmt: skip
    run_reward(config, ALONE)
    return folder / "run" / "final"


@pytest.fixture(scope="session")
def other_reward_folder(tmp_path_factory, reward_folder) -> Path:
    """Another reward model of the same form: the first one's weights moved a little, other statistics."""
    folder = tmp_path_factory.mktemp("other_reward") / "final"
    shutil.copytree(reward_folder, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    moved = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["rewards"] |= {"mean": 0.3, "standard_deviation": 1.7}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


FOREIGN_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="session")
def foreign_model(tmp_path_factory) -> Path:
    """A language model of another family: fewer tokens, another tokenizer, another template."""
    folder = tmp_path_factory.mktemp("foreign") / "base"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["other words than theirs, in another order"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", chat_template=FOREIGN_TEMPLATE
    )
    torch.manual_seed(3)
    settings = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def foreign_reward_folder(foreign_model) -> Path:
    """A published reward model of that family."""
    folder, fast = foreign_model.parent, load_tokenizer(foreign_model)
    model = build_reward_model(
        RewardModelConfig(path=str(foreign_model), head_init_scale=20),
        dtype=torch.float32, pad_token_id=0, vocabulary=len(fast), seed=0,
    )  # fmt: skip
    chat = chat_format(fast, None)
    save_reward_model(model, folder / "final")
    portable_tokenizer(chat).save_pretrained(folder / "final")
    write_manifest(
        folder / "final",
        Manifest(
            stage="reward",
            base_model="foreign",
            template_digest=chat.digest,
            tokenizer_digest=chat.tokenizer_digest,
            pad_policy=pad_policy(fast),
            vocabulary_size=len(fast),
            head_kind="linear",
            head_dtype="float32",
            rewards=RewardStatistics(mean=0.1, standard_deviation=0.4, count=20),
            margin_statistics={},
            loss={},
            training_data="none",
        ),
    )
    return folder / "final"
