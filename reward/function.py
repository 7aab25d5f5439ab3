"""A reward as a function of texts: a Python function that a recipe names, or a published reward model."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.core.errors import ConfigError
from rlhf.data.messages import Asked, as_messages, last_text

RewardFunction = Callable[[Sequence[Asked], Sequence[str]], Sequence[float]]
"""``(prompts, responses) -> rewards``, one for each response, in their order."""
TOKENS_AT_ONCE = 8192


def load_reward(spec: str) -> RewardFunction:
    """The function behind ``module:function``, or the reward model in a folder.

    A function gets the text that the user said last; a model, the whole conversation.

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
    return lambda prompts, responses: function([last_text(prompt) for prompt in prompts], responses)


def _reward_of(folder: Path) -> RewardFunction:
    from reward.score import check_scorer, load_scorer, score_tokens  # they load Transformers: a function needs none

    check_scorer(folder)

    def reward(prompts: Sequence[Asked], responses: Sequence[str]) -> list[float]:
        model, chat = load_scorer(folder)  # now, and no sooner: what is judged may need the memory until then
        asked = map(as_messages, prompts)
        rendered = [chat.render_written(*each) for each in zip(asked, responses, strict=True)]
        rows = [tokens for tokens, _ in chat.tokenize(rendered)]
        return score_tokens(model, rows, batch_tokens=TOKENS_AT_ONCE)

    return reward
