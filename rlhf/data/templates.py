"""Chat templates: messages become tokens in the form that a rollout of the same model would have.

The whole conversation is rendered by the chat template and tokenized once; where the response begins is
found by character offset, so no token boundary is forced between prompt and response. The text begins with
the tokenizer's BOS where the tokenizer adds one by itself and the template does not, and it ends with an
end token: all that a template puts behind its end-of-turn token is cut, and EOS is appended where
the template has no such token. In a conversation every assistant turn is found in the same way.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from rlhf.core.errors import DataError, ModelError
from rlhf.core.files import digest
from rlhf.core.tokenizers import tokenizer_digest
from rlhf.data.ending import Ending, find_ending
from rlhf.data.records import Message

PLAIN_TEMPLATE = """\
{%- set names = {'system': 'System', 'user': 'User', 'assistant': 'Assistant'} -%}
{%- for message in messages -%}
{{ names.get(message['role'], message['role']) + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{{ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif -%}
"""
"""Template for base models, whose tokenizer brings none: headings on their own lines, EOS after answers."""

CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

BUILT_IN_TEMPLATES = {"plain": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE}


Span = tuple[int, int]
"""Half-open interval of characters or tokens: the first one, and the one after the last."""

Turns = tuple[np.ndarray, np.ndarray]
"""Token ids ``(T,)`` int32, and ``(n, 2)`` int32: the spans of tokens that a model is to write."""


class TemplateFault(DataError):
    """The template cannot render one conversation, or does not show all of it to the model."""


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with the chat template that goes with it; made by :func:`chat_format`."""

    tokenizer: Any
    template: str
    """The Jinja text."""
    origin: str
    """Where the template comes from, in words."""
    bos: str
    """What to put before a rendered text that does not begin with it; empty if the tokenizer adds nothing."""
    end_tokens: tuple[str, ...]
    """Special tokens that may end a response."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response besides EOS and what the template writes: the model's own stop tokens and those of
    the recipe."""

    def render(self, prompt: Sequence[Message], response: Sequence[Message]) -> tuple[str, str]:
        """The prompt, up to where a model would begin to write, and the whole text that begins with it.

        Raises:
            TemplateFault: if the template refuses the messages, or drops or rewrites some of them.
        """
        before = self.render_prompt(prompt)
        whole = self._apply([*prompt, *response], generate=False)
        if not whole.startswith(before):
            raise TemplateFault(
                "the template rewrites the prompt once the response follows it; give another data.template"
            )
        _refuse_dropped(whole[len(before) :], [m for m in response if m["role"] == "assistant"], "response")
        return before, self._ended(whole)

    def render_turns(self, messages: Sequence[Message], *, first: int = 0) -> tuple[str, list[Span]]:
        """The text of a conversation that ends with an assistant message, and what of it a model is to write.

        Args:
            messages: the whole conversation.
            first: assistant messages before this place are none of the model's, as in a prompt.
        Returns:
            The text, and the characters of each assistant turn: from where a model would begin to write it to
            the end token behind it. White space behind an end token is part of no turn.
        Raises:
            TemplateFault: if the template refuses the messages, drops or rewrites some of them, or shows a turn
                in another way once the conversation goes on.
        """
        text = self._ended(self._apply(messages, generate=False))
        _refuse_dropped(text, [m for m in messages if m["role"] in ("user", "system")], "prompt")
        turns = [place for place in range(first, len(messages)) if messages[place]["role"] == "assistant"]
        return text, [self._turn(messages, place, text) for place in turns]

    def render_prompt(self, prompt: Sequence[Message]) -> str:
        """The text after which a model writes its response.

        Raises:
            TemplateFault: if the template refuses the messages, or leaves out a user or system message.
        """
        before = self._apply(prompt, generate=True)
        _refuse_dropped(before, [m for m in prompt if m["role"] in ("user", "system")], "prompt")
        return before

    def encode(self, prompt: Sequence[Message], response: Sequence[Message]) -> tuple[np.ndarray, int]:
        """Token ids ``(T,)`` int32 and the index of the first response token. Raises like :meth:`render`."""
        return self.tokenize([self.render(prompt, response)])[0]

    def tokenize(self, rendered: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, int]]:
        """Encode many results of :meth:`render` in one call of the tokenizer; each as :meth:`encode` does."""
        turns = self.tokenize_turns([(whole, [(len(before), len(whole))]) for before, whole in rendered])
        return [(ids, int(spans[0, 0])) for ids, spans in turns]

    def tokenize_turns(self, rendered: Sequence[tuple[str, Sequence[Span]]]) -> list[Turns]:
        """The tokens of many results of :meth:`render_turns`, in one call of the tokenizer.

        A token that reaches beyond its turn, on either side, belongs to the turn.
        """
        if not rendered:
            return []
        if not getattr(self.tokenizer, "is_fast", False):
            return [self._tokenize_in_parts(*turns) for turns in rendered]
        texts = [text for text, _ in rendered]
        batch = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        encoded = []
        for row, (ids, (text, spans)) in enumerate(zip(batch["input_ids"], rendered, strict=True)):
            places = [_token_span(batch, row, span, len(text), len(ids)) for span in spans]
            encoded.append((np.array(ids, np.int32), np.array(places, np.int32).reshape(-1, 2)))
        return encoded

    @functools.cached_property
    def digest(self) -> str:
        """A name for all that decides on the text of a conversation; that of the original, for a portable template."""
        origin = portable_origin(self.template)
        if origin is not None:
            return origin
        named = {**_special_texts(self.tokenizer), "eos": self.ending.token}
        cut = [self.ending.surplus] if self.ending.surplus else []
        return digest("format 1", self.template, self.bos, *named.values(), *self.end_tokens, *cut)

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """A name for what the tokenizer does to text; whether EOS or another token ends an answer does not matter."""
        return tokenizer_digest(self.tokenizer, eos_token=self.ending.token)

    @functools.cached_property
    def ending(self) -> Ending:
        """How the template ends an answer; as EOS for one that cannot show a question and an answer."""
        eos = self.tokenizer.eos_token
        try:
            ending = find_ending(lambda messages, open: self._apply(messages, generate=open), self.end_tokens, eos)
        except TemplateFault:
            return Ending(eos, "")
        if ending.token == self.tokenizer.pad_token:
            raise ModelError(
                f"the template ({self.origin}) ends answers with {ending.token}, the padding token of the tokenizer, "
                "so that plain Transformers would not see the end; give the tokenizer another pad_token"
            )
        return ending

    @functools.cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """All that ends a response, wherever one is written, read, counted or published.

        EOS, the token behind a rendered answer, and :attr:`stop_token_ids`.
        """
        ids = [self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids(self.ending.token)]
        return tuple(dict.fromkeys(map(int, [*ids, *self.stop_token_ids])))

    def _apply(self, messages: Sequence[Message], *, generate: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=generate
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"data.template ({self.origin}): line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise TemplateFault(f"the template refuses the conversation: {error}") from error
        return text if text.startswith(self.bos) else self.bos + text

    def _ended(self, text: str) -> str:
        cut = self._without_surplus(text)
        return cut if cut.endswith(self.end_tokens) else cut + self.tokenizer.eos_token

    def _without_surplus(self, text: str) -> str:
        return text.rstrip().removesuffix(self.ending.surplus).rstrip()

    def _turn(self, messages: Sequence[Message], place: int, text: str) -> Span:
        """The characters in ``text`` of the assistant message at ``place``."""
        before = self._apply(messages[:place], generate=True)
        after = self._without_surplus(self._apply(messages[: place + 1], generate=False))
        if not (text.startswith(before) and text.startswith(after)):
            raise TemplateFault(
                f"the template shows message {place + 1} (assistant), or what stands before it, in another way once "
                "the conversation goes on; give another data.template"
            )
        span = len(before), len(text) if place == len(messages) - 1 else len(after)
        _refuse_dropped(text[slice(*span)], [messages[place]], "response")
        return span

    def _tokenize_in_parts(self, text: str, spans: Sequence[Span]) -> Turns:
        """Tokenize without offsets: a token boundary is forced where a turn begins and where it ends."""
        bounds = [0, *(place for span in spans for place in span), len(text)]
        parts = [
            self.tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
            for begin, end in itertools.pairwise(bounds)
        ]
        places = np.cumsum([len(part) for part in parts])[:-1]
        return np.array([token for part in parts for token in part], np.int32), places.astype(np.int32).reshape(-1, 2)


def portable_header(body: str, origin: str) -> str:
    """A comment for the start of a template ``body`` that renders as the format with the digest ``origin`` does."""
    return f"{{#- renders as form {origin}; {digest(body)} -#}}"


def portable_origin(template: str) -> str | None:
    """The digest that :func:`portable_header` left; ``None`` without one, or if the template was changed since."""
    found = re.match(r"\{#- renders as form (\w+); (\w+) -#\}", template)
    return found[1] if found and digest(template[found.end() :]) == found[2] else None


def chat_format(tokenizer: Any, template: str | None, stop_token_ids: Sequence[int] = ()) -> ChatFormat:
    """The format for ``data.template``: Jinja text, a file, a built-in name; ``None``: the tokenizer's own.

    Args:
        tokenizer: of the model.
        template: the setting.
        stop_token_ids: see :class:`ChatFormat`.
    Raises:
        DataError: if there is no such template. (Jinja that is not valid is reported at the first rendering.)
        ModelError: if the tokenizer lacks tokens that the template or the end of a response needs.
    """
    text, origin = _template_text(tokenizer, template)
    if not tokenizer.eos_token:
        raise ModelError("the tokenizer has no EOS token: there is nothing to end a response with")
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = (special | set(tokenizer.all_special_tokens)) - {tokenizer.bos_token} | {tokenizer.eos_token}
    if text == CHATML_TEMPLATE and "<|im_end|>" not in special:
        raise ModelError("data.template=chatml: the tokenizer has no token <|im_end|>")
    return ChatFormat(tokenizer, text, origin, _wanted_bos(tokenizer), tuple(sorted(special)), tuple(stop_token_ids))


# ------------------------------------------------------------------------------------------------- details


def _template_text(tokenizer: Any, template: str | None) -> tuple[str, str]:
    if template is None:
        if getattr(tokenizer, "chat_template", None):
            return tokenizer.get_chat_template(), "the tokenizer's own"
        return PLAIN_TEMPLATE, "plain, because the tokenizer has none"
    if template in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[template], template
    if "{" in template:
        return template, "given in the recipe"
    path = Path(template).expanduser()
    if not path.is_file():
        names = " or ".join(BUILT_IN_TEMPLATES)
        raise DataError(f"data.template = {template}: there is no such file, and it is not {names}")
    return path.read_text(encoding="utf-8"), template


def _wanted_bos(tokenizer: Any) -> str:
    """BOS, if the tokenizer puts it before any text by itself."""
    bos = tokenizer.bos_token_id
    return tokenizer.bos_token if bos is not None and tokenizer("a")["input_ids"][0] == bos else ""


def _special_texts(tokenizer: Any) -> dict[str, str]:
    return {name: str(getattr(tokenizer, f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}


def _refuse_dropped(text: str, messages: Sequence[Message], part: str) -> None:
    place = 0
    for message in messages:
        content = message["content"].strip()
        found = text.find(content, place)
        if found < 0:
            raise TemplateFault(
                f"the template drops or rewrites the {part}: the {message['role']} message {content[:40]!r} "
                "is not in the rendered text; give another data.template"
            )
        place = found + len(content)


def _token_span(batch: Any, row: int, span: Span, size: int, count: int) -> Span:
    """Which of the ``count`` tokens of a text of ``size`` characters hold a character of ``span``."""
    begin, end = (_token_at(batch, row, place, size, count) for place in span)
    reaches_beyond = end < count and batch.token_to_chars(row, end).start < span[1]
    return begin, end + reaches_beyond


def _token_at(batch: Any, row: int, begin: int, end: int, count: int) -> int:
    """The first token that holds a character from ``begin`` on (white space may belong to no token)."""
    for place in range(begin, end):
        token = batch.char_to_token(row, place)
        if token is not None:
            return token
    return count
