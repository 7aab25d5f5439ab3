"""Names of weights: another one for other weights, in seconds for those of the largest models."""

import json
import math
import time
from pathlib import Path

import pytest

from rlhf.core.files import weights_checksum


def large_weights(path: Path, shape: list[int], count: int = 3) -> int:
    """A safetensors file of zeros that takes no room on the disk; returns where its tensors begin."""
    size = 4 * math.prod(shape)
    tensors = {
        f"layer.{number}": {"dtype": "F32", "shape": shape, "data_offsets": [number * size, (number + 1) * size]}
        for number in range(count)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    with path.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.truncate(8 + len(header) + count * size)
    return 8 + len(header)


def test_weights_of_hundreds_of_gigabytes_get_a_name_in_no_time(tmp_path):
    large_weights(tmp_path / "model.safetensors", [2**20, 2**10], 30)
    before = time.process_time()
    weights_checksum(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size > 100e9
    assert time.process_time() - before < 5


@pytest.mark.parametrize("place", [0, 4 * 2**22 - 1, 2 * 4 * 2**22, 3 * 4 * 2**22 - 1])
def test_a_change_at_the_ends_of_any_tensor_gives_weights_another_name(tmp_path, place):
    path = tmp_path / "model.safetensors"
    begin = large_weights(path, [2**11, 2**11])
    before = weights_checksum(path)
    assert weights_checksum(path) == before
    with path.open("r+b") as handle:
        handle.seek(begin + place)
        handle.write(b"x")
    assert weights_checksum(path) != before


def test_other_shapes_of_the_same_size_give_weights_another_name(tmp_path):
    large_weights(tmp_path / "a.safetensors", [2**11, 2**13])
    large_weights(tmp_path / "b.safetensors", [2**13, 2**11])
    assert weights_checksum(tmp_path / "a.safetensors") != weights_checksum(tmp_path / "b.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_what_only_looks_like_large_weights_is_read_whole(tmp_path, monkeypatch, content):
    monkeypatch.setattr("rlhf.core.files.WHOLE_BYTES", 4)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert weights_checksum(path).startswith(f"{len(content)}:")
