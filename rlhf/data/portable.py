"""A chat template that gives plain Transformers users the very texts that a model was trained on."""

import copy
from typing import Any

from rlhf.data.template_text import portable_header, portable_origin
from rlhf.data.templates import ChatFormat


def portable_tokenizer(chat: ChatFormat) -> Any:
    """A copy of the tokenizer whose own template renders conversations as ``chat`` does.

    The template is wrapped, not rewritten: what it renders gets the BOS that the tokenizer would add, and a
    conversation that is over ends with an end token and nothing behind it. It names the template that it wraps, so
    that models trained from a published one count as of the same form; wrapped once, it stays as it is. The end token
    of the tokenizer becomes the one that ends an answer, so that whoever stops at it stops where training did.
    """
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.eos_token = chat.ending.token
    if portable_origin(chat.template) is None or tokenizer.eos_token != chat.tokenizer.eos_token:
        body = _wrapped(chat)
        tokenizer.chat_template = portable_header(body, chat.digest) + body
    else:
        tokenizer.chat_template = chat.template
    tokenizer.padding_side = "right"
    return tokenizer


def _wrapped(chat: ChatFormat) -> str:
    template = chat.template.removesuffix("\n")  # as Jinja drops it at the end of a template
    # A template that names the padding token would make it look like one that can end a text.
    end_tokens = tuple(token for token in chat.end_tokens if token != chat.tokenizer.pad_token)
    eos = chat.tokenizer.eos_token
    pinned = f"{{%- set eos_token = {eos!r} -%}}" if chat.ending.token != eos else ""
    bos = f"{{%- if not rendered.startswith({chat.bos!r}) %}}{{{{ {chat.bos!r} }}}}{{% endif -%}}" if chat.bos else ""
    surplus = chat.ending.surplus
    cut = f"{{%- if ended.endswith({surplus!r}) %}}{{% set ended = ended[:-{len(surplus)}].rstrip() %}}{{% endif -%}}"
    return (
        f"{pinned}{{%- set rendered %}}\n"
        f"{template}{{% endset -%}}\n"
        f"{bos}"
        "{%- if add_generation_prompt %}{{ rendered }}{% else %}"
        f"{{%- set ended = rendered.rstrip() %}}{cut if surplus else ''}"
        f"{{{{ ended if ended.endswith({end_tokens!r}) else ended + eos_token }}}}"
        "{%- endif -%}"
    )
