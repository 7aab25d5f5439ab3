"""A chat template that gives plain Transformers users the very texts that a model was trained on."""

import copy
from typing import Any

from rlhf.data.templates import ChatFormat, portable_header, portable_origin


def portable_tokenizer(chat: ChatFormat) -> Any:
    """A copy of the tokenizer whose own template renders conversations as ``chat`` does.

    The template is wrapped, not rewritten: what it renders gets the BOS that the tokenizer would add, and a
    conversation that is over ends with an end token, without white space behind it. It names the template that it
    wraps, so that models trained from a published one count as of the same form; wrapped once, it stays as it is.
    """
    tokenizer = copy.deepcopy(chat.tokenizer)
    if portable_origin(chat.template) is None:
        body = _wrapped(chat)
        tokenizer.chat_template = portable_header(body, chat.digest) + body
    else:
        tokenizer.chat_template = chat.template
    tokenizer.padding_side = "right"
    return tokenizer


def _wrapped(chat: ChatFormat) -> str:
    template = chat.template.removesuffix("\n")  # as Jinja drops it at the end of a template
    # A template that names the padding token would make it look like one that can end a text.
    end_tokens = [token for token in chat.end_tokens if token != chat.tokenizer.pad_token]
    ends = " or ".join(f"ended.endswith({token!r})" for token in end_tokens)
    bos = f"{{%- if not rendered.startswith({chat.bos!r}) %}}{{{{ {chat.bos!r} }}}}{{% endif -%}}" if chat.bos else ""
    return (
        "{%- set rendered %}\n"
        f"{template}{{% endset -%}}\n"
        f"{bos}"
        "{%- if add_generation_prompt %}{{ rendered }}{% else %}"
        "{%- set ended = rendered.rstrip() %}"
        f"{{{{ ended if {ends} else ended + eos_token }}}}"
        "{%- endif -%}"
    )
