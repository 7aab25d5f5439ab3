"""Tool calls, thoughts, parts, a system prompt: what ``rlhf score`` shows a model is what it was trained on."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch.cli import main
from reward.__main__ import main as train_reward
from reward.building import build_reward_model
from reward.config import RewardModelConfig
from reward.saving import save_reward_model
from reward.score import check_scorer
from rlhf.data.options import DataConfig, TemplateChoice
from rlhf.data.portable import portable_tokenizer
from rlhf.data.preferences import load_preferences
from rlhf.data.records import to_conversations
from rlhf.data.templates import chat_format
from rlhf.models.manifest import read_manifest
from rlhf.models.tokenizer import load_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
PLAIN_CALL = {**CALL, "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
ASKED = {"role": "user", "content": "the rain"}
SAID = {"role": "assistant", "content": "is good"}
TOLD = {"role": "tool", "content": "rain"}
CASES = {
    "an answer that is a call": ([ASKED], [CALL], TOOLS, [ASKED, PLAIN_CALL]),
    "a result in the prompt": ([ASKED, CALL, TOLD], [SAID], TOOLS, [ASKED, PLAIN_CALL, TOLD, SAID]),
    "a call, its result and an answer": ([ASKED], [CALL, TOLD, SAID], None, [ASKED, PLAIN_CALL, TOLD, SAID]),
    "thoughts apart": (
        [ASKED],
        [{**SAID, "reasoning_content": "so on"}],
        None,
        [ASKED, {**SAID, "content": "<think>\nso on\n</think>\n\nis good"}],
    ),
    "thoughts in the text": (
        [ASKED],
        [{**SAID, "content": "<think>\nso on\n</think>\n\nis good"}],
        None,
        [ASKED, {**SAID, "reasoning_content": "so on"}],
    ),
    "parts of text": (
        [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "rain"}]}],
        [{"role": "assistant", "content": [{"type": "text", "text": "is good"}]}],
        None,
        [ASKED, SAID],
    ),
}


def published(folder, tiny_model, choice):
    tokenizer = load_tokenizer(tiny_model)
    config = RewardModelConfig(path=str(tiny_model), head_init_scale=30.0)
    model = build_reward_model(
        config, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id, vocabulary=len(tokenizer), seed=0
    )
    save_reward_model(model, folder)
    portable_tokenizer(chat_format(tokenizer, choice)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def final(tmp_path_factory, tiny_model):
    return published(tmp_path_factory.mktemp("messages") / "final", tiny_model, "qwen3")


def scores(final, rows, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["score", "--model", str(final), "--data", str(path), "--output", str(folder / "scores.jsonl")])
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def plain_score(final, messages, tools=None):
    """As a user of plain Transformers asks the folder."""
    tokenizer = AutoTokenizer.from_pretrained(final)
    ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    with torch.no_grad():
        return float(AutoModelForSequenceClassification.from_pretrained(final).eval()(torch.tensor([ids])).logits)


@pytest.mark.parametrize("case", CASES)
def test_what_a_message_holds_is_scored(final, tmp_path, case):
    prompt, response, tools, whole = CASES[case]
    row = {"prompt": prompt, "response": response} | ({"tools": tools} if tools else {})
    other = [{"role": "assistant", "content": "is bad"}]
    pair = {"prompt": prompt, "chosen": response, "rejected": other} | ({"tools": tools} if tools else {})
    single, both = scores(final, [row, pair], tmp_path)
    expected = plain_score(final, whole, tools)
    assert single["reward"] == pytest.approx(expected, abs=1e-5)
    assert both["chosen_reward"] == pytest.approx(expected, abs=1e-5)
    for less in ([*whole[:-1], SAID | {"content": "is"}], [ASKED, {"role": "assistant", "content": ""}]):
        assert abs(expected - plain_score(final, less, tools)) > 1e-3


def test_what_cannot_be_shown_is_named_row_by_row(final, tmp_path):
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    rows = [
        {"prompt": [{"role": "user", "content": picture}], "response": "is good"},
        {"prompt": [ASKED], "response": [{"role": "assistant", "content": "", "tool_calls": [{"id": "7"}]}]},
        {"prompt": [ASKED], "response": "is good", "tools": "weather"},
        {"prompt": [ASKED], "response": "is good"},
    ]
    lines = scores(final, rows, tmp_path)
    assert [line.get("error", "").split(":")[0] for line in lines] == ["not text", "wrong type", "wrong type", ""]
    assert "image_url" in lines[0]["error"] and "no call" in lines[1]["error"] and "tools is text" in lines[2]["error"]


def test_tools_without_a_template_for_them_are_an_error_of_the_row(tmp_path, tiny_model):
    folder = published(tmp_path / "final", tiny_model, "chatml")
    asked, plain = scores(
        folder,
        [{"prompt": "the rain", "response": "is good", "tools": TOOLS}, {"prompt": "a", "response": "b"}],
        tmp_path,
    )
    assert "does not show the tools of the conversation (weather)" in asked["error"]
    assert "reward" in plain


@pytest.mark.parametrize(
    "rows",
    [
        {"prompt": "the rain", "chosen": "is good", "rejected": "is bad"},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "is bad"}]},
    ],
)
def test_the_runs_system_prompt_is_scored_as_it_was_trained(tmp_path, tiny_model, rows):
    """A model of ``data.system_prompt`` gets it from ``rlhf score``, too: other text would get another score."""
    brief = TemplateChoice(text="chatml", system_prompt="please tell me a short story")
    folder = published(tmp_path / "final", tiny_model, brief)
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(rows) + "\n") * 2)
    config = DataConfig(train=str(path), template="chatml", system_prompt=brief.system_prompt, eval_share=0,
                        cache_dir=tmp_path / "cache")  # fmt: skip
    trained = load_preferences(config, chat_format(load_tokenizer(tiny_model), config.template_choice)).train.pair(0)
    chat = check_scorer(folder)
    for side, tokens in (("chosen", trained.chosen), ("rejected", trained.rejected)):
        [(prompt, answer)] = to_conversations(rows, config.columns)[side]
        np.testing.assert_array_equal(chat.encode(prompt, answer)[0], tokens)
    [line] = scores(folder, [rows], tmp_path)
    system = {"role": "system", "content": brief.system_prompt}
    assert line["chosen_reward"] == pytest.approx(plain_score(folder, [system, ASKED, SAID]), abs=1e-5)
    without = published(tmp_path / "without", tiny_model, "chatml")
    assert abs(line["chosen_reward"] - plain_score(without, [ASKED, SAID])) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    ["data.system_prompt=please tell me a short story", pytest.param("data.thoughts=drop", marks=pytest.mark.full)],
)
def test_a_file_gets_the_scores_that_the_run_gave_it_when_it_was_held_out(tmp_path, tiny_model, setting):
    """From the recipe to the published folder: mean and deviation of held-out rewards stand in the manifest."""
    said = "<think>so on</think>is {} good"
    rows = [
        {"prompt": f"the rain {number}", "chosen": said.format(number), "rejected": said.format("not")}
        for number in range(8)
    ]
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    for path, part in ((train, rows[:4]), (held, rows[4:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    given = [f"data.train={train}", f"data.eval={held}", f"data.cache_dir={tmp_path}/tokens", "data.template=chatml",
             f"model.path={tiny_model}", "model.head_init_scale=30", "optim.learning_rate=1e-2", "engine.kind=local",
             "train.max_steps=2", "train.global_batch_size=4", "train.tensorboard=false"]  # fmt: skip
    assert train_reward([f"output={tmp_path}/run", *given, setting]) == 0
    final = tmp_path / "run" / "final"
    scored = scores(final, rows[4:], tmp_path)
    found = np.array([[row["chosen_reward"], row["rejected_reward"]] for row in scored], float)
    expected = read_manifest(final).rewards
    assert (found.mean(), found.std()) == pytest.approx((expected.mean, expected.standard_deviation), abs=1e-5)
    assert expected.standard_deviation > 1e-2

    own = final / "chat_template.jinja"  # without the setting in the template, it would be another text
    own.write_text(chat_format(load_tokenizer(tiny_model), "chatml").template)
    plain = [plain_score(final, [{"role": "user", "content": row["prompt"]},
                                 {"role": "assistant", "content": row["chosen"]}]) for row in rows[4:]]  # fmt: skip
    assert np.abs(plain - found[:, 0]).min() > 1e-3
