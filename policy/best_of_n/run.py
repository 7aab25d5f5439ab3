"""``rlhf evaluate best-of-n``: several samples to each prompt, chosen by one reward and judged by another."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from rich.table import Table

from policy.best_of_n.config import BestOfNConfig
from policy.best_of_n.curve import curve
from reward.function import Answers, RewardFunction, load_reward, served_cards
from rlhf.core.errors import DataError
from rlhf.core.findings import read_findings, write_findings
from rlhf.core.intervals import Estimate
from rlhf.core.pictures import write_figure
from rlhf.data.messages import Asked
from rlhf.data.plain_rows import plain_rows

KIND = "best_of_n"
OWN = ("row", "sample", "prompt", "response", "tokens", "ended")
"""What ``rlhf generate`` writes of a response; all else are columns of the prompt's row."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best of n."""

    n: int
    kl: float
    """KL from the policy, in nats."""
    proxy: Estimate
    """Mean reward of the chosen samples by the reward that chose them."""
    gold: Estimate
    """The same by the reward that judges."""


def evaluate_choices(config: BestOfNConfig) -> list[Choice]:
    """Choose, judge, and write evaluation.json, items.jsonl and best_of_n.svg.

    Raises:
        DataError: if the prompts have fewer than two samples, or not equally many, or a reward is missing.
        ConfigError, ModelError: if there is no such reward.
    """
    judges = {"proxy": load_reward(config.proxy), "gold": load_reward(config.gold)}
    answers, ids, samples = read_responses(config.responses)
    judges = {name: judge.reading(answers.prompts, answers.columns) for name, judge in judges.items()}
    rewards = {name: _rewards(judge, answers, name).reshape(-1, samples) for name, judge in judges.items()}
    ns = [n for n in (2**power for power in range(samples.bit_length())) if n < samples] + [samples]
    found = [
        Choice(n=n, kl=kl, proxy=by_proxy, gold=by_gold)
        for n, kl, by_proxy, by_gold in curve(rewards["proxy"], rewards["gold"], ns)
    ]
    items = [
        {"id": name, "proxy": by_proxy, "gold": by_gold}
        for name, by_proxy, by_gold in zip(ids, rewards["proxy"].tolist(), rewards["gold"].tolist(), strict=True)
    ]
    write_findings(config.output, KIND, {"choices": [asdict(each) for each in found], **served_cards(**judges)}, items)
    _draw(found, config.output / "best_of_n.svg")
    return found


def read_choices(folder: Path) -> list[Choice]:
    """What :func:`evaluate_choices` wrote into ``folder``."""
    return TypeAdapter(list[Choice]).validate_python(read_findings(folder)["choices"])


def report_of(folder: Path) -> Table:
    """The table of a best-of-n that is finished, from its run folder."""
    return choice_table(read_choices(folder))


def read_responses(path: Path) -> tuple[Answers, list[str], int]:
    """The responses of a file, prompt by prompt, the prompts' places, and how many responses there are to each.

    Raises:
        DataError: if a row is no response, or the prompts have not equally many, two at least.
    """
    rows: list[Mapping[str, Any]] = []
    for place, row in plain_rows(path):
        if not isinstance(row, Mapping) or not {"row", "prompt", "response"} <= row.keys():
            raise DataError(
                f"{path}, {place}: expected row, prompt and response, as `rlhf generate` writes them of prompts"
            )
        rows.append(row)
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(str(row["row"]), []).append(row)
    counts = {len(group) for group in by_prompt.values()}
    if len(counts) != 1 or counts == {1}:
        told = f"{min(counts)} to {max(counts)} responses to a prompt" if counts else "no response"
        raise DataError(f"{path}: there are {told}; best-of-n needs equally many, at least 2 (rlhf generate --samples)")
    ordered = [row for group in by_prompt.values() for row in group]
    asked: list[Asked] = [row["prompt"] for row in ordered]
    answers = Answers(
        prompts=asked,
        responses=[str(row["response"]) for row in ordered],
        token_ids=None,
        ended=[bool(row.get("ended", True)) for row in ordered],
        columns=[{name: cell for name, cell in row.items() if name not in OWN} for row in ordered],
    )
    return answers, [*by_prompt], counts.pop()


def choice_table(found: Sequence[Choice]) -> Table:
    """A line for each n."""
    table = Table(title="Best of n samples (95 % intervals over prompts)", title_justify="left")
    for name in ("n", "KL", "proxy", "gold", "95 % interval"):
        table.add_column(name, justify="right")
    for each in found:
        gold = each.gold
        interval = f"{gold.low:.4f} to {gold.high:.4f}"
        table.add_row(str(each.n), f"{each.kl:.2f}", f"{each.proxy.value:.4f}", f"{gold.value:.4f}", interval)
    return table


def _rewards(judge: RewardFunction, answers: Answers, name: str) -> NDArray[np.float64]:
    given = list(judge(answers))
    missing = sum(value is None or not np.isfinite(value) for value in given)
    if missing or len(given) != len(answers):
        raise DataError(
            f"{name}: {len(given) - missing} finite rewards for {len(answers)} responses; best-of-n needs one for each"
        )
    return np.array(given, np.float64)


def _draw(found: Sequence[Choice], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    kl = [each.kl for each in found]
    for side, name, color in ((left, "gold", "#1b6ca8"), (left.twinx(), "proxy", "#c8553d")):
        estimates = [getattr(each, name) for each in found]
        values = [each.value for each in estimates]
        side.plot(kl, values, color=color, marker="o")
        side.fill_between(kl, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.2)
        side.set_ylabel(f"{name} reward", color=color)
    left.set_xlabel("KL from the policy, nats: log n - (n - 1) / n")
    left.set_title("Best of " + ", ".join(str(each.n) for each in found))
    write_figure(path, figure)
    pyplot.close(figure)
