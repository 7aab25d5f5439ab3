"""Policies compared by a reward on fresh samples."""

import copy
import gc
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from launch.cli import build_parser
from policy.evaluation import compare
from policy.evaluation.compare import evaluate_policies, open_policy, read_prompts
from policy.evaluation.options import SamplingSettings
from policy.evaluation.results import markdown, read_evaluations
from policy.evaluation.sampling import sample_responses
from reward.function import Answers, PythonReward, load_reward
from rlhf.core.errors import ConfigError, DataError, ModelError
from rlhf.train.chat import load_chat
from rlhf.train.done import read_completion

PROMPTS = [f"write about {word}" for word in ("sun", "rain", "tax", "a good day")]
SETTINGS = SamplingSettings(samples=3, max_new_tokens=6, batch_rows=5)


def length_of(prompts, responses):
    return [float(len(response)) for response in responses]


@pytest.fixture
def moved_model(tiny_model, tiny_tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "moved")
    tiny_tokenizer.save_pretrained(tmp_path / "moved")
    return tmp_path / "moved"


def evaluate(reference, policies, output, reward=length_of, precision="auto", **changes):
    return evaluate_policies(
        policies,
        reference,
        PROMPTS,
        PythonReward("a function of the test", reward),
        template=None,
        settings=replace(SETTINGS, **changes),
        output=output,
        precision=precision,
    )


def test_rewards_intervals_and_kl_can_be_made_again_from_the_samples(tiny_model, moved_model, tmp_path):
    base, moved = evaluate(tiny_model, {"moved": moved_model}, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples_moved.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert [row["reward"] for row in rows] == length_of(None, [row["response"] for row in rows])
    means = [sum(row["reward"] for row in rows[3 * p : 3 * p + 3]) / 3 for p in range(4)]
    low, high = stats.t.interval(0.95, 3, loc=sum(means) / 4, scale=stats.sem(means))
    assert moved.reward.value == pytest.approx(sum(means) / 4)
    assert (moved.reward.low, moved.reward.high) == pytest.approx((low, high))
    assert moved.gain.value == pytest.approx(moved.reward.value - base.reward.value)
    assert base.gain is None and base.kl == 0


def test_kl_of_samples_is_positive_for_another_model_and_zero_for_a_copy(tiny_model, moved_model, tmp_path):
    _, moved, copy = evaluate(tiny_model, {"moved": moved_model, "copy": tiny_model}, tmp_path / "out", samples=40)
    assert moved.kl > 0.01 and moved.kl_k3 > 0.01
    assert math.isclose(moved.kl, moved.kl_k3, rel_tol=0.5)
    assert copy.kl == copy.kl_k3 == 0


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8}, {"temperature": 0.7}], ids=str)
def test_the_kl_is_that_of_plain_log_probabilities(tiny_model, moved_model, tmp_path, monkeypatch, changes):
    drawn = evaluate(tiny_model, {"moved": moved_model}, tmp_path / "drawn", **changes)[1]
    monkeypatch.setattr(compare, "_own_logprobs", lambda model, samples, _: compare._logprobs(model, samples))
    asked = evaluate(tiny_model, {"moved": moved_model}, tmp_path / "asked", **changes)[1]
    assert drawn.log_ratio == pytest.approx(asked.log_ratio, abs=1e-5) and drawn.log_ratio != 0
    assert (drawn.kl_k3 is None and changes) or drawn.kl_k3 == pytest.approx(asked.kl_k3, abs=1e-5)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20}, {"repetition_penalty": 1.1}], ids=str
)
def test_log_ratios_are_called_kl_only_where_samples_are_the_policy_s_own(tiny_model, moved_model, tmp_path, sampling):
    found = evaluate(tiny_model, {"moved": moved_model}, tmp_path / "out", **sampling)
    plain = evaluate(tiny_model, {"moved": moved_model}, tmp_path / "plain", stop=("e",))
    assert [each.kl for each in found] == [each.kl_k3 for each in found] == [None, None]
    assert found[1].log_ratio != 0 and plain[1].kl == plain[1].log_ratio
    assert "KL" not in markdown(found) and "log-ratio" in markdown(found)
    assert "KL (k3)" in markdown(plain) and "log-ratio" not in markdown(plain)
    assert read_evaluations(tmp_path / "out") == found


def test_kl_k3_is_that_of_training(tiny_model, moved_model, tmp_path):
    """Token by token: of the sum of a response's log-ratios it would be another number."""
    _, moved = evaluate(tiny_model, {"moved": moved_model}, tmp_path, max_new_tokens=12)
    rows = [json.loads(line) for line in (tmp_path / "samples_moved.jsonl").read_text().splitlines()]
    chat = load_chat(tiny_model)
    own = sample_responses(open_policy(moved_model), chat, PROMPTS, replace(SETTINGS, max_new_tokens=12))
    assert [sample.text for sample in own] == [row["response"] for row in rows]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (moved_model, tiny_model)]
    k3 = []
    for sample in own:
        ids = torch.from_numpy(sample.row.tokens)[None]
        mask = torch.from_numpy(sample.row.response)[1:]
        with torch.no_grad():
            policy, base = (
                model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[mask].squeeze(1)
                for model in models
            )
        ratios = (policy - base).double()
        k3.append(float((torch.exp(-ratios) - 1 + ratios).sum()))
    assert moved.kl_k3 == pytest.approx(sum(k3) / len(k3), rel=1e-4)


def test_one_model_is_held_at_a_time_and_the_judge_comes_last(tiny_model, moved_model, tmp_path, monkeypatch):
    another = tmp_path / "another"
    shutil.copytree(moved_model, another)
    opened, alive = [], []

    def watched(folder, *arguments):
        gc.collect()
        alive.append(sum(model() is not None for model in opened))
        model = open_policy(folder, *arguments)
        opened.append(weakref.ref(model.module))
        return model

    def judge(prompts, responses):
        gc.collect()
        alive.append(sum(model() is not None for model in opened))
        return length_of(prompts, responses)

    monkeypatch.setattr(compare, "open_policy", watched)
    found = evaluate(tiny_model, {"one": moved_model, "two": another}, tmp_path / "out", reward=judge)
    assert len(opened) == 3, "each once"
    assert alive == [0] * 6
    assert [each.name for each in found] == ["reference", "one", "two"]
    assert found[1].reward == found[2].reward and found[1].kl == found[2].kl > 0


def test_a_policy_of_another_tokenizer_is_refused_before_anything_is_sampled(
    tiny_model, tiny_tokenizer, moved_model, tmp_path
):
    """Its tokens would be other texts: one more token, and one in the place of another."""
    for change in (lambda other: other.add_tokens(["something new"]), lambda other: None):
        other = copy.deepcopy(tiny_tokenizer)
        change(other)
        folder = tmp_path / f"tokens{len(other)}"
        shutil.copytree(moved_model, folder)
        other.save_pretrained(folder)
        if len(other) == len(tiny_tokenizer):
            file = folder / "tokenizer.json"
            settings = json.loads(file.read_text())
            first, second, *_ = [token for token in settings["model"]["vocab"] if token.isalpha()]
            vocabulary = settings["model"]["vocab"]
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            file.write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=r"policies\.other = .* has another tokenizer than reference = "):
            evaluate(tiny_model, {"other": folder}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_are_asked_in_the_precision_of_the_run(tiny_model, moved_model, tmp_path, monkeypatch):
    seen = []

    def watched(folder, *arguments):
        model = open_policy(folder, *arguments)
        seen.append({parameter.dtype for parameter in model.module.parameters()})
        return model

    monkeypatch.setattr(compare, "open_policy", watched)
    for precision in ("auto", "bfloat16"):
        evaluate(tiny_model, {"moved": moved_model}, tmp_path / precision, precision=precision)
    wide = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert seen == [{wide}] * 2 + [{torch.bfloat16}] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_without_a_gpu_is_refused_in_a_line(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="precision = float16 needs a GPU"):
        evaluate(tiny_model, {}, tmp_path, precision="float16")


def test_top_k_stop_strings_and_repetition_penalty_are_those_of_transformers(tiny_model, tiny_tokenizer, tmp_path):
    """Greedy, so that what is drawn is what plain generate writes."""
    model, chat = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), load_chat(tiny_model)
    for penalty in (1.0, 1.3, 5.0):
        settings = replace(SETTINGS, samples=1, top_k=1, repetition_penalty=penalty, max_new_tokens=16)
        written = sample_responses(open_policy(tiny_model), chat, PROMPTS, settings)
        for sample in written:
            prompt = torch.from_numpy(sample.row.tokens[~sample.row.response])[None]
            expected = model.generate(
                prompt, do_sample=False, max_new_tokens=16, repetition_penalty=penalty,
                eos_token_id=list(chat.end_token_ids), pad_token_id=chat.tokenizer.pad_token_id,
            )  # fmt: skip
            assert sample.row.tokens.tolist() == expected[0].tolist()
    unlike = [sample.row.tokens[sample.row.response] for sample in written]
    assert all(len(set(tokens.tolist())) == len(tokens) for tokens in unlike), "at 5, no token comes twice"
    whole = sample_responses(open_policy(tiny_model), chat, PROMPTS, replace(SETTINGS, samples=1, max_new_tokens=16))
    stop = whole[0].text[3:5]
    cut = sample_responses(
        open_policy(tiny_model), chat, PROMPTS, replace(SETTINGS, samples=1, max_new_tokens=16, stop=(stop,))
    )
    assert cut[0].ended and stop in cut[0].text and len(cut[0].text) < len(whole[0].text)


@pytest.mark.dist
def test_two_ranks_find_what_one_finds(run_ranks, tiny_model, moved_model, tmp_path):
    (tmp_path / "rules_of_the_test.py").write_text(
        "def length(prompts, responses):\n    return [*map(len, responses)]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[:3]))
    for ranks in (1, 2):
        run_ranks(
            [
                "-m", "policy.evaluation", f"output={tmp_path / str(ranks)}", f"reference={tiny_model}",
                f"policies={{moved: {moved_model}}}", f"prompts={tmp_path / 'prompts.jsonl'}",
                "reward=rules_of_the_test:length", "sampling={samples: 2, max_new_tokens: 6}",
            ],
            ranks=ranks, PYTHONPATH=f"{Path(__file__).parents[2]}:{tmp_path}",
        )  # fmt: skip
    one, two = (read_evaluations(tmp_path / str(ranks)) for ranks in (1, 2))
    for left, right in zip(one, two, strict=True):
        assert left.reward == right.reward and left.samples == right.samples == 6
        assert left.kl == pytest.approx(right.kl, rel=1e-4, abs=1e-5)
    samples = [(tmp_path / str(ranks) / "samples_moved.jsonl").read_text() for ranks in (1, 2)]
    assert samples[0] == samples[1]
    assert read_completion(tmp_path / "2") is not None


def test_one_seed_gives_one_result(tiny_model, tmp_path):
    found = [evaluate(tiny_model, {}, tmp_path / str(run), seed=run // 2)[0].reward.value for run in range(4)]
    assert found[0] == found[1] != found[2] == found[3]


def test_what_is_sampled_together_changes_nothing(tiny_model, tmp_path):
    for batch_rows in (1, 5, 12):
        evaluate(tiny_model, {}, tmp_path / str(batch_rows), batch_rows=batch_rows)
    one, *others = ((tmp_path / str(rows) / "samples_reference.jsonl").read_text() for rows in (1, 5, 12))
    assert others == [one, one]


@pytest.mark.parametrize("values", [[1.0], [math.nan] * 12])
def test_a_reward_function_that_miscounts_or_gives_nan_is_refused(tiny_model, tmp_path, values):
    with pytest.raises(DataError, match="12 responses"):
        evaluate(tiny_model, {}, tmp_path, reward=lambda prompts, responses: values)


def test_a_folder_without_a_model_is_named_before_anything_is_sampled(tiny_model, tmp_path):
    with pytest.raises(ModelError, match="nothing: not a model folder"):
        evaluate(tiny_model, {"moved": tmp_path / "nothing"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_no_samples_are_refused_by_the_parser(number, capsys):
    command = ["evaluate", "policy", "--reference", "m", "--prompts", "p", "--reward", "a:b", "--output", "o"]
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "--samples", number])
    assert "--samples" in capsys.readouterr().err


def test_bad_names_and_files_are_told(tmp_path):
    with pytest.raises(ConfigError, match="expected module:function"):
        load_reward("no.such.module:f")
    with pytest.raises(ConfigError, match="expected module:function"):
        load_reward("math:no_such_function")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: missing column: none of prompt"):
        read_prompts(tmp_path / "prompts.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        read_prompts(tmp_path / "nothing.jsonl")


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def test_prompts_are_read_as_the_stages_read_them(tmp_path):
    path = tmp_path / "prompts.jsonl"
    talk = [{"role": "system", "content": "so"}, {"role": "human", "content": "the sun"}]
    rows = [
        {"prompt": "the sun", "answer": "7"},
        {"prompt": talk},
        {"messages": [{"from": "human", "value": "tax"}], "tools": TOOLS},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (text, with_system, with_tools), columns = read_prompts(path)
    assert text == "the sun"
    assert [message["role"] for message in with_system] == ["system", "user"]
    assert columns == [{"answer": "7"}, {}, {}]
    assert with_tools == ({"role": "user", "content": "tax", "tools": TOOLS},)


def test_conversations_are_sampled_and_judged_whole(tiny_model, tmp_path):
    """A function gets what was said last; nothing is sampled where the template cannot show a prompt."""
    asked = [[{"role": "user", "content": "the sun"}, {"role": "assistant", "content": "is good"},
              {"role": "user", "content": "so", "tools": TOOLS}], "so"]  # fmt: skip
    seen = []

    def reward(answers):
        seen.extend(answers.prompts)
        return [0.0] * len(answers)

    given = {"settings": replace(SETTINGS, samples=1), "output": tmp_path / "out"}
    evaluate_policies({}, tiny_model, asked, reward, template="qwen3", **given)
    assert seen == asked
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples_reference.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == asked
    with pytest.raises(DataError, match=r"does not show the tools of the conversation \(weather\)"):
        evaluate_policies({}, tiny_model, asked, reward, template="chatml", **given)


def test_a_function_as_reward_gets_what_the_user_said_last():
    talk = [{"role": "system", "content": "so"}, {"role": "user", "content": "Tell me about the sun."}]
    gold = load_reward("launch.quickstart.gold:gold_reward")
    answer = "The sun is good and happy."
    asked = [Answers(prompts=[prompt], responses=[answer], token_ids=[[1]], ended=[True], columns=[{}])
             for prompt in (talk, "Tell me about the sun.")]  # fmt: skip
    assert len({*gold(asked[0]), *gold(asked[1])}) == 1
