"""A reward as a function of texts: a Python function that a recipe names, or a published reward model."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.core.errors import ConfigError

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""``(prompts, responses) -> rewards``, one for each response, in their order."""
TOKENS_AT_ONCE = 8192


def load_reward(spec: str) -> RewardFunction:
    """The function behind ``module:function``, or the reward model in a folder.

    Raises:
        ConfigError: if there is no such function.
        ModelError: if the folder holds no reward model.
    """
    if Path(spec).is_dir():
        return _reward_of(Path(spec))
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code
        raise ConfigError(
            f"reward {spec}: expected module:function, such as launch.quickstart.gold:gold_reward, or the folder of a "
            f"reward model ({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise ConfigError(f"reward {spec}: expected a function, found a {type(function).__name__}")
    return function


def _reward_of(folder: Path) -> RewardFunction:
    from reward.score import check_scorer, load_scorer, score_tokens  # they load Transformers: a function needs none

    check_scorer(folder)

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        model, chat = load_scorer(folder)  # now, and no sooner: what is judged may need the memory until then
        rows = [
            chat.encode([{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}])[0]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return score_tokens(model, rows, batch_tokens=TOKENS_AT_ONCE)

    return reward
