"""What ``freeze_layers`` leaves trainable."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.models.trainable import freeze_lower_layers

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 30}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
OPT = {"ffn_dim": 16, "word_embed_proj_dim": 8}
DECODERS = {"llama": {}, "gpt2": GPT2, "opt": OPT, "bloom": {"n_layer": 2, "n_head": 2}, "gpt_neox": {}}
ENCODERS = {
    "bert": {}, "roberta": {}, "modernbert": {"pad_token_id": 0}, "electra": {"embedding_size": 8},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16},
}  # fmt: skip


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_nothing_below_the_frozen_layers_is_trained(family):
    loader = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    settings = AutoConfig.for_model(family, **SIZES | (DECODERS | ENCODERS)[family])
    model = loader.from_config(settings)
    freeze_lower_layers(model, 1)
    trained = [name for name, parameter in model.base_model.named_parameters() if parameter.requires_grad]
    assert trained
    assert not [name for name in trained if any(part in name for part in ("emb", "wpe", "wte", ".0."))]
    assert any(".1." in name for name in trained)
    above = ("norm", "ln_f", "pooler", "project_out", ".1.", "LayerNorm")
    assert all(any(part in name for part in above) for name in trained), trained
