import pytest
import torch

from rlhf.core.errors import ConfigError
from rlhf.engine.build import check_precision
from rlhf.engine.options import EngineConfig


def test_float16_without_a_gpu_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="float16 needs a GPU") as refused:
        check_precision(EngineConfig(precision="float16"), torch.device("cpu"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_other_precisions_need_none(precision):
    check_precision(EngineConfig(precision=precision), torch.device("cpu"))


def test_float16_on_a_gpu_is_fine():
    check_precision(EngineConfig(precision="float16"), torch.device("cuda", 0))
