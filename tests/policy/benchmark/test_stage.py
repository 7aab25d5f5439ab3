"""The benchmark stage on real models: scores are those of plain Transformers, whoever computes them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launch.cli import main
from policy.benchmark.__main__ import main as stage
from reward.benchmarks.results import read_result
from reward.building import build_reward_model
from reward.config import RewardModelConfig
from reward.saving import save_reward_model
from rlhf.core.findings import read_findings
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import chat_format
from rlhf.models.tokenizer import load_tokenizer

WORDS = ["the", "sun", "rain", "day", "tax", "form", "good", "bad", "happy", "and", "so", "on", "one", "was", "is"]


def rows(count, subset=None):
    random = np.random.default_rng(0)

    def words(few, many):
        return " ".join(random.choice(WORDS, random.integers(few, many)))

    found = [{"prompt": words(2, 6), "chosen": words(1, 9), "rejected": words(1, 9)} for _ in range(count)]
    return [row | ({"subset": subset[n % len(subset)], "id": n} if subset else {}) for n, row in enumerate(found)]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("published") / "final"
    tokenizer = load_tokenizer(tiny_model)
    config = RewardModelConfig(path=str(tiny_model), head_init_scale=30.0)
    model = build_reward_model(
        config, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id, vocabulary=len(tokenizer), seed=0
    )
    save_reward_model(model, folder)
    portable_tokenizer(chat_format(tokenizer, None)).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    def write(found, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return str(path)

    return write


def items_of(folder):
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def test_scores_are_those_of_plain_transformers_and_numbers_those_of_the_scores(reward_model, data, tmp_path, capsys):
    found, output = rows(30, ["donotanswer", "hep-go"]), tmp_path / "out"
    command = ["evaluate", "reward", "--model", str(reward_model), "--benchmark", "rewardbench"]
    assert main([*command, "--data", data(found), "--output", str(output), "--batch-tokens", "100"]) == 0
    table = capsys.readouterr().out
    assert "Safety" in table and "wrong prompt" in table
    items, tokenizer = items_of(output), load_tokenizer(reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    for row, item in zip(found, items, strict=True):
        for answer, score in zip((row["chosen"], row["rejected"]), item["scores"], strict=True):
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            with torch.no_grad():
                assert score == pytest.approx(float(model(torch.tensor([ids])).logits), abs=1e-4)
    result = read_result(output)
    by_hand = {
        subset: np.mean([item["scores"][0] > item["scores"][1] for item in items if item["subset"] == subset])
        for subset in ("donotanswer", "hep-go")
    }
    assert result.main.value == pytest.approx(np.mean(list(by_hand.values())))
    elsewhere = np.mean([item["wrong_prompt_scores"][0] > item["wrong_prompt_scores"][1] for item in items])
    assert sum(each.value for each in result.wrong_prompt[1:3]) / 2 == pytest.approx(elsewhere)
    assert 0 < result.pairs.calibration_error < 1 and result.quantiles.keys() == {"5%", "25%", "50%", "75%", "95%"}


def test_a_file_of_pairs_is_a_benchmark_with_its_accuracy_by_the_gap_of_its_scores(
    reward_model, data, tmp_path, capsys
):
    scores = [{"chosen_score": 1 + n % 4, "rejected_score": 0.5} for n in range(8)]
    file = data([row | own for row, own in zip(rows(8), scores, strict=True)])
    command = ["evaluate", "reward", "--model", str(reward_model), "--no-wrong-prompt", "--benchmark", file]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "pairs: " in printed and "score gap 0.50 to 0.50" in printed and "calibration error" in printed
    found, items = read_result(tmp_path / "out").pairs, items_of(tmp_path / "out")
    right = [item["scores"][0] > item["scores"][1] for item in items]
    by_gap = [(bucket.smallest, bucket.accuracy.value) for bucket in found.by_score_gap]
    assert by_gap == [(0.5 + n, np.mean(right[n::4])) for n in range(4)]
    assert sum(each.accuracy.pairs for each in found.reliability) == 8
    assert main([*command, "--output", str(tmp_path / "two"), "--data", file]) == 2
    assert f"--data {file}: --benchmark {file} names the rows already; give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [("rm_bench", "no such file, and no benchmark; there are pairs, hh"), ("no/a.jsonl", "no such file")],
)
def test_a_name_that_is_neither_benchmark_nor_file_is_refused(reward_model, tmp_path, capsys, name, told):
    command = ["evaluate", "reward", "--model", str(reward_model), "--output", str(tmp_path), "--benchmark", name]
    try:
        code = main(command)
    except SystemExit as refused:
        code = refused.code
    error = capsys.readouterr().err
    assert code == 2 and told in error and name in error and "Traceback" not in error


def test_a_server_judges_as_its_model_does(reward_model, data, tmp_path, serving, scripted, capsys):
    given = ["evaluate", "reward", "--model", str(reward_model), "--data", data(rows(8)), "--max-tokens", "30"]
    server = serving(reward_model)
    assert main([*given, "--output", str(tmp_path / "here")]) == 0
    assert main([*given, "--output", str(tmp_path / "there"), "--url", server.url, "--url", server.url]) == 0
    pairs = zip(items_of(tmp_path / "here"), items_of(tmp_path / "there"), strict=True)
    for here, there in pairs:
        assert there["scores"] == pytest.approx(here["scores"], abs=1e-5)
        assert there["wrong_prompt_scores"] == pytest.approx(here["wrong_prompt_scores"], abs=1e-5)
    assert server.batcher.counts.rows > 16
    served = {name: read_findings(tmp_path / name).get("served") for name in ("here", "there")}
    assert served == {"here": None, "there": {"model": str(server.card)}}
    other = scripted(replace(server.card, weights="others"), None)
    assert main([*given, "--output", str(tmp_path / "other"), "--url", other.url]) == 2
    assert f"{other.url}: does not serve model = {reward_model}: other weights (" in capsys.readouterr().err


def test_a_wrong_prompt_is_another_one(reward_model, data, tmp_path):
    found = rows(6)
    found[3]["prompt"] = found[0]["prompt"]  # half of the benchmark away
    output = tmp_path / "out"
    arguments = [f"model={reward_model}", f"data={data(found)}", f"output={output}"]
    assert stage(arguments) == 0
    for item in items_of(output):
        assert item["scores"] != pytest.approx(item["wrong_prompt_scores"], abs=1e-6)


def test_a_policy_implies_a_reward(tiny_model, data, tmp_path):
    """The reward of DPO: log-probability of an answer under the policy, less that under its start."""
    tokenizer, policy = load_tokenizer(tiny_model), tmp_path / "policy"
    moved = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    moved.save_pretrained(policy)
    portable_tokenizer(chat_format(tokenizer, None)).save_pretrained(policy)
    found, output = rows(8), tmp_path / "out"
    command = ["evaluate", "reward", "--model", str(policy), "--reference", str(tiny_model), "--no-wrong-prompt"]
    assert main([*command, "--data", data(found), "--output", str(output), "--batch-tokens", "60"]) == 0
    chat, base = chat_format(tokenizer, None), AutoModelForCausalLM.from_pretrained(tiny_model)
    for row, item in zip(found, items_of(output), strict=True):
        for answer, score in zip((row["chosen"], row["rejected"]), item["scores"], strict=True):
            prompt, response = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer})
            ids, start = chat.encode([prompt], [response])
            sums = []
            for model in (moved, base):
                with torch.no_grad():
                    logits = model(torch.tensor(ids[None], dtype=torch.long)).logits[0, start - 1 : -1].log_softmax(-1)
                sums.append(float(logits.gather(1, torch.tensor(ids[start:, None], dtype=torch.long)).sum()))
            assert score == pytest.approx(sums[0] - sums[1], abs=1e-4)


def test_long_texts_are_cut_and_counted(reward_model, data, tmp_path, capsys):
    found = rows(4)
    found[2]["chosen"] = " ".join(WORDS * 3)
    output = tmp_path / "out"
    command = ["evaluate", "reward", "--model", str(reward_model), "--data", data(found), "--max-tokens", "40"]
    assert main([*command, "--output", str(output), "--no-wrong-prompt"]) == 0
    assert read_result(output).notes == ("1 texts were cut to 40 tokens",)
    assert "note: 1 texts were cut to 40 tokens" in capsys.readouterr().out
    assert "1 texts were cut" in (output / "benchmark.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["benchmark=reward-bench"], "benchmark = reward-bench: there are pairs, hh, rewardbench"),
        (["data=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["model=nowhere"], "nowhere: not a model folder (no config.json); give the final/ folder of a run"),
        (["reference=nowhere"], "nowhere: not a model folder (no config.json); give the final/ folder of a run"),
        (["precision=float16"], "precision = float16 needs a GPU"),
        (["url=http://h", "reference=nowhere"], "url = http://h: serves a reward model, and reference is for a policy"),
        (["url=localhost"], "url = localhost: expected the address of a server, such as http://127.0.0.1:8000"),
    ],
)
def test_what_cannot_work_is_one_message(reward_model, data, tmp_path, capfd, arguments, told):
    given = [f"model={reward_model}", f"data={data(rows(3))}", f"output={tmp_path / 'out'}", *arguments]
    assert stage(given) != 0
    error = capfd.readouterr().err
    assert told in error and "Traceback" not in error


def test_one_prompt_for_all_has_no_wrong_prompt(reward_model, data, tmp_path, capfd):
    found = [row | {"prompt": "the sun"} for row in rows(3)]
    given = [f"model={reward_model}", f"data={data(found)}", f"output={tmp_path / 'out'}"]
    assert stage(given) != 0
    assert "set wrong_prompt=false" in capfd.readouterr().err
    assert stage([*given, "wrong_prompt=false"]) == 0
