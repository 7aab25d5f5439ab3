import dataclasses
import json
import re

import pytest

from rlhf.core.errors import ModelError
from rlhf.models.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    RewardStatistics,
    package_versions,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        stage="reward",
        base_model="SmolLM2-135M-Instruct",
        template_digest="1111",
        tokenizer_digest="2222",
        pad_policy={
            "pad_token": "<|endoftext|>",
            "pad_token_id": 0,
            "eos_token": "<|im_end|>",
            "eos_token_id": 2,
        },
        vocabulary_size=49152,
        head_kind="linear",
        head_dtype="float32",
        rewards=RewardStatistics(mean=0.25, standard_deviation=1.5, count=128),
        margin_statistics={"mean": 0.21, "residual": 1e-9},
        loss={"kind": "bradley_terry", "margin": {"kind": "ot", "epsilon": 0.1}},
        training_data="3333",
    )


def test_a_manifest_is_read_back_as_it_was_written(manifest, tmp_path):
    assert write_manifest(tmp_path, manifest) == tmp_path / MANIFEST_NAME
    assert read_manifest(tmp_path) == manifest


def test_a_model_without_held_out_data_has_no_reward_statistics(manifest, tmp_path):
    write_manifest(tmp_path, dataclasses.replace(manifest, rewards=None))
    assert read_manifest(tmp_path).rewards is None


def test_versions_name_the_packages_that_are_there(manifest):
    import torch

    assert manifest.versions == package_versions()
    assert manifest.versions["torch"] == torch.__version__
    assert {"transformers", "peft", "pot"} <= set(manifest.versions)


def test_a_missing_manifest_says_what_was_expected(tmp_path):
    with pytest.raises(ModelError, match=r"margin_rlhf_manifest\.json: no such file; expected a folder that"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format_version": 1, ', "is damaged"),
        ("[]", "no format_version"),
        ("{}", "no format_version"),
        ('{"format_version": "one"}', "no format_version"),
        ('{"format_version": 1}', "stage: "),
    ],
)
def test_a_damaged_manifest_is_refused_with_a_way_out(tmp_path, text, words):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(
        ModelError, match=rf"(?s)is damaged.*{words}.*publish the model again|{words}.*publish"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("vocabulary_size", "many", "vocabulary_size"),
        ("rewards", {"mean": "high", "standard_deviation": 1.0, "count": 3}, "rewards.*mean"),
        ("surprise", 1, "unknown entries surprise"),
    ],
)
def test_a_wrong_entry_is_named(manifest, tmp_path, name, value, words):
    path = write_manifest(tmp_path, manifest)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ModelError, match=words):
        read_manifest(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(manifest, tmp_path):
    newer = dataclasses.replace(manifest, format_version=FORMAT_VERSION + 1)
    write_manifest(tmp_path, newer)
    with pytest.raises(ModelError, match=r"has format 2, and this margin-rlhf reads up to 1; upgrade"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rewards": RewardStatistics(mean=float("nan"), standard_deviation=1.0, count=3)}, "rewards.mean"),
        ({"margin_statistics": {"mean": float("inf")}}, "margin_statistics.mean"),
        ({"loss": {"weights": [1.0, float("nan")]}}, "loss.weights[1]"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(manifest, tmp_path, change, name):
    with pytest.raises(ModelError, match=re.escape(f"not finite ({name})")):
        write_manifest(tmp_path, dataclasses.replace(manifest, **change))
    assert not list(tmp_path.iterdir())
