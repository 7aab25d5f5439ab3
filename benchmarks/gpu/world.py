"""What every measurement is given: where models, rows and results lie, and how large everything is."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


class Skipped(Exception):
    """A measurement that cannot be made here, and why."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed."""

    model: Mapping[str, int]
    """Shape of the Llama that is measured."""
    small: Mapping[str, int]
    """Shape of the one that CPU and GPU are compared with."""
    tokens: tuple[int, ...]
    """Longest row of training steps, the most important first."""
    pairs: int
    """Pairs of a step."""
    steps: int
    """Steps of a measurement, those of the warm-up included."""
    warmup: int
    """Steps that are not timed."""
    micro_batch_tokens: int
    responses: int
    """Responses of a step of RLOO and PPO."""
    response_tokens: int
    end_rate: float
    """Chance of the end token at each place of a response."""
    square: int
    """Rows and columns of the matrices whose product is the measured limit."""
    plans: tuple[int, ...]
    """Pairs of the transport problems that are timed."""


_LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
_SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FULL = Sizes(
    model=_LLAMA_1B | {"num_key_value_heads": 8},
    small=_SMALL | {"num_key_value_heads": 2},
    tokens=(1024, 512, 2048),
    pairs=32,
    steps=6,
    warmup=2,
    micro_batch_tokens=32768,
    responses=64,
    response_tokens=256,
    end_rate=0.01,
    square=8192,
    plans=(64, 128, 256, 512, 1024),
)
TOY = Sizes(
    model=_TINY | {"num_key_value_heads": 2},
    small=_TINY | {"num_key_value_heads": 2},
    tokens=(128,),
    pairs=4,
    steps=2,
    warmup=1,
    micro_batch_tokens=512,
    responses=4,
    response_tokens=6,
    end_rate=0.0,
    square=128,
    plans=(64, 128),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """One run of the whole."""

    work: Path
    """Scratch folder: models, caches, logs."""
    tokenizer: Path
    """Folder with a tokenizer and its chat template."""
    rows: Mapping[str, str]
    """Files of preference pairs, by the name that the table gives them."""
    prompts: Path
    """Lines with a prompt each."""
    trl_ppo: str
    """Folder of a TRL that still has PPOTrainer, to be found before all others; empty for none."""
    toy: bool

    @property
    def sizes(self) -> Sizes:
        return TOY if self.toy else FULL

    @property
    def policy(self) -> Path:
        return self.work / "models" / "policy"

    @property
    def reward(self) -> Path:
        return self.work / "models" / "reward"

    @property
    def small(self) -> Path:
        return self.work / "models" / "small"

    def settings_of(self, name: str, tokens: int) -> dict[str, Any]:
        """What all sides are told of the rows: ours as settings of the section ``data``."""
        pairs = self.sizes.pairs * self.sizes.steps
        return {
            "train": self.rows[name],
            "eval_share": 0.0,
            "max_tokens": tokens,
            "over_length": "drop",
            "quarantine_max_share": 0.99,
            "max_train_pairs": pairs,
            "cache_dir": self.work / "cache",
        }

    def write(self) -> Path:
        path = self.work / "world.json"
        values = dataclasses.asdict(self)
        path.write_text(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values.items()}))
        return path

    @staticmethod
    def read(path: Path) -> "World":
        values = json.loads(path.read_text())
        paths = {name: Path(values[name]) for name in ("work", "tokenizer", "prompts")}
        return World(**(values | paths))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if has_gpu() else "cpu"


def save_nothing() -> None:
    """No checkpoint at the end of the runs of this process: gigabytes that nobody reads."""
    from rlhf.train import loop

    loop.save = lambda *_: None
