import pytest

from rlhf.config import load_config
from rlhf.core.errors import ConfigError
from rlhf.data.options import ColumnConfig, DataConfig, SourceConfig


def test_a_single_path_a_list_and_a_section_name_sources():
    assert DataConfig(train="a.jsonl").train_sources == (SourceConfig(path="a.jsonl"),)
    mixed = load_config(
        DataConfig, (), ["train=[a, {path: b, weight: 0.5, columns: {chosen: good}}]"], program="t"
    )
    second = SourceConfig(path="b", weight=0.5, columns=ColumnConfig(chosen="good"))
    assert mixed.train_sources == (SourceConfig(path="a"), second)


def test_weights_are_refused_for_eval_sources():
    with pytest.raises(ValueError, match=r"eval source e\.jsonl has a weight \(2\)"):
        DataConfig(train="a", eval=(SourceConfig(path="e.jsonl", weight=2),))


def test_a_run_without_training_data_is_refused():
    with pytest.raises(ValueError, match="train names no source"):
        DataConfig(train=())


@pytest.mark.parametrize(
    "override",
    ["max_tokens=0", "eval_share=1", "quarantine_max_share=-0.1", "over_length=cut", "flip_labels=1.5"],
)
def test_values_out_of_range_are_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(DataConfig, (), ["train=a", override], program="t")
