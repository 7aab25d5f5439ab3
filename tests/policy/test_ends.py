"""Where responses end: the same in rollouts, evaluation and the published model."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from policy.evaluation.compare import evaluate_policies
from policy.evaluation.options import SamplingSettings
from policy.ppo.__main__ import main as ppo
from policy.reload_check import check_ends
from policy.sft.__main__ import main as sft
from rlhf.models.tokenizer import load_tokenizer

WORDS = ("the", "sun", "rain", "tax", "day", "form", "good", "dentist")
SHORT = ("engine.kind=local", "train.max_steps=1", "train.global_batch_size=4", "train.tensorboard=false")


@pytest.fixture
def model_that_says(tiny_model, tmp_path):
    """A model whose first token is always the one given, with a generation config that ends at the tokens given."""

    def make(token, ends, **tokenizer_changes):
        folder = tmp_path / "says"
        shutil.copytree(tiny_model, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name, value in tokenizer_changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder)
        direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.zero_()
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
            model.model.embed_tokens.weight.copy_(direction.expand_as(model.model.embed_tokens.weight))
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = direction
        model.save_pretrained(folder)
        ids = tokenizer.convert_tokens_to_ids(list(ends))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return folder

    return make


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"write one sentence about {word}"} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def roll_out(policy, prompts, output, *more):
    code = ppo(
        [f"output={output}", f"policy.path={policy}", "reward.function=launch.quickstart.gold:gold_reward",
         "advantage.estimator=rloo", "rollout.prompts=4", "rollout.samples=2", "rollout.max_new_tokens=6",
         f"data.train={prompts}", "train.publish=none", *SHORT, *more]
    )  # fmt: skip
    return code, [json.loads(line) for line in output.joinpath("rollouts.jsonl").read_text().splitlines()]


def test_rollouts_end_at_the_stop_tokens_of_the_generation_config(model_that_says, prompts, tmp_path):
    policy = model_that_says("<|endoftext|>", ["<|endoftext|>", "<|im_end|>"])
    code, rows = roll_out(policy, prompts, tmp_path / "run")
    assert code == 0
    assert {(row["tokens"], row["ended"]) for row in rows} == {(1, True)}


def test_rollouts_do_not_end_at_a_token_that_nobody_names(model_that_says, prompts, tmp_path):
    policy = model_that_says("<|endoftext|>", ["<|im_end|>"])
    _, rows = roll_out(policy, prompts, tmp_path / "run")
    assert {(row["tokens"], row["ended"]) for row in rows} == {(6, False)}


def test_rollouts_end_at_the_tokens_of_the_recipe(model_that_says, prompts, tmp_path):
    policy = model_that_says("a", ["<|im_end|>"])
    token = load_tokenizer(policy).convert_tokens_to_ids("a")
    _, rows = roll_out(policy, prompts, tmp_path / "run", f"rollout.stop_token_ids=[{token}]")
    assert {(row["tokens"], row["ended"]) for row in rows} == {(1, True)}


def test_a_stop_token_that_the_tokenizer_does_not_have_is_refused(tiny_model, prompts, tmp_path, capsys):
    code = ppo(
        [f"output={tmp_path}/run", f"policy.path={tiny_model}", "reward.function=launch.quickstart.gold:gold_reward",
         "rollout.stop_token_ids=[2, 99999]", f"data.train={prompts}", *SHORT]
    )  # fmt: skip
    assert code != 0
    assert "rollout.stop_token_ids = [99999]: the tokenizer has tokens 0 to" in capsys.readouterr().err


def test_evaluation_ends_where_each_policy_says(model_that_says, tiny_model, tmp_path):
    policy = model_that_says("<|endoftext|>", ["<|endoftext|>"])
    found = evaluate_policies(
        {"policy": policy},
        tiny_model,
        ["the sun", "a tax form"],
        lambda answers: [0.0] * len(answers),
        template=None,
        settings=SamplingSettings(samples=2, max_new_tokens=5),
        output=tmp_path / "evaluation",
    )
    policy_found = next(each for each in found if each.name == "policy")
    assert (policy_found.ended_share, policy_found.tokens) == (1.0, 1.0)


class Says(LogitsProcessor):
    """Makes the first new token the one given."""

    def __init__(self, length, token):
        self._length, self._token = length, token

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self._length:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self._token] = 0.0
        return scores


@pytest.mark.slow
def test_a_base_model_trained_with_chatml_is_published_so_that_plain_generate_stops(
    tiny_model, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    rows = [
        {"messages": [{"role": "user", "content": f"the {word}"}, {"role": "assistant", "content": "is good"}]}
        for word in WORDS
    ]
    conversations = tmp_path / "conversations.jsonl"
    conversations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = sft(
        [f"output={tmp_path}/run", f"model.path={base}", f"data.train={conversations}", "data.template=chatml", *SHORT]
    )
    assert code == 0
    final = tmp_path / "run" / "final"
    model, published = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert published.eos_token == "<|im_end|>"
    prompt = published.apply_chat_template(
        [{"role": "user", "content": "the sun"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    for token in ("<|im_end|>", "<|endoftext|>"):
        processor = LogitsProcessorList([Says(prompt.shape[1], published.convert_tokens_to_ids(token))])
        written = model.generate(prompt, max_new_tokens=4, do_sample=False, logits_processor=processor)
        assert written.shape[1] == prompt.shape[1] + 1, token


def test_stop_strings_of_a_generation_config_are_no_obstacle_to_publishing(tiny_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    model.generation_config.update(stop_strings=["Human:"], eos_token_id=[2, 0], pad_token_id=0)
    check_ends(model, tokenizer, [5, 6], [2, 0])
    model.generation_config.eos_token_id = [2]
    with pytest.raises(SystemExit, match=r"does not stop behind .* \(token 0\)"):
        check_ends(model, tokenizer, [5, 6], [2, 0])
