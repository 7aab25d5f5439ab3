"""Rows with tools, from files to published folders that show plain users what training showed."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from launch.cli import main
from policy.ppo.__main__ import main as ppo
from policy.preference.__main__ import main as preference
from policy.sft.__main__ import main as sft
from reward.__main__ import main as reward
from reward.score import load_scorer, score_tokens
from rlhf.train.chat import load_chat

TOOLS = [{"type": "function", "function": {"name": name, "description": "Says it."}} for name in ("clock", "weather")]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"place": "here"}}}
BRACKETS = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}"
    "{%- if tools and m == asked[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST] {{ m['content'] }}[/INST]"
    "{%- elif m['tool_calls'] -%}[CALL]{{ m['tool_calls'] | tojson }}{{ eos_token }}"
    "{%- elif m['role'] == 'tool' -%}[RESULT]{{ m['content'] | tojson }}[/RESULT]"
    "{%- else %}{{ m['content'] + eos_token }}{%- endif -%}{%- endfor -%}"
)
"""As Mistral's: tools stand before the last question."""


def asked(word):
    return {"role": "user", "content": f"how is the {word}?"}


def used(word):
    """A question, the call that it leads to, and its result."""
    return [
        asked(word),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": json.dumps({"rain": "good"}), "tool_call_id": "abcdefghi"},
    ]


@pytest.fixture
def given(tiny_model, tmp_path):
    """``given(kind, rows)``: settings of a short run on rows that all have the tools."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)  # descriptions of tools are long in bytes
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (base / "config.json").write_text(json.dumps(config))

    def settings(kind, rows):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({**row, "tools": TOOLS}) + "\n" for row in rows))
        return [
            f"output={tmp_path}/{kind}", f"data.train={path}", "data.eval_share=0.25", "data.max_tokens=3000",
            f"data.cache_dir={tmp_path}/tokens", "engine.kind=local", "train.max_steps=1", "train.global_batch_size=4",
            "train.tensorboard=false",
        ]  # fmt: skip

    settings.base = base
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", pytest.param("brackets", marks=pytest.mark.full)])
def test_rows_with_tools_are_trained_on_scored_and_published(given, name, tmp_path):
    """And a policy is judged by a reward model of another template, which shows tools in its own way."""
    brackets = tmp_path / "brackets.jinja"
    brackets.write_text(BRACKETS)
    template, other = ("qwen3", brackets) if name == "qwen3" else (brackets, "qwen3")
    words = ("sun", "rain", "day", "tax", "form", "dentist", "sad", "happy")
    again = [
        {"messages": [*used(word), {"role": "assistant", "content": "good"}, asked("day"),
                      {"role": "assistant", "content": "it is sad"}]}
        for word in words
    ]  # fmt: skip
    pairs = [
        {"prompt": used(word) if place % 2 else [asked(word)], "chosen": "it is good", "rejected": "no"}
        for place, word in enumerate(words)
    ]
    prompts = [{"prompt": pair["prompt"]} for pair in pairs]
    base = f"model.path={given.base}"
    assert sft([*given("sft", again), base, f"data.template={template}"]) == 0
    policy = tmp_path / "sft" / "final"
    assert preference([*given("dpo", pairs), f"model.path={policy}"]) == 0
    assert reward([*given("reward", pairs), base, f"data.template={template}"]) == 0
    judge = tmp_path / "reward" / "final"
    assert reward([*given("other", pairs), base, f"data.template={other}"]) == 0
    drawn = ["rollout.prompts=4", "rollout.samples=2", "rollout.max_new_tokens=4", "advantage.estimator=rloo"]
    start = [f"policy.path={policy}", *drawn]
    assert ppo([*given("ppo", prompts), *start, f"reward.path={judge}"]) == 0
    judged = [f"reward.path={tmp_path}/other/final", "reward.retokenize=true"]
    assert ppo([*given("again", prompts), *start, *judged]) == 0

    shown = load_chat(given.base, str(template)).render_prompt([{**asked("sun"), "tools": TOOLS}])
    assert all(json.dumps(tool) in shown for tool in TOOLS)
    for run in ("sft", "dpo", "ppo", "again"):
        plain = AutoTokenizer.from_pretrained(tmp_path / run / "final")
        text = plain.apply_chat_template([asked("sun")], tools=TOOLS, add_generation_prompt=True, tokenize=False)
        assert text == shown, run

    code = main(["score", "--model", str(judge), "--data", f"{tmp_path}/dpo.jsonl", "--output", f"{tmp_path}/s.jsonl"])
    assert code == 0
    said = [json.loads(line)["chosen_reward"] for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    model, own = load_scorer(judge)
    rows = [
        own.encode([{**pair["prompt"][0], "tools": TOOLS}, *pair["prompt"][1:]],
                   [{"role": "assistant", "content": pair["chosen"]}])[0]
        for pair in pairs
    ]  # fmt: skip
    assert said == pytest.approx(score_tokens(model, rows, batch_tokens=8000), abs=1e-5)
