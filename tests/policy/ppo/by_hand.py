"""What tests of a PPO step compute by hand, with plain Transformers and one row at a time."""

import copy
from dataclasses import replace

import numpy as np
import torch

from policy.ppo.experience import make_experience
from rlhf.engine.options import OptimizerConfig

ALMOST_SGD = OptimizerConfig(
    learning_rate=1.0, schedule="constant", warmup_share=0.0, adam_epsilon=1.0, max_grad_norm=0.0
)
"""The first step of Adam is then -g / (|g| + 1): a gradient can be read off the weights."""

ONE_MINIBATCH = {"global_batch_size": 16}


def untimed(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def train_of(config, **changes):
    return replace(config.train, **changes)


def assert_moved_by(after, before, gradients):
    """Check that ``after`` is ``before`` one step of ALMOST_SGD later."""
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        expected = before[name] - gradient / (gradient.abs() + 1)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=2e-6, msg=name)


def logits_by_hand(hf, rollouts, row, temperature):
    """``(T, V)`` log-probabilities at the places of a response, from a plain Transformers model and one row alone."""
    prompt, response = rollouts.prompts[row].tokens, rollouts.responses[row].tokens
    ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
    return (hf(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def chosen_by_hand(hf, rollouts, row, temperature=1.0):
    """``(T,)`` of the response's tokens."""
    tokens = torch.from_numpy(rollouts.responses[row].tokens)
    return logits_by_hand(hf, rollouts, row, temperature).gather(1, tokens[:, None]).squeeze(1)


def plain_copy(engine):
    return copy.deepcopy(engine.module).plain()


def experience_of(shop, step=0):
    rollouts = shop.rollouts(step)
    scored, measured = shop.roles.scorer.score(rollouts), shop.task._measure(rollouts)
    return make_experience(rollouts, scored, measured, shop.config, shop.config.kl.coefficient)
