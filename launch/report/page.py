"""The page itself: all sections of the runs at hand, in one file that asks nothing of any network."""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from launch.report.about import About, about, costs, differing, warned
from launch.report.audits import SUMMARY, audits, is_audit
from launch.report.contents import Advice, Section, Table, curves
from launch.report.figures import Figure
from launch.report.kinds import other
from launch.report.reading import STUDY, Run, read_runs
from launch.report.studies import studies
from launch.report.svg import draw
from launch.stages import by_program, load
from rlhf.core.files import write_text

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a page says."""

    title: str
    runs: tuple[Run, ...]
    sections: tuple[Section, ...]
    advice: tuple[Advice, ...]
    abouts: tuple[About, ...]
    differing: tuple[Table, ...]
    costs: tuple[Table, ...]
    cost_figures: tuple[Figure, ...]

    @property
    def live(self) -> list[tuple[str, str]]:
        """Runs that are still going, with where they stand."""
        stated = [(run.name, run.status) for run in self.runs if run.status is not None]
        return [(name, each.where) for name, each in stated if each.state == "running" and not each.is_gone]

    @property
    def figures(self) -> list[Figure]:
        return [*(figure for section in self.sections for figure in section.figures), *self.cost_figures]

    def lines(self) -> list[str]:
        """The summary in short, for a terminal."""
        found = [f"running: {name}: {where}" for name, where in self.live]
        for section in self.sections:
            found += [f"{section.title}: {text}" for text in section.lead]
        found += [f"warning: {each.run}: {each.text}" for each in self.advice]
        return found


def report_of(folders: Sequence[Path], *, planned: Mapping[str, float] | None = None) -> Report:
    """Read ``folders`` and say what is in them.

    Args:
        folders: of stages or pipelines, or of audits.
        planned: bytes that ``rlhf plan`` foretold, by the name of a run.
    Raises:
        UserError: if there is no run in them, or they cannot be compared.
    """
    runs = read_runs(others) if (others := [folder for folder in folders if not is_audit(folder)]) else ()
    kinds = dict.fromkeys(run.stage for run in runs if _has_page(run))
    ordered = sorted(runs, key=lambda run: [*kinds].index(run.stage) if run.stage in kinds else -1)
    sections = [_with_prefix(section.filled) for section in (*audits(folders), *studies(folders, runs))]
    for kind in kinds:
        same = [run for run in ordered if run.stage == kind]
        stage = by_program(kind)
        show = load(stage.page) if stage is not None and stage.page else other
        section = show(same, ordered.index(same[0])).filled
        sections += [] if section.is_empty else [_with_prefix(section)]
    trained = [run for run in ordered if "time/step_seconds" in run.columns]
    names = [folder.resolve().name for folder in folders]
    return Report(
        title=names[0] if len(names) == 1 else " and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        runs=tuple(ordered),
        sections=tuple(sections),
        advice=(*(each for section in sections for each in section.advice), *warned(ordered)),
        abouts=about(ordered),
        differing=tuple(differing(ordered)),
        costs=tuple(costs(ordered, planned or {})),
        cost_figures=tuple(_prefixed(figure, "cost") for figure in _cost_figures(trained) if not figure.is_empty),
    )


def _has_page(run: Run) -> bool:
    """Whether there is anything to see: an import, for one, has made nothing but a folder."""
    stage = by_program(run.stage)
    return bool(run.metrics) or stage is None or bool(stage.page)


def _with_prefix(section: Section) -> Section:
    return replace(section, figures=tuple(_prefixed(figure, section.key) for figure in section.figures))


def _prefixed(figure: Figure, prefix: str) -> Figure:
    return replace(figure, key=f"{prefix}-{figure.key}")


def _cost_figures(runs: Sequence[Run]) -> list[Figure]:
    rate, memory = {"tokens": "time/tokens_per_second"}, {"peak": "memory/peak_gib"}
    return [
        curves("tokens", "Throughput", runs, rate, "tokens a second"),
        curves("memory", "Peak memory", runs, memory, "GiB on rank 0", noisy=False),
    ]


def render(report: Report, *, plotly: str | None = None, reload_seconds: float | None = None, state: str = "") -> str:
    """The page as HTML.

    Args:
        report: what it says.
        plotly: the script of Plotly, which makes figures that can be zoomed; without it they are SVG alone.
        reload_seconds: ask the server so often whether there is something new; ``None`` for a page that stands alone.
        state: what the server calls the present state.
    """
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    scripts = [Markup(text) for text in (plotly, script) if text is not None]
    allowed = " ".join(f"'sha256-{_digest(text)}'" for text in scripts)
    connect = "'self'" if reload_seconds is not None else "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"draw": draw}
    environment.filters["glued"] = _glued
    return environment.get_template("page.html.j2").render(
        report=report,
        policy=policy,
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        scripts=scripts,
        data=embedded(
            {"figures": [figure.to_dict() for figure in report.figures], "reload": reload_seconds, "state": state}
        ),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def _glued(text: str) -> str:
    """The same with no line between a number and its sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(value: Any) -> Markup:
    """JSON for a ``script`` element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def plotly_script() -> str | None:
    """The script of the installed Plotly (extra ``report``); ``None`` without one."""
    import importlib.util

    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "package_data" / "plotly.min.js"
    # A script element ends at the first </script> in it, whatever the language says.
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script") if path.is_file() else None


def is_current(path: Path, report: Report) -> bool:
    """Whether the page at ``path`` is newer than all files of the runs that it would show, their study or audit."""
    if not path.is_file():
        return False
    made = path.stat().st_mtime_ns
    beside = path.with_name(STUDY), path.with_name(SUMMARY)
    files = [*beside, *(each for run in report.runs for each in run.folder.iterdir())]
    return all(each.stat().st_mtime_ns <= made for each in files if each.is_file())


def write_report(path: Path, report: Report, *, interactive: bool = True) -> None:
    """Write the page to ``path`` in one step."""
    write_text(path, render(report, plotly=plotly_script() if interactive else None), durable=False)
