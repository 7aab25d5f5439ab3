import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf.engine.optimizers import parameter_groups

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        (LlamaForSequenceClassification, LlamaConfig, "score."),
        (BertForSequenceClassification, BertConfig, "classifier."),
        (RobertaForSequenceClassification, RobertaConfig, "classifier."),
    ],
)
def test_matrices_decay_and_norms_biases_and_the_head_do_not_whatever_its_name(kind, config, head):
    with torch.device("meta"):
        model = kind(config(**SIZES, num_labels=1))
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    decays = {id(parameter) for parameter in decayed["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decays) == (parameter.dim() > 1 and not name.startswith(head)), name
