"""Audits of labels: how many look wrong, where, beside what else can be said of them, and the most suspect to read."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.report.contents import Cell, Passage, Reading, Section, Table, Text, cell, share
from launch.report.figures import Figure, Line
from launch.report.reading import read_json, read_lines
from rlhf.train.held_out import shortened

SUMMARY, PAIRS, SUSPECTS = "summary.json", "pairs.jsonl", "suspects.jsonl"
NEEDED = {"verdict", "pairs", "share_wrong", "by", "contradictory_pairs", "longer_answer_chosen"}
READ = 20
"""Suspects whose texts are shown."""
BINS = 40


def is_audit(folder: Path) -> bool:
    """Whether ``rlhf data audit`` wrote the folder."""
    path = folder / SUMMARY
    return path.is_file() and read_json(path).keys() >= NEEDED


def audits(folders: Sequence[Path]) -> Iterator[Section]:
    """A section for each of ``folders`` that holds an audit."""
    found = [folder for folder in folders if is_audit(folder)]
    for number, folder in enumerate(found):
        yield _section(read_json(folder / SUMMARY), folder, "audit" if number == 0 else f"audit-{number}")


def _section(found: Mapping[str, Any], folder: Path, key: str) -> Section:
    return Section(
        key=key,
        title=f"Labels of {folder.resolve().name}",
        lead=tuple(_sentences(found)),
        figures=(_margins(folder), *_groups(found)),
        tables=tuple(_tables(found)),
        readings=tuple(_readings(folder)),
    )


def _sentences(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['verdict'][0].upper()}{found['verdict'][1:]}."
    twice = found["contradictory_pairs"]
    if twice:
        yield (
            f"{twice} of {found['pairs']} pairs stand there the other way round, too: of each two one is wrong for "
            "certain, whatever heads think of them."
        )
    again = found.get("judged_again") or {}
    if again.get("pairs"):
        yield (
            f"{again['pairs']} pairs of answers were judged more than once, and {again['disagree']} of them "
            f"({again['disagree'] / again['pairs']:.0%}) not alike: no audit can be surer than its annotators."
        )
    longer, among = found["longer_answer_chosen"], found.get("longer_answer_chosen_among_suspects")
    if longer is not None:
        text = f"The longer answer is the chosen one in {longer:.0%} of the pairs"
        text += "" if among is None else f", among the suspects in {among:.0%}"
        yield (
            f"{text}. Annotators who prefer length make wrong labels that heads learn, and that an audit by the same "
            "data does not see."
        )


def _margins(folder: Path) -> Figure:
    rows, _ = read_lines(folder / PAIRS)
    margins = np.array([row["audit_margin"] for row in rows if "audit_margin" in row])
    wrong = np.array([row["audit_wrong"] for row in rows if "audit_margin" in row])
    lines = []
    if len(margins):
        low, high = float(margins.min()), float(margins.max())
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        middle = ((edges[1:] + edges[:-1]) / 2).tolist()
        for color, (name, weights) in enumerate({"all": np.ones(len(margins)), "expected wrong": wrong}.items()):
            counts = np.histogram(margins, bins=edges, weights=weights)[0].tolist()
            lines.append(Line(name=name, x=middle, y=counts, color=color, kind="bars"))
    return Figure(
        key="margins",
        title="Out-of-fold margins",
        x="margin of heads that did not see the pair",
        y="pairs",
        lines=tuple(lines),
        note="Below 0 heads contradict the label. What is expected to be wrong is by Bayes' rule.",
    )


def _estimated(groups: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(groups, Mapping):
        return {}
    return {name: each for name, each in groups.items() if "estimate" in each}


def _groups(found: Mapping[str, Any]) -> Iterator[Figure]:
    for column, groups in found["by"].items():
        known = _estimated(groups)
        if len(known) < 2:
            continue
        line = Line(
            name="share that looks wrong, 95 % interval",
            x=[*range(len(known))],
            y=[each["estimate"] for each in known.values()],
            low=[each["low"] for each in known.values()],
            high=[each["high"] for each in known.values()],
            kind="points",
        )
        yield Figure(
            key=f"by-{column}",
            title=f"By {column}",
            x=column,
            y="share of wrong labels",
            categories=tuple(known),
            lines=(line,),
            levels=(found["share_wrong"]["estimate"],),
            percent=True,
            note="The dotted line is the share of all. A group with a taste of its own looks wrong, too.",
        )


def _tables(found: Mapping[str, Any]) -> Iterator[Table]:
    for column, groups in found["by"].items():
        if not isinstance(groups, Mapping):
            continue
        rows = tuple(
            (
                Cell(text=name),
                cell(each["pairs"]),
                cell(each.get("estimate"), share(each.get("estimate"))),
                cell(each.get("low"), f"{share(each.get('low'))} to {share(each.get('high'))}"),
                cell(each["mean_wrong"], share(each["mean_wrong"])),
                cell(each.get("against_others"), share(each.get("against_others"))),
            )
            for name, each in groups.items()
        )
        headings = (column, "pairs", "looks wrong", "95 % interval", "mean suspicion", "against others")
        note = "Against others: share of what others judged, too, where it stands alone against more of them."
        yield Table(title=f"By {column}", headings=headings, rows=rows, note=note)


def _readings(folder: Path) -> Iterator[Reading]:
    rows = read_lines(folder / SUSPECTS)[0][:READ]
    if not rows:
        return
    passages = tuple(
        Passage(
            title=f"{row['row']}: wrong with {row['wrong']:.0%}, margin {row['margin']:+.2f} ± {row['margin_sd']:.2f}",
            prompt=shortened(str(row["prompt"])),
            texts=tuple(_text(side, row[side]) for side in ("chosen", "rejected")),
        )
        for row in rows
    )
    yield Reading(
        title="The most suspect labels",
        passages=passages,
        note=f"All of them, with their whole texts: {SUSPECTS}. Judge some by hand before anything is swapped.",
    )


def _text(side: str, text: Any) -> Text:
    return Text(title=side, parts=((shortened(str(text)), False),))
