import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ttest_1samp
from transformers import AutoModelForCausalLM, AutoTokenizer

from policy.building import build_policy
from policy.options import PolicyConfig
from policy.sft.config import SftConfig
from policy.sft.evaluation import evaluate_responses
from policy.sft.task import SftTask
from rlhf.config import load_config
from rlhf.core.errors import DataError, TrainingStopped
from rlhf.data.batching import Item, Row
from rlhf.data.examples import load_examples
from rlhf.data.options import ExampleDataConfig
from rlhf.engine.local import LocalEngine
from rlhf.engine.options import EngineConfig, OptimizerConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.manifest import read_manifest
from rlhf.train.chat import load_chat
from rlhf.train.options import TrainConfig

ALONE = Ranks(rank=0, world_size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
WORDS = ["the", "sun", "rain", "is", "was", "a", "good", "bad", "happy", "sad", "day", "dentist", "tax", "form"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """40 conversations of one to three exchanges; in every fifth only the last answer is to be learned."""
    generator = np.random.default_rng(0)

    def text():
        return " ".join(generator.choice(WORDS, size=generator.integers(1, 16)))

    rows = []
    for number in range(40):
        messages = [user(f"{number} {text()}"), assistant(text())]
        for _ in range(number % 3):
            messages += [user(text()), assistant(f"happy {text()}")]
        last_only = {"prompt": messages[:-1], "completion": messages[-1]["content"]}
        rows.append(last_only if number % 5 == 4 else {"messages": messages})
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="session")
def config(tmp_path_factory, tiny_model, chats):
    return SftConfig(
        output=tmp_path_factory.mktemp("runs") / "sft",
        model=PolicyConfig(path=str(tiny_model)),
        data=ExampleDataConfig(train=str(chats), eval_share=0.2, cache_dir=tmp_path_factory.mktemp("cache")),
        train=TrainConfig(global_batch_size=12, micro_batch_tokens=200),
        engine=EngineConfig(kind="local"),
    )


@pytest.fixture(scope="session")
def data(config):
    return load_examples(config.data, load_chat(config.model.path), kind="conversation")


@pytest.fixture
def make_task(config, data, tiny_tokenizer):
    """``make_task(token_budget, train=..., evals=...)`` gives an engine and a task with the tiny model's weights."""

    def make(token_budget=200, train=data.train, evals=data.evals):
        model = build_policy(config.model, dtype=torch.float32, vocabulary=len(tiny_tokenizer), seed=0)
        engine = LocalEngine(model, ranks=ALONE, optimizer=OptimizerConfig(), total_steps=20)
        changed = replace(config, train=replace(config.train, micro_batch_tokens=token_budget))
        return engine, SftTask(engine, changed, train, evals)

    return make


def run_step(engine, task, step=0):
    """Metrics, gradients by name, and the rows of one global batch, micro-batch by micro-batch."""
    engine.module.zero_grad()
    batches = task.micro_batches(step)
    for batch in batches:
        task.loss(batch).backward()
    gradients = {name: parameter.grad for name, parameter in engine.module.named_parameters()}
    return task.step_metrics(), gradients, [task.row_ids(batch) for batch in batches]


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) < 1e-5 * largest, name


def labeled(tokenizer, row):
    """Tokens of a ChatML row and, where it is to be learned, the token again (elsewhere -100): from its characters."""
    messages = row.get("messages") or [*row["prompt"], assistant(row["completion"])]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = [found.span(1) for found in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text)]
    spans = spans if "messages" in row else spans[-1:]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(low <= begin and end <= high for low, high in spans) for begin, end in encoded["offset_mapping"]]
    tokens = torch.tensor(encoded["input_ids"])
    return tokens, torch.where(torch.tensor(inside), tokens, -100)


def test_loss_and_gradient_are_cross_entropy_of_assistant_turns_on_whole_logits(
    make_task, chats, tiny_model, tiny_tokenizer
):
    metrics, gradients, row_ids = run_step(*make_task())
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    drawn = [rows[int(row_id.rpartition(":")[2]) - 1] for batch in row_ids for row_id in batch]
    assert any(len(row.get("messages", ())) > 2 for row in drawn) and any("prompt" in row for row in drawn)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    nll, count = torch.zeros(()), 0
    for row in drawn:
        tokens, labels = labeled(tiny_tokenizer, row)
        nll = nll + F.cross_entropy(plain(tokens[None]).logits[0, :-1], labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    (nll / count).backward()
    expected = nll.item() / count
    assert metrics["conversations"] == 12 and metrics["response_tokens"] == count < 0.7 * metrics["tokens"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert_same_gradients(gradients, {f"hf.{name}": value.grad for name, value in plain.named_parameters()})


def test_loss_and_gradient_do_not_depend_on_the_token_budget(make_task):
    small, whole = (run_step(*make_task(budget)) for budget in (120, 100_000))
    assert len(small[2]) > 3 and len(whole[2]) == 1
    assert small[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert_same_gradients(small[1], whole[1])


def test_the_turns_of_a_conversation_add_up(make_task, config, tmp_path):
    """Its loss is that of the first answer, and of the second one after all that was said before; nothing else."""
    turns = [user("is the day good"), assistant("sad rain"), user("a happy day"), assistant("the sun was good")]
    kinds = {
        "whole": {"messages": turns},
        "first": {"messages": turns[:2]},
        "second": {"prompt": turns[:3], "completion": turns[3]["content"]},
    }
    found = {}
    for name, row in kinds.items():
        options = replace(config.data, train=str(write_rows(tmp_path / f"{name}.jsonl", [row])), eval_share=0.0)
        rows = load_examples(options, load_chat(config.model.path), kind="conversation").train
        _engine, task = make_task(evals=rows)
        task.evaluate()
        found[name] = task.evaluation
    sums = {name: each.loss * each.response_tokens for name, each in found.items()}
    assert sums["whole"] == pytest.approx(sums["first"] + sums["second"], rel=1e-6)
    assert found["whole"].response_tokens == found["first"].response_tokens + found["second"].response_tokens


class Rows:
    """Rows in memory, as a source of items."""

    def __init__(self, rows):
        self._rows = rows
        self.lengths = np.array([[len(row.tokens)] for row in rows])
        self.fingerprint = "rows"

    def __len__(self):
        return len(self._rows)

    def item(self, index):
        return Item(f"rows:{index}", (self._rows[index],))


def test_rows_without_a_response_token_weigh_nothing(make_task, data):
    rows = [data.train.item(index).rows[0] for index in range(6)]
    silent = [replace(row, response=np.zeros(len(row.tokens), bool)) for row in rows[:3]]
    unpredicted = Row(np.array([5, 6, 7]), np.array([True, False, False]))
    padded = Rows([silent[0], *rows[:4], unpredicted, *silent[1:], *rows[4:]])
    (engine, task), other = make_task(evals=padded, train=padded), make_task(train=Rows(rows), evals=Rows(rows))
    found, expected = run_step(engine, task), run_step(*other)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert found[0]["response_tokens"] == expected[0]["response_tokens"]
    assert_same_gradients(found[1], expected[1])
    assert task.evaluate() == pytest.approx(other[1].evaluate(), rel=1e-6)
    assert task.evaluation.conversations == 6


def test_a_step_and_an_evaluation_without_any_response_token(make_task, data):
    row = data.train.item(0).rows[0]
    silent = Rows([replace(row, response=np.zeros(len(row.tokens), bool))])
    engine, task = make_task(train=silent, evals=silent)
    metrics, gradients, _ = run_step(engine, task)
    assert metrics["loss"] == 0 and all(not value.any() for value in gradients.values())
    with pytest.raises(DataError, match="no response token"):
        task.evaluate()


def test_evaluation_is_the_training_loss_of_the_same_rows(make_task, data):
    rows = Rows([data.train.item(index).rows[0] for index in range(10)])
    engine, task = make_task(train=rows, evals=rows)
    metrics = run_step(engine, task)[0]
    found = task.evaluate()
    assert found["eval/loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert found["eval/perplexity"] == pytest.approx(metrics["perplexity"], rel=1e-6)
    assert engine.module.training


def test_a_policy_that_broke_down_is_named_with_a_row(make_task):
    engine, task = make_task()
    next(engine.module.parameters()).data.fill_(float("nan"))
    with pytest.raises(TrainingStopped, match=r"not finite for \d+ conversations, such as .*chats\.jsonl:\d+"):
        task.evaluate()


def test_the_interval_of_equally_long_responses_is_that_of_a_mean():
    losses = np.random.default_rng(0).gamma(3.0, size=17)
    found = evaluate_responses(5 * losses, np.full(17, 5))
    expected = ttest_1samp(losses, 0).confidence_interval(0.95)
    assert (found.loss_low, found.loss_high) == pytest.approx((expected.low, expected.high))
    assert found.loss == pytest.approx(losses.mean())


def test_long_responses_weigh_more_and_the_interval_covers():
    assert evaluate_responses([2.0, 30.0, 0.0], [2, 10, 0]).loss == 32 / 12
    assert evaluate_responses([4.0], [2]).loss_low is None
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        tokens = generator.integers(1, 20, size=60)
        nll = tokens * generator.gamma(2.0, size=60)  # 2 nats per token, whatever the length
        found = evaluate_responses(nll, tokens)
        covered += found.loss_low < 2 < found.loss_high
    assert 920 <= covered <= 970


def test_a_recipe_that_sets_other_options_still_takes_the_lowest_held_out_loss(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("output: run\nmodel: {path: m}\ndata: {train: c.jsonl}\ntrain: {global_batch_size: 8}\n")
    config = load_config(SftConfig, [path], ["train.epochs=2.0"], program="policy.sft")
    assert config.train.best_metric == "-eval/loss" and config.train.global_batch_size == 8
    assert config.optim.learning_rate == 2e-5


# ------------------------------------------------------------------------------- real processes and files


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, tiny_model, chats):
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.yaml"
    path.write_text(
        f"output: {folder}/unset\n"
        f"model: {{path: {tiny_model}}}\n"
        f"data: {{train: {chats}, eval_share: 0.2, cache_dir: {folder}/cache}}\n"
        "optim: {learning_rate: 1e-2}\n"
        "train: {global_batch_size: 11, micro_batch_tokens: 150, epochs: 2, max_steps: 4, evaluate_every: 2}\n"
    )
    return path


def arguments(recipe, output, *overrides):
    return ["-m", "policy.sft", "--config", str(recipe), f"output={output}", *overrides]


@pytest.fixture(scope="session")
def one_rank(recipe, run_ranks):
    """The folder of a finished run of plain torch on one rank, started as users start it."""
    folder = recipe.parent / "one_rank"
    run_ranks(arguments(recipe, folder, "engine.kind=local"), ranks=1, cold=True)
    return folder


def test_single_conversations_say_what_the_evaluation_says(one_rank):
    rows = [json.loads(line) for line in (one_rank / "held_out.jsonl").read_text().splitlines()]
    found = json.loads((one_rank / "evaluation.json").read_text())
    assert (len(rows), sum(row["weight"] for row in rows)) == (found["conversations"], found["response_tokens"])
    loss = sum(row["value"] * row["weight"] for row in rows) / found["response_tokens"]
    assert loss == pytest.approx(found["loss"])


@pytest.mark.dist
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_under_deepspeed_give_the_curve_of_one_rank(run_ranks, runs, recipe, one_rank, tmp_path, stage):
    run_ranks(arguments(recipe, tmp_path / "run", f"engine.deepspeed={stage}", "train.publish=none"))
    runs.assert_close(runs.rows(tmp_path / "run"), runs.rows(one_rank), 2e-4)
    runs.assert_close(runs.rows(tmp_path / "run", "eval"), runs.rows(one_rank, "eval"), 2e-4)
    first, last = runs.rows(one_rank, "eval")
    assert (first["step"], last["step"]) == (2, 4)
    assert last["eval/loss"] < first["eval/loss"] - 0.02, "the curves agree because nothing was trained"


@pytest.mark.dist
def test_final_is_a_plain_model_that_writes(one_rank):
    final = one_rank / "final"
    assert read_manifest(final).stage == "sft"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final)
    prompt = tokenizer.apply_chat_template(
        [user("the sun")], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.dist
def test_the_run_folder_tells_the_best_evaluation_and_the_rates(runs, one_rank):
    evaluation = json.loads((one_rank / "evaluation.json").read_text())
    best = min(runs.rows(one_rank, "eval"), key=lambda row: row["eval/loss"])
    assert (evaluation["step"], evaluation["loss"]) == (best["step"], best["eval/loss"])
    assert evaluation["loss_low"] < evaluation["loss"] < evaluation["loss_high"]
    first = json.loads((one_rank / "metrics.jsonl").read_text().splitlines()[0])
    assert first["time/conversations_per_second"] > 0 and first["time/tokens_per_second"] > 0
