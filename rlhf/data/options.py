"""What a recipe says about its data: preference pairs, single rows, or prompts alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Lt

from rlhf.core.annotations import NoResult


@dataclass(frozen=True, kw_only=True)
class ColumnConfig:
    """Names of the columns. Unset: the usual name, where rows have it. Empty: ignore such a column."""

    prompt: str | None = None
    """Text or messages before the answers (usual name: prompt). Rows without it hold whole conversations."""
    input: str | None = None
    """A text that belongs to a prompt given as text, and follows it after an empty line (Alpaca's input)."""
    system: str | None = None
    """The text of a system message in front of the prompt (Orca's system)."""
    tools: str | None = None
    """What the assistant may call: a list of descriptions of functions, or its JSON text (usual names: tools,
    functions). The template has to show them."""
    chosen: str | None = None
    """The preferred answer, or the whole conversation that ends with it (usual names: chosen, chosen_response)."""
    rejected: str | None = None
    """The other answer, or the whole conversation that ends with it (usual names: rejected, rejected_response)."""
    response: str | None = None
    """The one answer of rows that are no pairs, for scoring, or the whole conversation (usual name: response)."""
    better: str | None = None
    """Which of the two answers is the preferred one, where rows do not have them in order: 0 for that in the column
    of chosen, 1 for that of rejected; or a or b, or the name of its column (PKU-SafeRLHF's better_response_id)."""
    strength: str | None = None
    """The same as a signed number, below 0 where that in the column of chosen is better; 0 is a tie, and left out. Its
    size is the margin of rows that have no other (HelpSteer's preference_strength, overall_preference)."""
    answers: str | None = None
    """A list of rated answers, each an object with a text and a score or rank, in place of chosen and rejected: the
    best makes a pair with every worse one (usual names: answers, completions; as in Nectar and UltraFeedback)."""
    group: str | None = None
    """What kind of pair a row is (RewardBench's subset); ``rlhf score`` writes it beside each reward."""
    margin: str | None = None
    """How much better chosen is, a number (usual name: margin)."""
    chosen_score: str | None = None
    """A judge's score of chosen (usual names: chosen_score, score_chosen, chosen_rating, chosen-rating,
    chosen_avg_rating); needs the other score too."""
    rejected_score: str | None = None
    """A judge's score of rejected (usual names: rejected_score, score_rejected, and so on)."""
    wrong: str | None = None
    """How likely it is that chosen is not the better one, from 0 to 1 (usual name: audit_wrong). Read by labels."""


@dataclass(frozen=True, kw_only=True)
class ExampleColumns:
    """Names of the columns. Unset: the usual name, where rows have it. Empty: ignore such a column."""

    messages: str | None = None
    """A whole conversation; every assistant message in it is learned (usual names: messages, conversations). Rows
    without it have a completion. Not for rows with labels."""
    prompt: str | None = None
    """Text or messages before the completion (usual name: prompt). Rows without it hold whole conversations."""
    input: str | None = None
    """A text that belongs to a prompt given as text, and follows it after an empty line (Alpaca's input)."""
    system: str | None = None
    """The text of a system message in front of the conversation (Orca's system)."""
    tools: str | None = None
    """What the assistant may call: a list of descriptions of functions, or its JSON text (usual names: tools,
    functions). The template has to show them."""
    completion: str | None = None
    """The answer, or the whole conversation that ends with it (usual names: completion, response). Assistant
    messages of the prompt are not learned."""
    label: str | None = None
    """Whether the completion is a desirable one: true or false, 1 or 0 (usual name: label)."""


@dataclass(frozen=True, kw_only=True)
class PromptColumns:
    """Names of the columns. Unset: the usual name, where rows have it. Empty: ignore such a column.

    The first of prompt, messages and chosen that a row has is read.
    """

    prompt: str | None = None
    """Text, or messages that end with one of the user (usual name: prompt)."""
    input: str | None = None
    """A text that belongs to a prompt given as text, and follows it after an empty line (Alpaca's input)."""
    system: str | None = None
    """The text of a system message in front of the prompt (Orca's system)."""
    tools: str | None = None
    """What the assistant may call: a list of descriptions of functions, or its JSON text (usual names: tools,
    functions). The template has to show them."""
    messages: str | None = None
    """A conversation; the prompt is what stands up to the last user message (usual names: messages, conversations)."""
    chosen: str | None = None
    """A whole conversation; what it shares with rejected is the prompt (usual name: chosen)."""
    rejected: str | None = None
    """The other whole conversation; without one, chosen is read like messages (usual name: rejected)."""


Columns = ColumnConfig | ExampleColumns | PromptColumns


@dataclass(frozen=True, kw_only=True)
class TemplateChoice:
    """A chat template with the settings that become part of it."""

    text: str | None = None
    """The recipe's ``data.template``."""
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    """The recipe's ``data.template_options``."""
    fold_system: bool = False
    """The recipe's ``data.fold_system``."""
    system_prompt: str | None = None
    """The recipe's ``data.system_prompt``."""
    drop_thoughts: bool = False
    """Whether the recipe's ``data.thoughts`` is drop."""


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """One source of rows."""

    path: str
    """A jsonl, json, csv or tsv file (each also .gz, .bz2, .xz or .zst), a parquet or arrow file, a folder of them or
    one written by save_to_disk, a glob, or a dataset on the hub."""
    weight: Annotated[float, Gt(0)] = 1.0
    """How often each row appears per epoch: 2 doubles the source, 0.5 keeps a seeded half of its rows, 1.5
    repeats a seeded half. Only for training sources."""
    split: str | None = None
    """Which split of a hub dataset, of a saved dataset dictionary, or of a folder whose files name it, by its whole
    name (train_prefs is not train). Unset: train, or the only one that begins so."""
    subset: str | None = None
    """Configuration name of a hub dataset."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig(RowSource):
    """One source of preference pairs."""

    columns: ColumnConfig | None = None
    """Column names of this source; unset: data.columns."""


SourceT = TypeVar("SourceT", bound=RowSource)


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """Where rows come from and how they become tokens: what pairs and single rows have in common."""

    train: str | tuple[str | RowSource, ...]
    """Sources to train on: a path or hub name, or a list of these or of sections with a path."""
    eval: str | tuple[str | RowSource, ...] = ()
    """Sources to evaluate on. Empty: hold out a share of the training prompts, see data.eval_share."""
    template: str | None = None
    """A chat template: a Jinja file, Jinja text, the name of one of several that the tokenizer has, or a built-in name
    (plain: "User:" and "Assistant:" headings; chatml: <|im_start|> turns without a default system prompt; phi3, qwen3,
    r1-distill: the families' form with every turn as the model wrote it). Unset: the tokenizer's own, or plain where it
    has none."""
    template_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the template, such as {enable_thinking: false}. They become part of it, for training, rollouts,
    evaluation and the published tokenizer."""
    fold_system: bool = False
    """Put the text of a system message in front of the first message of the user, after which an empty line follows:
    for templates that have no system messages. It becomes part of the template, too."""
    thoughts: Literal["keep", "drop", "mask"] = "keep"
    """Thoughts before an answer (<think>...</think>, or reasoning_content): keep and learn them; drop them from all
    answers; or mask them, to be read but not learned. Most templates leave out those of earlier turns themselves. drop
    becomes part of the template: who reads with the published one drops them, too."""
    system_prompt: str | None = None
    """Put in front of conversations that have no system message. It becomes part of the template: the published one
    puts it there by itself. Unset: left to the template, and some insert a default of their own; choose another
    data.template to get rid of that."""
    max_tokens: Annotated[int, Gt(1)] = 1024
    """Longest prompt plus response, in tokens."""
    over_length: Literal["truncate_prompt_left", "drop", "error"] = "truncate_prompt_left"
    """Treatment of longer rows: cut their start (an answer that loses its beginning is not learned; a last one that
    alone is too long makes a bad row); or leave the row out; or stop. Each is counted in the report."""
    eval_share: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of the training rows held out when data.eval is empty, by whole prompts. 0: no evaluation."""
    quarantine_max_share: Annotated[float, Ge(0), Lt(1)] = 0.01
    """Bad rows are left out and listed in quarantine.jsonl. A larger share of them, in the training or in the
    eval sources, stops the run."""
    seed: Annotated[int, Ge(0)] = 0
    """Decides what is drawn at random: what is held out and sampled, and how it is changed or put together."""
    cache_dir: Annotated[Path | None, NoResult()] = None
    """Where tokenized data is kept. Unset: margin-rlhf in the user's cache folder."""

    def __post_init__(self) -> None:
        if not self.train_sources:
            raise ValueError("train names no source")
        for source in self.eval_sources:
            if source.weight != 1:
                raise ValueError(
                    f"eval source {source.path} has a weight ({source.weight}), which is for training"
                )

    @property
    def template_choice(self) -> TemplateChoice:
        return TemplateChoice(
            text=self.template,
            options=self.template_options,
            fold_system=self.fold_system,
            system_prompt=self.system_prompt,
            drop_thoughts=self.thoughts == "drop",
        )

    @property
    def train_sources(self) -> tuple[RowSource, ...]:
        return _as_sources(self.train, RowSource)

    @property
    def eval_sources(self) -> tuple[RowSource, ...]:
        return _as_sources(self.eval, RowSource)


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowsConfig):
    """Preference pairs: where they come from and how they become tokens."""

    train: str | tuple[str | SourceConfig, ...]
    eval: str | tuple[str | SourceConfig, ...] = ()
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    """Column names of all sources that do not set their own."""
    over_length: Literal["truncate_prompt_left", "drop", "error"] = "truncate_prompt_left"
    """Treatment of longer pairs: cut the start of the prompt, by as much on both sides (a response is never cut:
    one that alone is too long is a bad row); or leave the pair out; or stop. Each is counted in the report."""
    min_score_gap: Annotated[float, Gt(0)] | None = None
    """Train only on pairs whose scores lie at least this far apart: clear cases first."""
    max_train_pairs: Annotated[int, Gt(0)] | None = None
    """Train on a seeded sample of this many pairs; a smaller sample is part of every larger one."""
    max_eval_pairs: Annotated[int, Gt(0)] | None = None
    """Evaluate on a seeded sample of at most this many pairs."""
    flip_labels: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the training pairs whose answers are swapped, seeded, to study label noise. Margin and scores
    stay where they are, so that a flipped pair looks like any other."""

    @property
    def train_sources(self) -> tuple[SourceConfig, ...]:
        return _as_sources(self.train, SourceConfig)

    @property
    def eval_sources(self) -> tuple[SourceConfig, ...]:
        return _as_sources(self.eval, SourceConfig)


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Whether the labels of training pairs are believed."""

    kind: Literal["as_given", "audited", "made"] = "as_given"
    """as_given: each label counts as right. audited: as far as its probability to be wrong lets it (data.columns.wrong,
    as ``rlhf data audit`` writes it). made: the same, by an audit of the training pairs that the run makes itself
    before it starts, over the frozen states of model.path. Pairs to evaluate on always count as given."""
    layer: Annotated[int, Gt(0)] | None = None
    """The layer whose states an audit of the run's own reads; null for two fifths of the way up."""
    use: Literal["soft", "swap", "drop", "weight"] = "soft"
    """What becomes of doubtful labels. soft: the loss is that of the label and that of the opposite one, by their
    probabilities. swap: pairs above `above` have their answers swapped. drop: they are left out. weight: pairs count
    by the probability that their label is right, over its mean."""
    above: Annotated[float, Gt(0), Lt(1)] = 0.5
    """The probability above which swap and drop take a label to be wrong."""

    def __post_init__(self) -> None:
        if self.layer is not None and self.kind != "made":
            raise ValueError(f"layer = {self.layer} is for kind = made: an audit of its own, not {self.kind}")


AS_GIVEN = LabelsConfig()
"""All labels are believed."""


@dataclass(frozen=True, kw_only=True)
class ExampleDataConfig(RowsConfig):
    """Conversations, or single rows with labels: where they come from and how they become tokens."""

    columns: ExampleColumns = field(default_factory=ExampleColumns)
    """Column names of all sources."""
    max_train_rows: Annotated[int, Gt(0)] | None = None
    """Train on a seeded sample of this many rows; a smaller sample is part of every larger one."""
    max_eval_rows: Annotated[int, Gt(0)] | None = None
    """Evaluate on a seeded sample of at most this many rows."""


@dataclass(frozen=True, kw_only=True)
class PromptDataConfig(RowsConfig):
    """Prompts that a model is to answer: where they come from and how they become tokens."""

    columns: PromptColumns = field(default_factory=PromptColumns)
    """Column names of all sources."""
    max_tokens: Annotated[int, Gt(1)] = 512
    """Longest prompt in tokens, with the chat template around it; responses come on top."""
    over_length: Literal["truncate_prompt_left", "drop", "error"] = "drop"
    """Treatment of longer prompts: cut the start of their tokens (rewards still see all of the text); or leave the
    prompt out; or stop. Each is counted in the report."""
    deduplicate: bool = True
    """Keep the first of equal prompts, over all training sources and over all eval sources. Prompts are equal if
    their messages are, up to white space. Weights then repeat what is left."""
    max_train_prompts: Annotated[int, Gt(0)] | None = None
    """Train on a seeded sample of this many prompts; a smaller sample is part of every larger one."""
    max_eval_prompts: Annotated[int, Gt(0)] | None = None
    """Evaluate on a seeded sample of at most this many prompts."""


def _as_sources(value: str | tuple[str | SourceT, ...], kind: type[SourceT]) -> tuple[SourceT, ...]:
    entries = (value,) if isinstance(value, str) else value
    return tuple(kind(path=entry) if isinstance(entry, str) else entry for entry in entries)


def row_sections(config: Any, above: str = "") -> Iterator[tuple[str, RowsConfig]]:
    """The sections of a recipe that name rows, wherever they stand, with their keys."""
    for option in fields(config):
        value, key = getattr(config, option.name), f"{above}{option.name}"
        if isinstance(value, RowsConfig):
            yield key, value
        elif is_dataclass(value):
            yield from row_sections(value, f"{key}.")
