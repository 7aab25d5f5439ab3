"""The messages of a conversation as files have them: roles and keys by many names, texts, thoughts, tool calls."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
"""The keys role and content, both texts; and ``reasoning_content`` (text), ``tool_calls`` (a list of calls), ``name``
and ``tool_call_id`` where a message has them. One message of a prompt may carry ``tools``: what the assistant may
call, a list of descriptions of functions."""

Asked = str | Sequence[Message]
"""A prompt: the text of a user, or a conversation that ends with a message of one."""

ROLES = ("system", "user", "assistant", "tool")
"""The roles that chat templates know."""

ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""What other formats call the roles; ``function_call`` is an assistant message that is a call."""

_CALL_ROLES = ("function_call", "tool_call")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_THINK, _THINK_END = "<think>", "</think>"
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class BadRow(Exception):
    """A row that cannot be used: ``reason`` is one of few, to be counted, ``detail`` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Notices:
    """What a row had that a reader of the report should know, though it can be used."""

    def __init__(self) -> None:
        self.notes: dict[str, None] = {}
        """Sentences for the report, each of which begins with ``note:`` or ``warning:``."""
        self.unread: dict[str, None] = {}
        """Columns, or keys of messages, that hold something and were not read."""


def read_messages(name: str, entries: Sequence[Any], notices: Notices) -> tuple[Message, ...]:
    """The messages in a list of objects, which say ``role`` and ``content`` or, as ShareGPT, ``from`` and ``value``.

    Raises:
        BadRow: if an entry is no such object, or holds anything but text.
    """
    return tuple(_message(f"{name}[{place}]", entry, notices) for place, entry in enumerate(entries))


def human_assistant_turns(text: str) -> tuple[Message, ...]:
    """The turns of an Anthropic HH text; none if it does not begin with ``Human:``."""
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip() or pieces[1] != "Human":
        return ()
    return tuple(
        {"role": _SPEAKERS[name], "content": content.strip()}
        for name, content in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def known_role(role: str) -> str | None:
    """The role that chat templates know by another name; ``None`` if there is none."""
    plain = role.strip().lower()
    return plain if plain in ROLES else ALIASES.get(plain)


def thoughts_and_answer(message: Message) -> tuple[str, str]:
    """What an assistant thought before it answered, and the answer; both without white space around them."""
    content, apart = message["content"], message.get("reasoning_content", "")
    if not apart and _THINK_END in content:
        before, _, after = content.partition(_THINK_END)
        if before.lstrip().startswith(_THINK) or _THINK not in content:
            return before.strip().removeprefix(_THINK).strip(), after.strip()
    return apart.strip(), content.strip()


def without_thoughts(message: Message) -> Message:
    """The message with its answer alone; the very same one if an assistant said nothing but an answer."""
    thoughts, answer = thoughts_and_answer(message) if message["role"] == "assistant" else ("", "")
    if not thoughts and _THINK_END not in message["content"]:
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**kept, "content": answer}


def called(message: Message) -> Iterator[str]:
    """All that a message says in its tool calls: names of functions, and names and texts of arguments."""
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from _texts_in(call["function"]["arguments"])


def as_messages(asked: Asked) -> Sequence[Message]:
    return ({"role": "user", "content": asked},) if isinstance(asked, str) else asked


def last_text(asked: Asked) -> str:
    """What was said last."""
    return asked if isinstance(asked, str) else asked[-1]["content"]


def read_tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Descriptions of functions as templates expect them, from a list of them or the JSON text of one.

    Raises:
        BadRow: if that is not what ``value`` is.
    """
    entries = _parsed_object(value)
    if not isinstance(entries, list):
        raise BadRow("wrong type", f"{name} is {described(value)}, expected a list of functions, or its JSON text")
    return [_tool(f"{name}[{place}]", entry) for place, entry in enumerate(entries)]


def tools_of(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """What the assistant of a conversation may call; nothing where no message says so."""
    return next((message["tools"] for message in messages if message.get("tools")), [])


def described(value: Any) -> str:
    """A value by its kind, for messages."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"a number ({value})"
    names = {str: "text", list: "a list", dict: "an object", bool: "a truth value", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _message(place: str, entry: Any, notices: Notices) -> Message:
    if not isinstance(entry, Mapping):
        raise BadRow("wrong type", f"{place} is {described(entry)}, expected role and content")
    role_key = "role" if entry.get("role") is not None or "from" not in entry else "from"
    content_key = "content" if entry.get("content") is not None or "value" not in entry else "value"
    role = entry.get(role_key)
    if not isinstance(role, str):
        raise BadRow("wrong type", f"{place}.{role_key} is {described(role)}, expected text")
    plain = role.strip().lower()
    calls = _tool_calls(place, entry, plain, content_key)
    reasoning_key = next((key for key in _REASONING_KEYS if isinstance(entry.get(key), str) and entry[key].strip()), "")
    message: dict[str, Any] = {"role": _read_role(role, plain, notices), "content": ""}
    if plain not in _CALL_ROLES:
        optional = bool(calls) or bool(reasoning_key) or message["role"] == "tool"
        message["content"] = _text(f"{place}.{content_key}", entry.get(content_key), optional)
    if reasoning_key:
        message["reasoning_content"] = entry[reasoning_key]
    if calls:
        message["tool_calls"] = calls
    kept = {"name", "tool_call_id"} if message["role"] == "tool" else set()
    message |= {key: entry[key] for key in sorted(kept & entry.keys()) if entry[key] is not None}
    if message["role"] == "system" and holds(entry.get("tools")):
        message["tools"] = read_tools(f"{place}.tools", entry["tools"])
        kept.add("tools")
    read = {role_key, content_key, reasoning_key, "tool_calls", "function_call", *kept}
    notices.unread |= {f"{key} of messages": None for key in entry if key not in read and holds(entry[key])}
    return message


def _read_role(role: str, plain: str, notices: Notices) -> str:
    known = "assistant" if plain in _CALL_ROLES else known_role(role)
    if known is None:
        notices.notes[f"warning: the role {role!r} is none of {', '.join(ROLES)}"] = None
        return role
    if known != role:
        notices.notes[f"note: the role {role!r} is read as {known!r}"] = None
    return known


def _text(place: str, value: Any, may_be_empty: bool) -> str:
    """Text, or the texts of its parts."""
    if value is None and may_be_empty:
        return ""
    if isinstance(value, Mapping) and may_be_empty:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple) and value:
        return "".join(_part(f"{place}[{number}]", part) for number, part in enumerate(value))
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{place} is {described(value)}, expected text")
    return value


def _part(place: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type") in ("text", None):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else described(part)
    raise BadRow("not text", f"{place} is {kind}; only parts of text can be read")


def _tool_calls(place: str, entry: Mapping[str, Any], role: str, content_key: str) -> list[dict[str, Any]]:
    if role in _CALL_ROLES:
        found = entry.get(content_key)
        calls = _parsed_object(found)
        if calls is None:
            raise BadRow("wrong type", f"{place} is a call, but its {content_key} is no JSON object with a name")
        calls = calls if isinstance(calls, list) else [calls]
    else:
        single = entry.get("function_call")
        calls = entry.get("tool_calls") or ([single] if single else [])
    if not isinstance(calls, list | tuple):
        raise BadRow("wrong type", f"{place}.tool_calls is {described(calls)}, expected a list of calls")
    return [_call(f"{place}.tool_calls[{number}]", call) for number, call in enumerate(calls)]


def _call(place: str, call: Any) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow("wrong type", f"{place} is no call: expected a function with name and arguments")
    arguments = function.get("arguments")
    parsed = {} if arguments is None else _parsed_object(arguments)
    arguments = arguments if parsed is None else parsed
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(place: str, entry: Any) -> dict[str, Any]:
    parsed = _parsed_object(entry)
    function = parsed.get("function", parsed) if isinstance(parsed, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(
            "wrong type", f"{place} is {described(entry)}, expected a function with a name"
        )
    return parsed if "function" in parsed else {"type": "function", "function": function}


def _parsed_object(value: Any) -> Any:
    """An object or a list, given as such or as JSON; ``None`` for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict | list) else None


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)
    elif isinstance(value, str):
        yield value


def holds(value: Any) -> bool:
    """Whether there is anything in a cell that somebody might miss."""
    return value is not None and value != "" and value != []
