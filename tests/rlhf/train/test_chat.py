from types import SimpleNamespace

import pytest

from rlhf.data.options import TemplateChoice
from rlhf.engine.ranks import single_rank
from rlhf.models import stops, tokenizer
from rlhf.train.stage import open_chat


@pytest.fixture
def revisions(monkeypatch):
    """The revisions that are asked for, by what is opened."""
    found = {}

    def watch(module, name):
        real = getattr(module, name).from_pretrained

        def opened(path, **options):
            found[name] = options.get("revision")
            return real(path, **options)

        monkeypatch.setattr(getattr(module, name), "from_pretrained", opened)

    watch(tokenizer, "AutoTokenizer")
    watch(stops, "GenerationConfig")
    return found


def test_tokenizer_and_generation_config_are_those_of_the_revision_of_the_model(tiny_model, tmp_path, revisions):
    model = SimpleNamespace(path=str(tiny_model), revision="v2", trust_remote_code=False)
    config = SimpleNamespace(model=model, output=tmp_path / "run", train=SimpleNamespace(publish="none"))
    open_chat(config, TemplateChoice(), single_rank())
    assert revisions == {"AutoTokenizer": "v2", "GenerationConfig": "v2"}
