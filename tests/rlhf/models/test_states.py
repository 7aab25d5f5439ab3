"""States of several blocks with one call of the embedding."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.models.hidden_states import last_states

SHAPES = ((3, 7), (2, 12), (1, 4))
BLOCKS = [torch.randint(5, 300, shape, generator=torch.Generator().manual_seed(0)) for shape in SHAPES]


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def backbone(model):
    return model.base_model


def gradients(backbone, states):
    backbone.zero_grad()
    sum(block.square().sum() for block in states).backward()
    return {name: parameter.grad.clone() for name, parameter in backbone.named_parameters()}


def test_blocks_together_give_the_states_and_gradients_of_blocks_alone(model, backbone):
    alone = [backbone(input_ids=tokens).last_hidden_state for tokens in BLOCKS]
    together = list(last_states(model, BLOCKS))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(backbone, together), gradients(backbone, alone), rtol=1e-4, atol=1e-4)


def test_training_asks_the_embedding_once(model, backbone):
    calls = []
    backbone.get_input_embeddings().register_forward_hook(lambda *given: calls.append(1))
    list(last_states(model, BLOCKS))
    assert len(calls) == 1
    with torch.no_grad():
        list(last_states(model, BLOCKS))
    assert len(calls) == 1 + len(BLOCKS)


def test_a_model_that_needs_its_tokens_in_every_layer_gets_them(model, backbone):
    backbone.config.hidden_size_per_layer_input = 8
    seen = []
    backbone.register_forward_pre_hook(lambda module, args, kwargs: seen.append({*kwargs}), with_kwargs=True)
    list(last_states(model, BLOCKS))
    assert all("input_ids" in names for names in seen) and len(seen) == len(BLOCKS)
