"""Requests and answers of a reward server, in vLLM's forms of ``/classify`` and ``/score``."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.messages import ROLES, BadRow, Message, Notices, read_messages, read_tools, tools_of
from rlhf.data.templates import ChatFormat, TemplateFault

PAIRS = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))
"""Names under which ``/score`` takes questions and answers."""
HARMLESS = ("model", "user", "request_id", "priority", "cache_salt", "encoding_format")
"""Keys that change no score."""
TOOLS_KEY = "chat_template_kwargs"
"""Where ``tools`` stand in a request: vLLM knows no other place for them when it classifies."""
OFF = {
    "use_activation": "scores are given as they are, before any activation",
    "truncate_prompt_tokens": "no text is cut",
    "truncation_side": "no text is cut",
    "max_tokens_per_query": "no text is cut",
    "max_tokens_per_doc": "no text is cut",
    "padding": "texts are padded here",
    "chat_template": "the template is the one that the model was trained with",
    TOOLS_KEY: "the template is shown tools, and nothing else",
    "instruction": "the template is the one that the model was trained with",
    "add_generation_prompt": "a reward is of an answer that is there",
    "continue_final_message": "a reward is of an answer that is over",
}
"""Keys of vLLM that may be there with a value that asks for nothing, and why for no other."""


NOT_FINITE = "NotFiniteError"
"""The type of the error where a score is not finite: asking again gives no other."""


class Refusal(Exception):
    """An answer that is none: why, in words, and the status of HTTP."""

    def __init__(self, message: str, status: int = 400, kind: str = "") -> None:
        """``kind``: the type of the error, where the status does not say it all."""
        super().__init__(message)
        self.status, self.kind = status, kind


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Makes tokens of requests."""

    chat: ChatFormat
    names: Sequence[str]
    """Names under which the model is served."""
    vocabulary: int
    """Ids of tokens that the model has."""
    limit: int | None
    """Tokens that it takes; ``None`` for any number."""

    def classify(self, body: Any) -> list[np.ndarray]:
        """The rows of a request to ``/classify``: conversations as messages, whole texts, or token ids.

        Raises:
            Refusal: naming what is wrong.
        """
        self._check(body, ("input", "messages", "add_special_tokens"))
        if ("input" in body) == ("messages" in body):
            raise Refusal("give either input (texts or token ids) or messages (a conversation)")
        if "messages" in body:
            rows = [self._conversation(body["messages"], _tools(body))]
        else:
            rows = self._input(body["input"], body.get("add_special_tokens", True))
        return [self._fitting(row, f"input {place}") for place, row in enumerate(rows)]

    def tokenize(self, body: Any) -> np.ndarray:
        """The row of a request to ``/tokenize``: of a conversation, as ``/classify`` would score it.

        Raises:
            Refusal: naming what is wrong.
        """
        self._check(body, ("messages",))
        return self._fitting(self._conversation(body.get("messages"), _tools(body)), "messages")

    def score(self, body: Any) -> list[np.ndarray]:
        """The rows of a request to ``/score``: each question with its answer.

        Raises:
            Refusal: naming what is wrong.
        """
        self._check(body, tuple(name for pair in PAIRS for name in pair))
        given = {name for pair in PAIRS for name in pair if name in body}
        pair = next((pair for pair in PAIRS if {*pair} == given), None)
        if pair is None:
            ways = " or ".join(" and ".join(names) for names in PAIRS)
            raise Refusal(f"give one of the pairs {ways}: questions and answers, as texts or lists of texts")
        questions, answers = (_texts(body[name], name) for name in pair)
        if len(questions) == 1:
            questions = questions * len(answers)
        if len(questions) != len(answers):
            raise Refusal(
                f"{pair[0]} has {len(questions)} texts and {pair[1]} {len(answers)}: expected one for each, or one "
                f"text in {pair[0]}"
            )
        rows = []
        for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            asked: list[Message] = [{"role": "user", "content": question}]
            rows.append(self._fitting(self._shown(asked, answer), f"{pair[1]}[{place}]"))
        return rows

    def _check(self, body: Any, own: Sequence[str]) -> None:
        if not isinstance(body, Mapping):
            raise Refusal(f"expected an object, found {_kind(body)}")
        for name in body:
            if name == TOOLS_KEY and _has_tools(body):
                continue
            if name in OFF and body[name] not in (None, False, 0, {}):
                raise Refusal(f"{name} = {body[name]!r}: {OFF[name]}; leave it out")
            if name not in OFF and name not in HARMLESS and name not in own:
                raise Refusal(f"{name}: unknown key; there are {', '.join((*own, *HARMLESS))}")
        model = body.get("model")
        if model is not None and model not in self.names:
            raise Refusal(f"model = {model!r}: is not served here; there are {', '.join(self.names)}", 404)

    def _input(self, given: Any, special: Any) -> list[np.ndarray]:
        if not isinstance(special, bool):
            raise Refusal(f"add_special_tokens = {special!r}: expected true or false")
        if isinstance(given, str):
            given = [given]
        if not isinstance(given, list) or not given:
            raise Refusal("input: expected a text, a list of texts, or lists of token ids; not empty")
        if all(isinstance(each, str) for each in given):
            found = self.chat.tokenizer(given, add_special_tokens=special, return_attention_mask=False)["input_ids"]
            return [np.array(row, np.int64) for row in found]
        rows = given if all(isinstance(each, list) for each in given) else [given]
        return [self._ids(row, place) for place, row in enumerate(rows)]

    def _ids(self, row: Any, place: int) -> np.ndarray:
        for token in row:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise Refusal(
                    f"input {place}: {token!r} is no token id of the model, which has 0 to {self.vocabulary - 1}"
                )
        return np.array(row, np.int64)

    def _conversation(self, messages: Any, tools: Sequence[Mapping[str, Any]]) -> np.ndarray:
        if not isinstance(messages, list) or not messages:
            raise Refusal("messages: expected a list of messages, not empty")
        for place, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise Refusal(f"messages[{place}]: expected an object with role and content")
            if message["role"] not in ROLES:
                raise Refusal(f"messages[{place}]: role = {message['role']!r}: expected {', '.join(ROLES)}")
            if not isinstance(message["content"], str):
                raise Refusal(f"messages[{place}]: content: expected a text, found {_kind(message['content'])}")
        if messages[-1]["role"] != "assistant":
            raise Refusal("messages: the last one must be the assistant's: it is what the reward is of")
        try:
            prompt = list(read_messages("messages", messages[:-1], Notices()))
        except BadRow as fault:
            raise Refusal(str(fault)) from fault
        if tools and prompt:
            prompt[0] = {**prompt[0], "tools": tools}
        return self._shown(prompt, messages[-1]["content"])

    def _shown(self, prompt: Sequence[Message], answer: str) -> np.ndarray:
        try:
            ((ids, _),) = self.chat.tokenize([self.chat.render_written(prompt, answer)])
        except TemplateFault as fault:
            raise Refusal(f"the chat template cannot show the conversation: {fault}") from fault
        return ids

    def _fitting(self, row: np.ndarray, name: str) -> np.ndarray:
        if not len(row):
            raise Refusal(f"{name}: has no token")
        if self.limit is not None and len(row) > self.limit:
            raise Refusal(f"{name}: {len(row)} tokens, and the model takes {self.limit}")
        return row


def request_of(conversation: Sequence[Message]) -> dict[str, Any]:
    """A request for a conversation, in the form that vLLM also reads: tools apart, the arguments of calls as JSON."""
    tools = tools_of(conversation)
    messages = [{key: _written(key, value) for key, value in each.items() if key != "tools"} for each in conversation]
    return {"messages": messages, **({TOOLS_KEY: {"tools": tools}} if tools else {})}


def _written(key: str, value: Any) -> Any:
    if key != "tool_calls":
        return value
    calls = [{"id": "", **call, "function": dict(call["function"])} for call in value]
    for call in calls:
        if not isinstance(call["function"]["arguments"], str):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return calls


def _has_tools(body: Mapping[str, Any]) -> bool:
    """Whether a conversation comes with tools, and nothing else for the template."""
    given = body[TOOLS_KEY]
    return "messages" in body and isinstance(given, Mapping) and {*given} == {"tools"}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        return read_tools(f"{TOOLS_KEY}.tools", (body.get(TOOLS_KEY) or {}).get("tools") or [])
    except BadRow as fault:
        raise Refusal(str(fault)) from fault


def classification(model: str, scores: Sequence[float], tokens: int) -> dict[str, Any]:
    """The answer of ``/classify``: each score is the one entry of ``probs``, as it is."""
    data = [
        {"index": place, "label": "LABEL_0", "probs": [score], "num_classes": 1} for place, score in enumerate(scores)
    ]
    return _answer("classify", model, data, tokens)


def scored(model: str, scores: Sequence[float], tokens: int) -> dict[str, Any]:
    """The answer of ``/score``."""
    return _answer(
        "score",
        model,
        [{"index": place, "object": "score", "score": each} for place, each in enumerate(scores)],
        tokens,
    )


def tokenized(row: np.ndarray, limit: int | None) -> dict[str, Any]:
    """The answer of ``/tokenize``."""
    return {"count": len(row), "max_model_len": limit, "tokens": row.tolist(), "token_strs": None}


def fault(message: str, status: int, kind: str = "") -> dict[str, Any]:
    """The body of an answer that is none; ``kind`` as that of a :class:`Refusal`."""
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
    kind = kind or kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def models(names: Sequence[str], root: str, limit: int | None, since: int) -> dict[str, Any]:
    """The answer of ``/v1/models``."""
    one = {"object": "model", "created": since, "owned_by": "margin-rlhf", "root": root, "parent": None}
    return {"object": "list", "data": [{"id": name, **one, "max_model_len": limit} for name in names]}


def _answer(kind: str, model: str, data: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    return {
        "id": f"{kind}-{secrets.token_hex(16)}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


def _texts(given: Any, name: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
        raise Refusal(f"{name}: expected a text or a list of texts, not empty")
    return texts


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
