"""Rewards as functions of answers: a Python function that a recipe names, or a reward model, here or served.

A Python function gets two lists, one entry for each response, and by name whatever else its parameters ask for::

    def reward(prompts, responses, *, answer):
        return [float(text.strip() == right) for text, right in zip(responses, answer)]

``answer`` is a column of the rows that the prompts come from.
"""

import asyncio
import atexit
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.core.errors import ConfigError, DataError, UserError
from rlhf.core.servers import CONCURRENCY, TIMEOUT_SECONDS
from rlhf.data.messages import Asked, as_messages, last_text

if TYPE_CHECKING:
    from reward.serving.client import RewardServers

TOKENS_AT_ONCE = 8192
KNOWN = ("messages", "token_ids", "ended")
"""What functions may ask for by name, beside the columns of the rows."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """N responses to be judged, and what a judge may know of each: lists of N, in one order."""

    prompts: Sequence[Asked]
    responses: Sequence[str]
    token_ids: Sequence[Sequence[int]] | None
    """Tokens of the responses, the end token included where there is one; ``None`` where only texts are known."""
    ended: Sequence[bool]
    """Whether the model ended the response, rather than the limit."""
    columns: Sequence[Mapping[str, Any]]
    """The columns of the rows that the prompts come from, without what the prompts are made of."""

    def __len__(self) -> int:
        return len(self.responses)

    def at(self, place: int) -> "Answers":
        """One of them alone, with the columns of all."""
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        one: dict[str, Any] = {name: None if part is None else [part[place]] for name, part in parts.items()}
        return Answers(**one | {"columns": [{**dict.fromkeys(self.names), **self.columns[place]}]})

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The columns that one of the rows has at least."""
        return tuple(dict.fromkeys(name for row in self.columns for name in row))


RewardFunction = Callable[[Answers], Sequence[float | None]]
"""One reward for each answer, in their order; ``None`` for one that it has no word on."""


@dataclass(frozen=True)
class Failure:
    """What came of an answer in the place of a reward."""

    what: str


@dataclass(frozen=True)
class PythonReward:
    """A user's function, called with what its parameters ask for. A RewardFunction.

    Attributes:
        spec: where it was found.
        function: gets what users said last and the responses, as two lists of texts, and by name: ``messages`` (lists
            of the whole conversations), ``token_ids``, ``ended``, ``options``, and columns of the rows. Where it is
            asynchronous, it is called for every answer by itself, with lists of one.
        options: of the recipe: further arguments, by name.
        columns: the column that a parameter stands for, where the two have different names.
        timeout_seconds: that one call of an asynchronous function may take.
        concurrency: calls of an asynchronous function that run at one time.
        known: columns that rows of the data have; a row without one of these has ``None`` there.
    """

    spec: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: float = TIMEOUT_SECONDS
    concurrency: int = CONCURRENCY
    known: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse options that the function does not know.

        Raises:
            ConfigError: naming the first one.
        """
        for name in (*self.options, *self.columns):
            if name not in self._by_name and not self._takes_all:
                known = ", ".join(self._by_name) or "none besides the two lists"
                raise ConfigError(f"reward {self.spec}: it has no parameter {name!r} to set; there are: {known}")

    def reading(self, prompts: Sequence[Asked], columns: Sequence[Mapping[str, Any]]) -> "PythonReward":
        """The same function for answers to these prompts, or to others with such columns.

        Raises:
            ConfigError: if no row has a column that it needs.
        """
        there = tuple(dict.fromkeys(name for row in columns for name in row))
        self._refuse_without(there)
        return replace(self, known=tuple(dict.fromkeys((*self.known, *there))))

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Columns that it cannot do without."""
        given = {*KNOWN, *self.options}
        own = [name for name, optional in self._by_name.items() if not optional and name not in given]
        return tuple(dict.fromkeys((*(self.columns.get(name, name) for name in own), *self.columns.values())))

    def __call__(self, answers: Answers) -> list[float | None]:
        """Ask about all answers.

        Raises:
            DataError: if the function fails, or does not give one number or ``None`` for each.
            ConfigError: if no row has a column that it needs.
        """
        if self._is_async:
            found = self.each(answers)
            failed = next((each.what for each in found if isinstance(each, Failure)), None)
            if failed is not None:
                raise DataError(self._complaint(answers, failed))
            return [each for each in found if not isinstance(each, Failure)]
        try:
            return self._numbers(self._call(answers), answers)
        except UserError:
            raise
        except Exception as error:
            raise DataError(self._complaint(answers, _in_words(error))) from error

    def each(self, answers: Answers) -> list[float | Failure | None]:
        """Ask about all answers; where that fails, about each by itself.

        Raises:
            DataError: if the function does not give one number or ``None`` for each.
            ConfigError: if no row has a column that it needs.
        """
        if self._is_async:
            return _runner().run(self._all_at_once(answers))
        try:
            return [*self._numbers(self._call(answers), answers)]
        except UserError:
            raise
        except Exception as error:
            if len(answers) == 1:
                return [Failure(_in_words(error))]
        return [self.each(answers.at(place))[0] for place in range(len(answers))]

    async def _all_at_once(self, answers: Answers) -> list[float | Failure | None]:
        gate = asyncio.Semaphore(self.concurrency)

        async def ask(answer: Answers) -> float | Failure | None:
            async with gate:
                try:
                    given = await asyncio.wait_for(self._call(answer), self.timeout_seconds)
                    return self._numbers(given, answer)[0]
                except UserError:
                    raise
                except TimeoutError:
                    return Failure(f"no answer within {self.timeout_seconds:g} s")
                except Exception as error:
                    return Failure(_in_words(error))

        return await asyncio.gather(*(ask(answers.at(place)) for place in range(len(answers))))

    def _call(self, answers: Answers) -> Any:
        known = {"messages": [as_messages(prompt) for prompt in answers.prompts], "ended": answers.ended}
        if answers.token_ids is not None:
            known["token_ids"] = answers.token_ids
        elif self._by_name.get("token_ids") is False:
            raise ConfigError(f"the reward function {self.spec} asks for token_ids, and here only texts are known")
        there = tuple(dict.fromkeys((*self.known, *answers.names)))
        self._refuse_without(there)
        columns = {name: [row.get(name) for row in answers.columns] for name in there}
        renamed = {name: columns[column] for name, column in self.columns.items()}
        given = {**columns, **renamed, **known, **self.options}
        wanted = given if self._takes_all else {name: given[name] for name in self._by_name if name in given}
        return self.function([last_text(prompt) for prompt in answers.prompts], answers.responses, **wanted)

    def _numbers(self, given: Any, answers: Answers) -> list[float | None]:
        values = [None if value is None else float(value) for value in given]
        if len(values) != len(answers):
            raise DataError(
                f"the reward function {self.spec} gave {len(values)} scores for {len(answers)} responses; "
                "expected one number (or None) for each, in their order"
            )
        return values

    def _refuse_without(self, there: Sequence[str]) -> None:
        for name in self.needs:
            if name not in there:
                found = ", ".join(there) or "none beside the prompt"
                raise ConfigError(
                    f"the reward function {self.spec} asks for {name!r}, and the rows have no such column; there are: "
                    f"{found}"
                )

    def _complaint(self, answers: Answers, what: str) -> str:
        return f"the reward function {self.spec} failed on {len(answers)} responses: {what}"

    @cached_property
    def _is_async(self) -> bool:
        called = getattr(self.function, "__call__", None)  # noqa: B004
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(called)

    @cached_property
    def _by_name(self) -> dict[str, bool]:
        """The parameters behind the two lists, and whether each may be left out."""
        named = [each for each in self._parameters[2:] if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        return {each.name: each.default is not each.empty for each in named}

    @cached_property
    def _takes_all(self) -> bool:
        return any(each.kind is each.VAR_KEYWORD for each in self._parameters)

    @cached_property
    def _parameters(self) -> list[inspect.Parameter]:
        try:
            return list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # builtins have none to show
            return []


@dataclass(frozen=True)
class ModelReward:
    """The published reward model in a folder. A RewardFunction; it is loaded when it is asked, and no sooner."""

    folder: Path

    def reading(self, prompts: Sequence[Asked], columns: Sequence[Mapping[str, Any]]) -> "ModelReward":
        """Itself, if its chat template can show these prompts.

        Raises:
            DataError: naming the first one that it cannot show.
        """
        from reward.score import check_scorer  # it loads Transformers: a function needs none
        from rlhf.data.templates import TemplateFault

        chat = check_scorer(self.folder)
        for number, prompt in enumerate(prompts, start=1):
            try:
                chat.render_prompt(as_messages(prompt))
            except TemplateFault as fault:
                raise DataError(f"{self.folder}: its chat template cannot show prompt {number}: {fault}") from fault
        return self

    def __call__(self, answers: Answers) -> list[float]:
        from reward.score import load_scorer, score_tokens

        model, chat = load_scorer(self.folder)  # now: what is judged may have needed the memory until here
        asked = map(as_messages, answers.prompts)
        rendered = [chat.render_written(*each) for each in zip(asked, answers.responses, strict=True)]
        rows = [tokens for tokens, _ in chat.tokenize(rendered)]
        return score_tokens(model, rows, batch_tokens=TOKENS_AT_ONCE)


@dataclass(frozen=True)
class ServedReward:
    """A reward model behind one or several addresses. A RewardFunction."""

    servers: "RewardServers"

    def reading(self, prompts: Sequence[Asked], columns: Sequence[Mapping[str, Any]]) -> "ServedReward":
        """Itself, if the chat template of the served model can show these prompts.

        Raises:
            DataError: naming the first one that it cannot show.
            ModelError: if a server cannot be asked.
        """
        for place, why in self.servers.refusals([as_messages(prompt) for prompt in prompts]).items():
            raise DataError(f"{self.servers.urls[0]}: prompt {place + 1}: {why}")
        return self

    def __call__(self, answers: Answers) -> list[float]:
        asked = zip(answers.prompts, answers.responses, strict=True)
        return self.servers.score_conversations(
            [[*as_messages(prompt), {"role": "assistant", "content": text}] for prompt, text in asked]
        )


def served_cards(**rewards: Any) -> dict[str, dict[str, str]]:
    """The cards of those rewards that are served, by the names given here, for findings; nothing where none is."""
    cards = {name: str(each.servers.card) for name, each in rewards.items() if isinstance(each, ServedReward)}
    return {"served": cards} if cards else {}


def load_reward(spec: str) -> PythonReward | ModelReward | ServedReward:
    """The function behind ``module:function``, the reward model in a folder, or that of servers.

    Addresses of several servers of one model stand with commas between them.

    Raises:
        ConfigError: if there is no such function.
        ModelError: if the folder holds no reward model, or a server cannot be asked.
    """
    if spec.startswith(("http://", "https://")):
        from reward.serving.client import RewardServers

        servers = RewardServers(spec.split(","))
        _ = servers.card
        return ServedReward(servers)
    if not Path(spec).is_dir():
        return load_function(spec)
    from reward.score import check_scorer

    check_scorer(Path(spec))
    return ModelReward(Path(spec))


def load_function(spec: str, **settings: Any) -> PythonReward:
    """The function behind ``module:function``, with the ``settings`` of a :class:`PythonReward`.

    Raises:
        ConfigError: if there is no such function, or it does not know one of its options or columns.
    """
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code
        raise ConfigError(
            f"reward {spec}: expected module:function, such as launch.quickstart.gold:gold_reward, the folder of a "
            f"reward model, or the address of a server of one ({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise ConfigError(f"reward {spec}: expected a function, found a {type(function).__name__}")
    return PythonReward(spec, function, **settings)


@cache
def _runner() -> asyncio.Runner:
    """One event loop for all calls of this process: clients that functions keep open belong to that of the first."""
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
