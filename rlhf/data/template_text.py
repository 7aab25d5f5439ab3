"""The Jinja text of a chat template: where it comes from, and the settings that become part of it."""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.core.errors import DataError
from rlhf.core.files import digest
from rlhf.data.built_in_templates import BUILT_IN_TEMPLATES, PLAIN_TEMPLATE
from rlhf.data.options import TemplateChoice


def template_text(tokenizer: Any, template: str | None) -> tuple[str, str]:
    """The text of ``data.template``, and in words where it comes from.

    Raises:
        DataError: if there is no such template.
    """
    own = getattr(tokenizer, "chat_template", None)
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    if template is None:
        if not named:
            return PLAIN_TEMPLATE, "plain, because the tokenizer has none"
        if "default" not in named:
            raise DataError(f"the tokenizer has several templates; give one as data.template: {', '.join(named)}")
        return named["default"], "the tokenizer's own"
    if named.get(template):
        return named[template], f"the tokenizer's own {template}"
    if template in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[template], template
    if "{" in template:
        return template, "given in the recipe"
    path = Path(template).expanduser()
    if not path.is_file():
        names = ", ".join(BUILT_IN_TEMPLATES)
        raise DataError(f"data.template = {template}: there is no such file, and it is none of {names}")
    return path.read_text(encoding="utf-8-sig"), template


def with_settings(text: str, origin: str, choice: TemplateChoice) -> str:
    """The template behind statements that do what the settings of ``choice`` ask for, each once.

    Raises:
        DataError: if it has no variable of that name, or was published with another value.
    """
    head = _settings_head(text, origin, choice.options)
    wanted = (
        _DROPPING if choice.drop_thoughts else "",
        "" if choice.system_prompt is None else _system_head(choice.system_prompt),
        _FOLDING if choice.fold_system else "",
    )
    return head + "".join(part for part in wanted if part not in text) + text


def system_prompt_in(text: str) -> str | None:
    """The ``data.system_prompt`` of the run, or of that which published the model; ``None`` if there was none.

    Of several, the first one counts: it leaves the others nothing to do.
    """
    _, _, rest = text.partition(_SYSTEM[0])
    return ast.literal_eval(rest[: rest.index(_SYSTEM[1])]) if rest else None


def drops_thoughts(text: str) -> bool:
    """Whether the template shows answers without their thoughts, as ``data.thoughts=drop`` asks for."""
    return _DROPPING in text


def fitting_template(tokenizer: Any) -> str | None:
    """The built-in template in the form of the tokenizer's family that shows every turn as it was written."""
    vocabulary = tokenizer.get_vocab()
    for name, tokens in _FAMILIES:
        if all(token in vocabulary for token in tokens):
            return name
    return "plain"


def portable_header(body: str, origin: str) -> str:
    """A comment for the start of a template ``body`` that renders as the format with the digest ``origin`` does."""
    return f"{{#- renders as form {origin}; {digest(body)} -#}}"


def portable_origin(template: str) -> str | None:
    """The digest that :func:`portable_header` left; ``None`` without one, or if the template was changed since."""
    found = re.match(r"\{#- renders as form (\w+); (\w+) -#\}", template)
    return found[1] if found and digest(template[found.end() :]) == found[2] else None


# ------------------------------------------------------------------------------------------------- details

_FAMILIES = (
    ("r1-distill", ("<｜User｜>", "<｜Assistant｜>")),
    ("phi3", ("<|user|>", "<|assistant|>", "<|end|>")),
    ("qwen3", ("<|im_start|>", "<|im_end|>", "<think>")),
    ("chatml", ("<|im_start|>", "<|im_end|>")),
)
"""Built-in templates, and the tokens that they need."""

NEEDED_TOKENS = dict(_FAMILIES[:2])

_FOLDING = (
    "{%- if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' %}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content'] + '\\n\\n' + messages[1]['content']}]"
    " + messages[2:] %}{%- endif %}{{ '' }}"
)
"""Goes in front of a template; the empty text at its end keeps a line feed that follows."""

_SYSTEM = (
    "{%- if bare is not defined and (not messages or messages[0]['role'] != 'system') %}"
    "{%- set messages = [{'role': 'system', 'content': ",
    "}] + messages %}{%- endif %}{{ '' }}",
)
"""The same for a system prompt, which stands in between as a literal of Python. Rendered ``bare``, there is none."""

_DROPPING = (
    "{{ '' }}{%- set shown = namespace(messages=[]) %}{%- for message in messages %}"
    "{%- set text = message['content'] %}"
    "{%- if message['role'] == 'assistant' and text is string and (message['reasoning_content'] or '</think>' in text)"
    " %}{%- set parts = text.split('</think>', 1) %}"
    "{%- if not message['reasoning_content'] and parts | length > 1 and"
    " (parts[0].lstrip().startswith('<think>') or '<think>' not in text) %}{%- set text = parts[1] %}{%- endif %}"
    "{%- set message = dict(message.items() | rejectattr('0', 'equalto', 'reasoning_content'), content=text.strip()) %}"
    "{%- endif %}{%- set shown.messages = shown.messages + [message] %}{%- endfor %}"
    "{%- set messages = shown.messages %}{{ '' }}"
)
"""The same for answers without their thoughts, as :func:`rlhf.data.messages.without_thoughts` leaves them."""


def _system_head(prompt: str) -> str:
    return repr(prompt).join(_SYSTEM)


def _settings_head(text: str, origin: str, options: Mapping[str, bool | int | float | str]) -> str:
    """Statements that set variables of a template; without those that a published one has already.

    Raises:
        DataError: if there is no such variable, or the model was published with another value, which would win.
    """
    head, published = "", _published_options(text)
    for name, value in options.items():
        found = published.get(name)
        if found == json.dumps(value):
            continue
        if found is not None:
            raise DataError(
                f"data.template_options.{name} = {json.dumps(value)}: the template ({origin}) was published with "
                f"{found}; leave the option out, or give data.template the original one"
            )
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not re.search(rf"\b{name}\b", text):
            raise DataError(f"data.template_options.{name}: the template ({origin}) has no such variable")
        head += f"{{%- set {name} = {json.dumps(value)} %}}"
    return head + "{{ '' }}" if head else ""


def _published_options(text: str) -> dict[str, str]:
    """Variables that a template sets as :func:`_settings_head` does, and their values as JSON."""
    heads = re.findall(r"^(?:\{%- set \w+ = [^\n]*? %\})+\{\{ '' \}\}", text, re.MULTILINE)
    return dict(pair for head in heads for pair in re.findall(r"\{%- set (\w+) = (.*?) %\}", head))
