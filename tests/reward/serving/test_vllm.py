"""vLLM as the server of a reward model: it says what plain Transformers say."""

import os
import signal
import time

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.cli import main
from reward.serving.check import CLOCK
from reward.serving.client import RewardServers
from rlhf.data.options import TemplateChoice
from tests.ports import free_port
from tests.published import SPOKEN, WITH_TOOLS, published, with_begin_token

REFUSES = "{% if 'unspeakable' in messages[0]['content'] %}{{ raise_exception('we do not say that') }}{% endif %}"

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.dist]


@pytest.fixture
def python() -> str:
    """A Python that has vLLM."""
    found = os.environ.get("MARGIN_RLHF_VLLM_PYTHON")
    if not found:
        pytest.skip("MARGIN_RLHF_VLLM_PYTHON names no Python with vLLM: make test-vllm")
    return found


@pytest.fixture
def model(request, tmp_path, tiny_tokenizer):
    """A reward model with heads as wide as vLLM takes them on a CPU."""
    source = tmp_path / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    if request.param == "bos":
        source = with_begin_token(source, tmp_path / "begin")
        return published(source, tmp_path / "final", TemplateChoice(text=REFUSES + SPOKEN))
    return published(source, tmp_path / "final", TemplateChoice(text=WITH_TOOLS) if request.param == "tools" else None)


@pytest.mark.parametrize("model", ["chatml", "bos", "tools"], indirect=True)
def test_vllm_gives_the_scores_of_plain_transformers(model, python, start_ranks, capsys):
    port = free_port()
    arguments = ["-m", "launch.cli", "serve", "reward", str(model), "--port", str(port), "--engine", "vllm"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "MARGIN_RLHF_VLLM_PYTHON": python}
    (process,) = start_ranks(arguments, ranks=1, cold=True, **environment)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                break
        except httpx.HTTPError:
            time.sleep(0.5)
        assert process.poll() is None, process.communicate()[0]
    try:
        code = main(["check", "served", url, "--model", str(model)])
        shown = capsys.readouterr().out
        assert code == 0 and "/score, pairs" in shown and "/classify, messages" in shown, shown
        prompts = [[{"role": "user", "content": text}] for text in ("say it", "no more", "the unspeakable")]
        refused = RewardServers([url]).refusals(prompts)
        assert [*refused] == ([2] if model.parent.joinpath("begin").exists() else []), refused
        assert all("we do not say that" in why for why in refused.values()), refused
        offered = RewardServers([url]).refusals([[{"role": "user", "content": "say it", "tools": [CLOCK]}]])
        told = "the template does not show the tools of the conversation (clock)"
        assert [*offered.values()] == ([] if "{{ tools" in (model / "chat_template.jinja").read_text() else [told])
    finally:
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "served by vLLM at" in output, output
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)
