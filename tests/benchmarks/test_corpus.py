import json
import sys

import pytest

from benchmarks import make_corpus
from benchmarks.make_corpus import (
    Prompt,
    describe,
    held_out_topics,
    make_pairs,
    make_prompts,
    read_topics,
    sample_all,
    usable,
)
from launch.quickstart.gold import gold_reward
from policy.evaluation.compare import evaluate_policies
from policy.evaluation.options import SamplingSettings
from rlhf.core.errors import DataError, ModelError
from rlhf.models.tokenizer import load_tokenizer
from tests.lacking import imported

HERE = make_corpus.HERE
SPLITS = ("train", "heldout")
SETTINGS = SamplingSettings(samples=3, max_new_tokens=5)
PROMPTS = ["the sun", "rain", "a sad day", "tax", "form"]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict]]:
    return {split: rows(f"sentiment_pairs_{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[dict]]:
    return {split: rows(f"prompts_{split}.jsonl") for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_every_pair_has_texts_topic_and_a_higher_gold_score_for_chosen(pairs, split):
    for row in pairs[split]:
        assert list(row) == ["prompt", "chosen", "rejected", "chosen_score", "rejected_score", "topic"]
        assert row["chosen"].strip() == row["chosen"] != ""
        assert row["rejected"].strip() == row["rejected"] != ""
        assert row["chosen_score"] - row["rejected_score"] >= make_corpus.SMALLEST_GAP


def test_the_gold_labels_can_be_recomputed(pairs):
    imported("vaderSentiment")
    both = pairs["train"] + pairs["heldout"]
    for side in ("chosen", "rejected"):
        scores = gold_reward([row["prompt"] for row in both], [row[side] for row in both])
        assert scores == [row[f"{side}_score"] for row in both]


def test_no_topic_prompt_or_text_crosses_the_split(pairs, prompts):
    for files in (pairs, prompts):
        for key in ("topic", "prompt"):
            assert not {row[key] for row in files["train"]} & {row[key] for row in files["heldout"]}
    texts = {
        split: {row[side] for row in pairs[split] for side in ("chosen", "rejected")} for split in SPLITS
    }
    assert not texts["train"] & texts["heldout"]


def test_no_text_is_used_twice_for_a_prompt(pairs):
    for row_list in pairs.values():
        seen = [(row["prompt"], row[side]) for row in row_list for side in ("chosen", "rejected")]
        assert len(seen) == len(set(seen))


def test_a_prompt_has_at_most_three_pairs_and_is_listed(pairs, prompts):
    for split in SPLITS:
        used = [row["prompt"] for row in pairs[split]]
        assert max(used.count(prompt) for prompt in set(used)) <= make_corpus.PAIRS_PER_PROMPT
        assert set(used) <= {row["prompt"] for row in prompts[split]}


def test_the_prompts_are_those_that_the_script_makes(prompts):
    topics = read_topics()
    made = [(prompt.text, prompt.topic) for prompt in make_prompts(topics, seed=0)]
    shipped = {(row["prompt"], row["topic"]) for split in SPLITS for row in prompts[split]}
    assert shipped == set(made) and len(made) == len(shipped) == sum(map(len, topics.values()))
    assert {row["topic"] for row in prompts["heldout"]} == held_out_topics(topics, seed=0)


def test_nothing_unwanted_is_shipped(pairs):
    texts = [row[side] for split in SPLITS for row in pairs[split] for side in ("chosen", "rejected")]
    assert usable(texts) == list(dict.fromkeys(texts))


def test_the_corpus_stays_small():
    assert sum(path.stat().st_size for path in HERE.iterdir() if path.is_file()) < 900_000


def test_the_data_card_tells_what_the_files_hold(pairs):
    card = (HERE / "README.md").read_text(encoding="utf-8")
    described = [describe(pairs[split]) for split in SPLITS]
    for key in described[0]:
        assert f"| {key} | {described[0][key]} | {described[1][key]} |" in card


def test_sentiment_is_scored_by_the_response_alone():
    imported("vaderSentiment")
    scores = gold_reward(
        ["What a terrible day."] * 3, ["A wonderful, happy day!", "An awful, sad day.", "A chair."]
    )
    assert scores[0] > 0.5 > 0 > -0.5 > scores[1] and scores[2] == 0


def test_gold_reward_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="1 prompts but 2 responses"):
        gold_reward(["a"], ["b", "c"])


def test_a_missing_sentiment_package_says_how_to_install_it(monkeypatch):
    from launch.quickstart import gold

    gold._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(DataError, match=r"pip install 'margin-rlhf\[demo\]'"):
        gold_reward(["a"], ["b"])


def test_pairs_meet_across_the_middle_and_too_close_ones_are_dropped():
    prompt = Prompt(text="p", topic="t")
    made = make_pairs(prompt, list("abcdef"), [0.0, 0.9, -0.5, 0.05, 0.3, 0.5])
    assert [(row["chosen"], row["rejected"]) for row in made] == [("b", "d"), ("f", "a"), ("e", "c")]
    assert make_pairs(prompt, ["a", "b"], [0.3, 0.25]) == []
    assert make_pairs(prompt, ["a"], [0.3]) == [] and make_pairs(prompt, [], []) == []


def test_the_middle_one_of_an_odd_number_is_left_out():
    made = make_pairs(Prompt(text="p", topic="t"), ["a", "b", "c"], [0.0, 0.5, 1.0])
    assert [(row["chosen"], row["rejected"]) for row in made] == [("c", "a")]


def test_unusable_texts_are_empty_repeated_cut_or_unwanted():
    assert usable(
        ["a", "", "b", "a", "cut \ufffd", "see https://x.y", "Islamic art", "a jewel, asexual"]
    ) == [
        "a",
        "b",
        "a jewel, asexual",
    ]


def test_a_fifth_of_the_topics_is_held_out_and_the_seed_decides_which():
    topics = read_topics()
    chosen = held_out_topics(topics, seed=0)
    assert (
        len(topics) == 24 and len(chosen) == 5 and chosen == held_out_topics(reversed(list(topics)), seed=0)
    )
    assert any(held_out_topics(topics, seed=seed) != chosen for seed in range(1, 4))


def test_the_template_is_chatml_without_a_system_turn(tiny_model):
    tokenizer = load_tokenizer(tiny_model, chat_template=make_corpus.TEMPLATE.read_text(encoding="utf-8"))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    opening = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    assert opening == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_sampling_again_from_the_cache_gives_the_same_texts(tiny_model, tmp_path, monkeypatch):
    cache = tmp_path / "samples.jsonl"
    samples = sample_all(tiny_model, PROMPTS, SETTINGS, cache)
    assert [len(texts) for texts in samples] == [3] * 5 and len(set(samples[0])) > 1
    before = cache.read_bytes()
    monkeypatch.setattr(make_corpus, "open_policy", None)
    assert sample_all(tiny_model, PROMPTS, SETTINGS, cache) == samples
    assert cache.read_bytes() == before


def test_a_kill_in_the_middle_of_a_batch_changes_nothing_in_the_end(tiny_model, tmp_path, monkeypatch):
    """Nor does it matter how many prompts are sampled at once."""
    whole = sample_all(tiny_model, PROMPTS, SETTINGS, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    monkeypatch.setattr(make_corpus, "PROMPTS_AT_ONCE", 2)
    for left in ("".join(lines[:3]), "".join(lines[:4]), "".join(lines[:2]) + lines[2][:4], lines[0]):
        cache = tmp_path / "cut.jsonl"
        cache.write_text(left)
        assert sample_all(tiny_model, PROMPTS, SETTINGS, cache) == whole
        assert cache.read_text() == "".join(lines)


def test_the_samples_are_those_of_an_evaluation_with_the_same_seed(tiny_model, tmp_path):
    def none(answers):
        return [0.0] * len(answers)

    template = str(make_corpus.TEMPLATE)
    evaluate_policies({}, tiny_model, PROMPTS, none, template=template, settings=SETTINGS, output=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples_reference.jsonl").read_text().splitlines()]
    samples = sample_all(tiny_model, PROMPTS, SETTINGS, tmp_path / "samples.jsonl")
    assert [text for texts in samples for text in texts] == [row["response"] for row in rows]


def test_samples_of_other_settings_are_not_mixed_in(tiny_model, tmp_path):
    cache = tmp_path / "samples.jsonl"
    sample_all(tiny_model, ["rain"], SETTINGS, cache)
    with pytest.raises(DataError, match="made with other settings, prompts or another model"):
        sample_all(tiny_model, ["sun"], SETTINGS, cache)


def test_a_folder_without_a_model_says_how_to_make_one(tmp_path):
    with pytest.raises(ModelError, match="rlhf import-gguf smollm2"):
        sample_all(tmp_path, ["rain"], SETTINGS, tmp_path / "samples.jsonl")


def test_the_script_makes_the_four_files(tiny_model, tmp_path, monkeypatch, capsys):
    imported("vaderSentiment")
    words = ["sad", "happy", "good", "bad", "day", "rain"]
    monkeypatch.setattr(
        make_corpus,
        "sample_all",
        lambda folder, prompts, settings, cache: [
            [f"{word} {prompt}" for word in words] for prompt in prompts
        ],
    )
    monkeypatch.setattr(
        sys, "argv", ["make_corpus", "--model", str(tiny_model), "--output", str(tmp_path), "--seed", "3"]
    )
    assert make_corpus.main() == 0
    made = {path.name: path.read_text().count("\n") for path in tmp_path.iterdir()}
    assert made["prompts_train.jsonl"] + made["prompts_heldout.jsonl"] == 408
    assert made["sentiment_pairs_train.jsonl"] > 3 * made["sentiment_pairs_heldout.jsonl"] > 0
    assert "longer one wins" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--prompts", "1"])
    assert make_corpus.main() == 0


def test_the_script_reports_a_fault_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["make_corpus", "--model", str(tmp_path), "--output", str(tmp_path / "out")]
    )
    assert make_corpus.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_in_the_data_card_parses():
    card = (HERE / "README.md").read_text(encoding="utf-8")
    line = next(
        line for line in card.splitlines() if line.startswith("python -m benchmarks.make_corpus")
    )
    options = make_corpus._parser().parse_args(line.split()[3:])
    assert options.seed == 0
