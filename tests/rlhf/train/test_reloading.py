"""The saved tokenizer must show and split conversations as the run does."""

import pytest
from transformers import AutoTokenizer

from rlhf.data.built_in_templates import BUILT_IN_TEMPLATES
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import chat_format
from rlhf.models.tokenizer import load_tokenizer
from rlhf.train import reloading
from rlhf.train.publishing import text_cases
from rlhf.train.reloading import check_texts

MOVES_SYSTEM = (
    "{% set talk = messages[1:] if messages[0]['role'] == 'system' else messages %}{% for m in talk %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n' }}{% endif %}{{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
FORGETS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEMPLATES = {**BUILT_IN_TEMPLATES, "moves the system message": MOVES_SYSTEM, "has none": FORGETS_SYSTEM}


@pytest.fixture(params=TEMPLATES)
def chat(request, tiny_model):
    return chat_format(load_tokenizer(tiny_model), TEMPLATES[request.param])


def test_a_published_tokenizer_passes(chat, tmp_path):
    portable_tokenizer(chat).save_pretrained(tmp_path)
    cases = text_cases(chat)
    assert len(cases) >= 3
    check_texts(AutoTokenizer.from_pretrained(tmp_path), cases)


def test_a_tokenizer_with_another_template_or_other_tokens_is_found_out(chat, tmp_path):
    published = portable_tokenizer(chat)
    published.chat_template = published.chat_template.replace("['content']", "['content'][:5]")
    with pytest.raises(SystemExit, match="the saved chat template shows"):
        check_texts(published, text_cases(chat))
    cases = [case | {"tokens": case["tokens"][:-1]} for case in text_cases(chat)]
    with pytest.raises(SystemExit, match="splits the text differently"):
        check_texts(portable_tokenizer(chat), cases)


def test_a_question_says_how_many_threads_it_may_take_and_others_take_all(monkeypatch):
    taken = []
    monkeypatch.setattr(reloading.torch, "set_num_threads", taken.append)
    for request in ({"threads": 1}, {}):
        assert "fault" in reloading.answer("rlhf.train.nothing", ".", request)
    assert taken == [1, reloading.THREADS]
