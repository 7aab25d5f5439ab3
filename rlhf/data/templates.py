"""Chat templates: messages become tokens in the form that a rollout of the same model would have.

The whole conversation is rendered by the chat template and tokenized once; where the response begins is
found by character offset, so no token boundary is forced between prompt and response. The text begins with
the tokenizer's BOS where the tokenizer adds one by itself and the template does not, and it ends with an
end token: all that a template puts behind its end-of-turn token is cut, and EOS is appended where
the template has no such token. In a conversation every assistant turn is found in the same way.
"""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np

from rlhf.core.errors import DataError, ModelError
from rlhf.core.files import digest
from rlhf.core.tokenizers import former_tokenizer_digests, tokenizer_digest
from rlhf.data.built_in_templates import BUILT_IN_TEMPLATES, CHATML_TEMPLATE
from rlhf.data.ending import Ending, find_ending
from rlhf.data.markup import marks, markup_in
from rlhf.data.messages import (
    ROLES,
    Message,
    called,
    known_role,
    thoughts_and_answer,
    tools_of,
    without_thoughts,
)
from rlhf.data.options import TemplateChoice
from rlhf.data.spans import Span, token_span
from rlhf.data.template_text import (
    NEEDED_TOKENS,
    drops_thoughts,
    fitting_template,
    portable_origin,
    system_prompt_in,
    template_text,
    with_settings,
)

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
        if self.drops_thoughts:
            prompt, response = ([without_thoughts(message) for message in part] for part in (prompt, response))
        before = self.render_prompt(prompt)
        whole = self._apply([*prompt, *response], generate=False)
        if not whole.startswith(before):
            whole = before + self._behind(before, whole, prompt, response)
        self._refuse_dropped(whole[len(before) :], response, "response")
        self._refuse_unshown([*prompt, *response], generate=False)
        return before, self._ended(whole)

    def render_whole(self, messages: Sequence[Message]) -> str:
        """A conversation that is over, as the template shows it in one piece.

        Raises:
            TemplateFault: if the template refuses the messages.
        """
        return self._ended(self._apply(messages, generate=False))

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
        before, text = self.render(messages[:-1], messages[-1:])
        last = len(messages) - 1
        turns = [place for place in range(first, last) if messages[place]["role"] == "assistant"]
        return text, [*(self._turn(messages, place, text) for place in turns), (len(before), len(text))]

    def render_prompt(self, prompt: Sequence[Message]) -> str:
        """The text after which a model writes its response. Thoughts of earlier answers need not be in it.

        Raises:
            TemplateFault: if the template refuses the messages, or leaves out one of them.
        """
        before = self._apply(prompt, generate=True)
        self._refuse_dropped(before, [_what_stays(message) for message in prompt], "prompt")
        self._refuse_unshown(prompt, generate=True)
        self._refuse_unshown_tools(prompt, before)
        return before

    def render_written(self, prompt: Sequence[Message], text: str) -> tuple[str, str]:
        """The parts of :meth:`render`, for an answer that a model has written.

        Where the template drops or rewrites part of it (thoughts, white space), it stands behind the prompt as it is.

        Raises:
            TemplateFault: if the template cannot show the prompt.
        """
        try:
            return self.render(prompt, [{"role": "assistant", "content": text}])
        except TemplateFault:
            before = self.render_prompt(prompt)
            return before, before + text + self.ending.token

    def markup(self, messages: Sequence[Message]) -> tuple[str, ...]:
        """A warning where texts hold special tokens of the tokenizer, or marks of a well-known template."""
        return markup_in(messages, self._marks)

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
            places = [token_span(batch, row, span, len(text), len(ids)) for span in spans]
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
    def system_prompt(self) -> str | None:
        """What the template puts in front of conversations without a system message, as ``data.system_prompt`` of the
        run or of that which published the model; the first of several, which leaves the others nothing to do."""
        return system_prompt_in(self.template)

    @functools.cached_property
    def drops_thoughts(self) -> bool:
        """Whether the template shows answers without their thoughts, as ``data.thoughts=drop`` asks for."""
        return drops_thoughts(self.template)

    @functools.cached_property
    def header_tokens(self) -> int:
        """Tokens between the last words of a prompt and the response."""
        before = self.render_prompt([{"role": "user", "content": _PROBE}])
        behind = before[before.rindex(_PROBE) + len(_PROBE) :]
        return len(self.tokenizer(behind, add_special_tokens=False)["input_ids"]) if behind else 0

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """A name for what the tokenizer does to text; whether EOS or another token ends an answer does not matter."""
        return tokenizer_digest(self.tokenizer, eos_token=self.ending.token)

    @functools.cached_property
    def former_tokenizer_digests(self) -> frozenset[str]:
        """What earlier versions called the tokenizer, and wrote into manifests."""
        return former_tokenizer_digests(self.tokenizer, eos_token=self.ending.token)

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

    def _apply(self, messages: Sequence[Message], *, generate: bool, bare: bool = False) -> str:
        """What the template makes of messages; ``bare``: without the system prompt of the run."""
        options: dict[str, Any] = {"bare": True} if bare else {}
        tools = tools_of(messages)
        if tools:
            options["tools"] = tools
        shown = [_without_tools(message) for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                shown, chat_template=self.template, tokenize=False, add_generation_prompt=generate, **options
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"data.template ({self.origin}): line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            system = any(message["role"] == "system" for message in messages)
            hint = "; data.fold_system=true puts a system message into the user's first one" if system else ""
            raise TemplateFault(f"the template refuses the conversation: {error}{hint}") from error
        return text if text.startswith(self.bos) else self.bos + text

    def _ended(self, text: str) -> str:
        cut = self._without_surplus(text)
        return cut if cut.endswith(self.end_tokens) else cut + self.tokenizer.eos_token

    def _without_surplus(self, text: str) -> str:
        return text.rstrip().removesuffix(self.ending.surplus).rstrip()

    def _behind(self, before: str, whole: str, prompt: Sequence[Message], response: Sequence[Message]) -> str:
        """How the template shows the response, where it shows the prompt in another way once the response is there.

        That is fine where it is the system message that it moves: Mistral's templates show it in the last message,
        and only if that is the user's. A model begins to write behind the prompt as it stands alone.
        """
        if self.system_prompt is not None or any(message["role"] == "system" for message in prompt):
            question = {"role": "user", "content": _PROBE}
            start = self._apply([question], generate=True, bare=True)
            answered = self._apply([question, *response], generate=False, bare=True)
            if answered.startswith(start):
                return answered[len(start) :]
        pairs = enumerate(zip(before, whole, strict=False))
        same = next((place for place, (one, other) in pairs if one != other), min(len(before), len(whole)))
        raise TemplateFault(
            f"the template rewrites the prompt once the response follows it: where a model begins to write, the text "
            f"ends with {_short(before[same:])!r}; with the response, it has {_short(whole[same:])!r} there; "
            f"{self._way_out}"
        )

    def _turn(self, messages: Sequence[Message], place: int, text: str) -> Span:
        """The characters in ``text`` of the assistant message at ``place``, before the last one.

        Mistral's templates show system message and tools before the last question, and before no other.
        """
        upto = messages[: place + 1]
        asked = [_without_tools(message) for message in upto]
        alone = [message for message in asked if message["role"] != "system"]
        for shown, bare in ((upto, False), (asked, False), (alone, True)):
            before = self._apply(shown[:-1], generate=True, bare=bare)
            after = self._without_surplus(self._apply(shown, generate=False, bare=bare))
            if len(shown) > 1 and text.startswith(before) and text.startswith(after):
                self._refuse_dropped(text[len(before) : len(after)], [messages[place]], "response")
                return len(before), self._behind_end(text, len(after))
        raise TemplateFault(
            f"the template shows message {place + 1} (assistant), or what stands before it, in another way once "
            f"the conversation goes on; {self._way_out}"
        )

    def _behind_end(self, text: str, place: int) -> int:
        """Where a turn ends whose words end at ``place``: behind the end token that stands there.

        GLM-4 ends an answer with what is the header of the message behind it.
        """
        if text[:place].endswith(self.end_tokens):
            return place
        ends = self.tokenizer.convert_ids_to_tokens(self.end_token_ids)
        return place + next((len(token) for token in ends if text.startswith(token, place)), 0)

    def _refuse_dropped(self, text: str, messages: Sequence[Message], part: str) -> None:
        """Refuse a text that drops messages.

        Raises:
            TemplateFault: if one of ``messages`` is not in ``text``, in their order; a system message may stand
                anywhere.
        """
        place = 0
        for message in messages:
            system, tool = message["role"] == "system", message["role"] == "tool"
            for piece in _pieces(message):
                start = 0 if system else place
                shown = next((form for form in _forms(piece)[: None if tool else 1] if form in text[start:]), None)
                if shown is None:
                    raise TemplateFault(self._dropped(message, piece, part))
                place = place if system else text.index(shown, start) + len(shown)
            for piece in called(message):
                if not any(form in text for form in _forms(piece)):
                    raise TemplateFault(self._dropped(message, piece, part))

    def _refuse_unshown(self, messages: Sequence[Message], *, generate: bool) -> None:
        """Refuse messages that the template shows only by chance.

        Raises:
            TemplateFault: if messages like these are left out, which short texts alone do not tell: they may stand
                in the text by chance.
        """
        roles = tuple(message["role"] for message in messages if not message.get("tool_calls"))
        if len(roles) == len(messages):
            for place in self._left_out(roles, generate):
                message = messages[place]
                if message["content"].strip():
                    raise TemplateFault(self._dropped(message, message["content"].strip(), "conversation"))

    def _refuse_unshown_tools(self, prompt: Sequence[Message], text: str) -> None:
        """Refuse tools that the template does not show.

        Raises:
            TemplateFault: if the ``text`` of the prompt is the same without them, or lacks the name of one.
        """
        tools = tools_of(prompt)
        if not tools:
            return
        names = [tool["function"]["name"] for tool in tools]
        without = [_without_tools(message) for message in prompt]
        unshown = [name for name in names if name not in text]
        if unshown or self._apply(without, generate=True) == text:
            own = getattr(self.tokenizer, "chat_template", None)
            others = [name for name in own if name != "default"] if isinstance(own, dict) else []
            hint = f" (the tokenizer has further ones: {', '.join(others)})" if others else ""
            raise TemplateFault(
                f"the template does not show the tools of the conversation ({', '.join((unshown or names)[:3])}); set "
                f'data.columns.tools="" to leave them out, or {self._way_out}{hint}'
            )

    def _left_out(self, roles: tuple[str, ...], generate: bool) -> tuple[int, ...]:
        """Places of messages that the template does not show, in a conversation with these roles."""
        key = (roles, generate)
        if key not in self._probed:
            texts = [f"{_PROBE}{place}q" for place in range(len(roles))]
            probes = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            try:
                shown = self._apply(probes, generate=generate)
            except TemplateFault:
                shown = "".join(texts)
            unshown = [place for place, text in enumerate(texts) if text not in shown]
            # What a template shows nowhere at all in another place, it moves; see _behind.
            self._probed[key] = tuple(place for place in unshown if generate or roles[place] != "system")
        return self._probed[key]

    def _dropped(self, message: Message, piece: str, part: str) -> str:
        role = message["role"]
        known = known_role(role)
        hint = "" if role in ROLES else f" ({role!r} is none of the roles {', '.join(ROLES)}"
        hint += "" if not hint else f"; did you mean {known}?)" if known else ")"
        thoughts = thoughts_and_answer(message)[0] if role == "assistant" else ""
        way_out = "set data.thoughts=drop, or " if thoughts and piece in thoughts else ""
        way_out += "set data.fold_system=true, or " if role == "system" else ""
        what = "thoughts of the assistant message" if way_out and role == "assistant" else f"{role} message"
        return (
            f"the template drops or rewrites the {part}: the {what} {piece[:40]!r} is not in the rendered text{hint}; "
            f"{way_out}{self._way_out}"
        )

    @functools.cached_property
    def _way_out(self) -> str:
        fitting = fitting_template(self.tokenizer)
        name = "give another data.template"
        if fitting is None or BUILT_IN_TEMPLATES[fitting] == self.template:
            return name
        return f"{name}, such as the built-in {fitting}"

    @functools.cached_property
    def _probed(self) -> dict[tuple[tuple[str, ...], bool], tuple[int, ...]]:
        return {}

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        return marks([*_special(self.tokenizer), *_special_texts(self.tokenizer).values()])

    def _tokenize_in_parts(self, text: str, spans: Sequence[Span]) -> Turns:
        """Tokenize without offsets: a token boundary is forced where a turn begins and where it ends."""
        bounds = [0, *(place for span in spans for place in span), len(text)]
        parts = [
            self.tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
            for begin, end in itertools.pairwise(bounds)
        ]
        places = np.cumsum([len(part) for part in parts])[:-1]
        return np.array([token for part in parts for token in part], np.int32), places.astype(np.int32).reshape(-1, 2)


def chat_format(
    tokenizer: Any, template: str | TemplateChoice | None, stop_token_ids: Sequence[int] = ()
) -> ChatFormat:
    """The format for ``data.template``: Jinja text, a file, a built-in name; ``None``: the tokenizer's own.

    What goes with it becomes part of the template text, so that everybody who renders with it does the same.

    Args:
        tokenizer: of the model.
        template: the setting, alone or with those that go with it.
        stop_token_ids: see :class:`ChatFormat`.
    Raises:
        DataError: if there is no such template. (Jinja that is not valid is reported at the first rendering.)
        ModelError: if the tokenizer lacks tokens that the template or the end of a response needs.
    """
    choice = template if isinstance(template, TemplateChoice) else TemplateChoice(text=template)
    text, origin = template_text(tokenizer, choice.text)
    if not tokenizer.eos_token:
        raise ModelError("the tokenizer has no EOS token: there is nothing to end a response with")
    special = (_special(tokenizer) | set(tokenizer.all_special_tokens)) - {tokenizer.bos_token}
    special |= {tokenizer.eos_token}
    if text == CHATML_TEMPLATE and "<|im_end|>" not in special:
        raise ModelError("data.template=chatml: the tokenizer has no token <|im_end|>")
    needed = NEEDED_TOKENS.get(origin, ())
    missing = [token for token in needed if token not in tokenizer.get_vocab()]
    if missing:
        raise ModelError(f"data.template={origin}: the tokenizer has no token {', '.join(missing)}")
    text = with_settings(text, origin, choice)
    return ChatFormat(tokenizer, text, origin, _wanted_bos(tokenizer), tuple(sorted(special)), tuple(stop_token_ids))


# ------------------------------------------------------------------------------------------------- details

_PROBE = "zqxj"
"""A text that no template writes."""


def _special(tokenizer: Any) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def _pieces(message: Message) -> list[str]:
    """What of a message is to be found in the text, in order."""
    if message["role"] != "assistant":
        return [message["content"].strip()]
    return [piece for piece in thoughts_and_answer(message) if piece]


def _forms(text: str) -> tuple[str, ...]:
    """A text as it is, and as templates show it inside of JSON."""
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def _what_stays(message: Message) -> Message:
    """The end of an earlier answer, behind any mark: templates leave out thoughts, by marks of many kinds."""
    if message["role"] != "assistant":
        return message
    answer = without_thoughts(message)
    return {**answer, "content": re.split(r"[|>\]\n]", answer["content"].strip())[-1]}


def _without_tools(message: Message) -> Message:
    return {key: message[key] for key in message if key != "tools"}


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _wanted_bos(tokenizer: Any) -> str:
    """BOS, or of encoders the token whose state stands for the text, if the tokenizer puts it before any text."""
    first = tokenizer("a")["input_ids"][0]
    for token in (tokenizer.bos_token, getattr(tokenizer, "cls_token", None)):
        if token is not None and tokenizer.convert_tokens_to_ids(token) == first:
            return token
    return ""


def _special_texts(tokenizer: Any) -> dict[str, str]:
    return {name: str(getattr(tokenizer, f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
