"""What vLLM has to be told of a published reward model to give its scores: the settings of ``vllm serve --config``.

vLLM pools a decoder at its last token and an encoder at its first one, as the models do here; but it puts a sigmoid
over the one label unless told otherwise, makes float16 of weights in float32, and knows the chat template for
conversations alone. For the pairs of ``/score`` it gives the template two messages, of the roles "query" and
"document", and lets the tokenizer add its special tokens to what comes out.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from reward.saving import HEADS_KEY, OWN_MODEL_TYPES
from reward.serving.card import card_of
from rlhf.core.errors import ModelError
from rlhf.core.files import write_text
from rlhf.data.portable import portable_tokenizer
from rlhf.data.templates import ChatFormat
from rlhf.models.weight_files import stored_type

SETTINGS_NAME = "vllm.yaml"
_HEAD = """\
# How vLLM gives the scores of this reward model:
#   vllm serve FOLDER --config FOLDER/{name}
# rlhf check served URL --model FOLDER compares them with those of plain Transformers.
"""


def vllm_settings(folder: Path, chat: ChatFormat, *, served_name: str = "reward") -> dict[str, Any]:
    """Flags of ``vllm serve``, without their dashes.

    Args:
        folder: of a published reward model.
        chat: its tokenizer and chat template.
        served_name: the name of the model in answers; the card is a second one.
    Raises:
        ModelError: if vLLM cannot serve such a model.
    """
    obstacle = vllm_obstacle(folder)
    if obstacle is not None:
        raise ModelError(obstacle)
    dtype = stored_type(str(folder))
    return {
        "served-model-name": [served_name, str(card_of(folder))],
        "runner": "pooling",
        "convert": "classify",
        "pooler-config": {**({"seq_pooling_type": "LAST"} if _is_decoder(folder) else {}), "use_activation": False},
        "chat-template": score_template(chat),
        "chat-template-content-format": "string",
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
    }


def write_vllm_settings(folder: Path, chat: ChatFormat) -> Path | None:
    """Write :func:`vllm_settings` into ``folder``; nothing for a model that vLLM cannot serve."""
    if vllm_obstacle(folder) is not None:
        return None
    text = yaml.safe_dump(vllm_settings(folder, chat), sort_keys=False, allow_unicode=True, width=1000)
    path = folder / SETTINGS_NAME
    write_text(path, _HEAD.format(name=SETTINGS_NAME) + text)
    return path


def vllm_obstacle(folder: Path) -> str | None:
    """Why vLLM cannot serve the model; ``None`` if nothing is known against it."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = settings.get(HEADS_KEY, 1)
    kind = next((kind for kind, name in OWN_MODEL_TYPES.items() if name == settings["model_type"]), None)
    if kind is None and heads == 1:
        return None
    what = f"a head of a kind of its own (model.head = {kind})" if kind else f"{heads} heads, whose mean is the reward"
    return f"{folder}: has {what}, which vLLM does not know; serve it with --engine hf"


def score_template(chat: ChatFormat) -> str:
    """The template of ``chat`` that also shows a query and a document: as a question and its answer.

    Of these it leaves out what the tokenizer is going to add before and behind the text.
    """
    tokenizer = portable_tokenizer(chat)
    before, behind = _added(tokenizer)
    cut = (
        f"{{%- if text.startswith({before!r}) %}}{{% set text = text[{len(before)}:] %}}{{% endif -%}}"
        if before
        else ""
    )
    if behind:
        cut += f"{{%- if text.endswith({behind!r}) %}}{{% set text = text[:-{len(behind)}] %}}{{% endif -%}}"
    return (
        "{%- set pair = messages | length == 2 and messages[0]['role'] == 'query' -%}"
        "{%- if pair %}{% set messages = [{'role': 'user', 'content': messages[0]['content']}, "
        "{'role': 'assistant', 'content': messages[1]['content']}] %}{% endif -%}"
        f"{{%- set text %}}\n{tokenizer.chat_template}{{% endset -%}}\n"
        f"{{%- if pair -%}}{cut}{{%- endif -%}}{{{{ text }}}}"
    )


def _added(tokenizer: Any) -> tuple[str, str]:
    """What the tokenizer puts before and behind a text by itself."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    parts = whole[:start], whole[start + len(bare) :]
    before, behind = ("".join(tokenizer.convert_ids_to_tokens(part)) for part in parts)
    return before, behind


def _is_decoder(folder: Path) -> bool:
    """Whether its head is the one of decoders; encoders pool by a part of their own, which vLLM knows."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if any(name.startswith("score.") for name in file.keys()):  # noqa: SIM118
                return True
    return False
