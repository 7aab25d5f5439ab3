"""Answers from recipe to file: questions are shared out over ranks, and what is answered is kept at once."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from policy.answers.config import GenerateConfig
from policy.answers.formats import Answer, Question, file_of, format_of, read_question, written
from policy.evaluation.compare import check_model_folders, open_policy
from policy.evaluation.options import SamplingSettings
from policy.evaluation.sampling import Sample, draw
from policy.generation.api import row_seed
from policy.generation.vllm.training import Engines, engines_of
from rlhf.config import to_dict
from rlhf.core.errors import ConfigError, DataError
from rlhf.core.files import digest, file_checksum, whole_lines, write_text
from rlhf.data.options import TemplateChoice
from rlhf.data.plain_rows import plain_rows
from rlhf.data.templates import ChatFormat, TemplateFault
from rlhf.engine.build import DTYPES, check_precision, precision_of
from rlhf.engine.frozen import Frozen
from rlhf.engine.options import EngineConfig
from rlhf.engine.ranks import Ranks
from rlhf.models.backbones import hide_loading_bars, weights_digest
from rlhf.models.options import BackboneConfig
from rlhf.models.stops import model_stop_tokens
from rlhf.train.chat import load_chat
from rlhf.train.progress import Progress

KEPT = "answers.jsonl"
"""What is answered so far, in the output folder: a first line that says by what, then a line for each turn."""

BATCHES_OF_ENGINES = 8
"""Engines begin with a row whenever another one ends: the more rows they have, the less they wait for the last ones."""

Place = tuple[int, int, int]
"""Question, sample, turn."""


def generate(config: GenerateConfig, ranks: Ranks) -> Path:
    """Answer all questions and write them in their format; every rank must call it.

    A run that was stopped goes on behind the last answer that it has kept.

    Returns:
        The file of answers.
    Raises:
        DataError: if there is no question, a row is of another format, or the template cannot show it.
        ModelError: if the folder holds no language model.
        ConfigError: if the output folder holds answers of another model, other questions or other settings.
    """
    hide_loading_bars()
    engine = EngineConfig(precision=config.precision)
    check_precision(engine, ranks.device, "precision")
    check_model_folders([config.model])
    chat = ranks.together(lambda: _chat(config))
    kind, questions = ranks.together(lambda: read_questions(config.prompts, config.format))
    questions = [_with_system(question, config.system_prompt) for question in questions]
    ranks.together(lambda: _check(kind, questions, chat, config.sampling))
    kept = _Kept(config, ranks)
    turns = sum(1 + len(question.further) for question in questions) * config.sampling.samples
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(ranks, turns, len(kept.answers), "answer"))
        model: Frozen | None = None
        engines: Engines | None = None
        for turn in range(max(1 + len(question.further) for question in questions)):
            for settings, places in _jobs(config, questions, turn, kept):
                if model is None:
                    model = open_policy(config.model, DTYPES[precision_of(engine)], ranks)
                    engines = stack.enter_context(engines_of(model, chat, config.sampling, config.output / "vllm"))
                _answer(model, chat, questions, places, settings, kept, progress, engines)
    name = config.name or name_of(config.model)
    target = config.output / file_of(kind, name)
    samples = [
        [[kept.answers[place, sample, turn] for turn in range(1 + len(question.further))]
         for sample in range(config.sampling.samples)]
        for place, question in enumerate(questions)
    ]  # fmt: skip
    ranks.on_main(lambda: write_text(target, written(kind, questions, samples, name, time.time())))
    return target


def name_of(model: Path) -> str:
    """What a policy is called by its folder: that of the run, where it is the final/ of one."""
    folder = model.resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def read_questions(path: Path, kind: str) -> tuple[str, list[Question]]:
    """The format of a file, and its questions.

    Args:
        path: of the file.
        kind: one of :data:`policy.answers.config.FORMATS`, or auto.
    Raises:
        DataError: naming file and line of a row that is not of that format.
    """
    questions: list[Question] = []
    for place, row in plain_rows(path):
        if kind == "auto":
            kind = format_of(row) if isinstance(row, dict) else "prompts"
        questions.append(read_question(kind, row, place))
    if not questions:
        raise DataError(f"{path}: there are no questions")
    return kind, questions


class _Kept:
    """The answers so far, on every rank; the main one keeps them in a file."""

    def __init__(self, config: GenerateConfig, ranks: Ranks) -> None:
        self._path, self._ranks = config.output / KEPT, ranks
        settings = {**to_dict(config), "output": None, "name": None}
        settings["sampling"] = {**settings["sampling"], "batch_rows": None, "cuda_graphs": None, "vllm": None}
        parts = json.dumps(settings, sort_keys=True, default=str), str(file_checksum(config.prompts))
        identity = ranks.on_main(lambda: digest(*parts, weights_digest(BackboneConfig(path=str(config.model)))))
        self.answers: dict[Place, Answer] = ranks.on_main(lambda: self._read(identity))

    def _read(self, identity: str) -> dict[Place, Answer]:
        if not self._path.exists():
            write_text(self._path, json.dumps({"answers_of": identity}) + "\n")
            return {}
        first, *lines = whole_lines(self._path) or ["{}"]
        if json.loads(first).get("answers_of") != identity:
            raise ConfigError(
                f"{self._path}: holds answers of another model, to other questions or by other settings; "
                "give another output, or delete it to begin anew"
            )
        rows = map(json.loads, lines)
        return {tuple(row.pop("place")): Answer(**row) for row in rows}

    def add(self, found: dict[Place, Answer]) -> None:
        """Keep the answers of this rank; every rank must call it."""
        of_all: dict[Place, Answer] = {}
        for part in self._ranks.gather_objects(found):
            of_all |= part
        self.answers |= of_all
        lines = [json.dumps({"place": place, **asdict(of_all[place])}, ensure_ascii=False) for place in sorted(of_all)]

        def append() -> None:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write("".join(line + "\n" for line in lines))

        self._ranks.on_main(append)

    def turns_before(self, place: Place) -> list[str]:
        """What the policy has said before this turn."""
        question, sample, turn = place
        return [self.answers[question, sample, earlier].text for earlier in range(turn)]


def _jobs(
    config: GenerateConfig, questions: Sequence[Question], turn: int, kept: _Kept
) -> list[tuple[SamplingSettings, list[Place]]]:
    """What is not answered of a turn, by the settings that it is drawn by."""
    found: dict[SamplingSettings, list[Place]] = {}
    for number, question in enumerate(questions):
        if turn > len(question.further):
            continue
        settings = config.sampling
        if config.category_temperatures and question.temperature is not None:
            greedy = question.temperature == 0
            settings = replace(settings, **({"top_k": 1} if greedy else {"temperature": question.temperature}))
        places = [(number, sample, turn) for sample in range(config.sampling.samples)]
        found.setdefault(settings, []).extend(place for place in places if place not in kept.answers)
    return [(settings, places) for settings, places in found.items() if places]


def _answer(
    model: Frozen,
    chat: ChatFormat,
    questions: Sequence[Question],
    places: Sequence[Place],
    settings: SamplingSettings,
    kept: _Kept,
    progress: Progress,
    engines: Engines | None,
) -> None:
    """Answer these turns, a few batches at a time."""
    ranks = model.ranks
    at_once = settings.batch_rows * ranks.world_size * (1 if engines is None else BATCHES_OF_ENGINES)
    for start in range(0, len(places), at_once):
        part = places[start : start + at_once]
        mine = part[ranks.rank :: ranks.world_size]
        asked = [questions[place[0]].asked(kept.turns_before(place)) for place in mine]
        seeds = [_seed(settings.seed, place) for place in mine]
        drawing: Callable[[], list[Sample]] = functools.partial(
            draw, model, chat, asked, seeds, settings, engines=engines
        )
        if not mine and engines is None:
            drawing = list[Sample]
        drawn = ranks.together(drawing)
        found = {
            place: Answer(text=each.text, tokens=int(each.row.response.sum()), ended=each.ended)
            for place, each in zip(mine, drawn, strict=True)
        }
        kept.add(found)
        progress.advance(len(part), {})


def _seed(seed: int, place: Place) -> int:
    """The seed of a turn; that of the first one as in an evaluation with the same seed, so that both draw the same."""
    question, sample, turn = place
    return row_seed(seed, question, sample) if turn == 0 else row_seed(seed, question, sample, "turn", turn)


def _chat(config: GenerateConfig) -> ChatFormat:
    choice = TemplateChoice(text=config.template, options=config.template_options, fold_system=config.fold_system)
    chat = load_chat(config.model, choice)
    return replace(chat, stop_token_ids=model_stop_tokens(config.model, chat.tokenizer))


def _with_system(question: Question, text: str | None) -> Question:
    if text is None or question.opening[0]["role"] == "system":
        return question
    return replace(question, opening=({"role": "system", "content": text}, *question.opening))


def _check(kind: str, questions: Sequence[Question], chat: ChatFormat, sampling: SamplingSettings) -> None:
    """Refuse what cannot be asked or written, before anything takes time."""
    written(kind, questions, [[[_UNSAID] * (1 + len(each.further))] * sampling.samples for each in questions], "", 0.0)
    for question in questions:
        try:
            chat.render_prompt(question.asked(["..."] * len(question.further)))
        except TemplateFault as fault:
            raise DataError(f"{question.place}: {fault}") from fault


_UNSAID: Any = Answer(text="", tokens=0, ended=False)
