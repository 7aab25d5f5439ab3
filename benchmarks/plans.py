"""The plans of docs/plan.md: what ``rlhf plan`` says of the shipped recipes on 8 and 64 H100.

    python -m benchmarks.plans

writes each block of the document anew, behind its heading.
"""

import argparse
import contextlib
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.cli import main as rlhf
from rlhf.core.files import write_text

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "plan.md"
RECIPES = {
    "reward": "launch/recipes/reward_llama3_8b.yaml",
    "preference": "launch/recipes/preference_llama3_8b_ot_margin.yaml",
    "ppo": "launch/recipes/ppo_llama3_8b.yaml",
}
ROWS = {stage: ("--rows", "60000", "--mean-tokens", "450") for stage in ("reward", "preference")}
ROWS["ppo"] = ("--rows", "20000", "--mean-tokens", "200")
LARGE = "meta-llama/Meta-Llama-3-70B-Instruct"
OF_70B = {
    ("reward", 1): ("engine.deepspeed=zero3_offload",),
    ("preference", 1): ("engine.deepspeed=zero3",),
    ("preference", 8): ("engine.deepspeed=zero3",),
}
SPLIT = ("critic.share_trunk=false", "policy.gradient_checkpointing=true", "critic.gradient_checkpointing=true")
OF_70B |= {("ppo", nodes): (*SPLIT, f"engine.deepspeed={name}") for nodes, name in ((1, "zero3_offload"), (8, "zero3"))}
"""What the plans of the larger model set besides its path, by stage and nodes."""


@dataclass(frozen=True)
class Planned:
    """One block of the document."""

    heading: str
    """The text before the block."""
    arguments: tuple[str, ...]
    tables: Collection[str] | None
    """Titles of the tables that are shown; ``None`` for all."""


def planned() -> Iterator[Planned]:
    """All blocks, in their order."""
    for size in ("8B", "70B"):
        for stage, recipe in RECIPES.items():
            for nodes in (1, 8):
                given = ["plan", stage, "--config", recipe, "--device", "h100-80gb", "--nodes", str(nodes)]
                given += ["--devices-per-node", "8", "--host-memory", "2TiB", *ROWS[stage]]
                if size == "70B":
                    path = "policy.path" if stage == "ppo" else "model.path"
                    given += [f"{path}={LARGE}", *OF_70B.get((stage, nodes), ())]
                if (size, stage, nodes) == ("8B", "reward", 1):
                    yield Planned(f"rlhf {' '.join(given)}\n```", tuple(given), None)
                    continue
                heading = f"**{stage}, {size}, {nodes} node{'s' if nodes > 1 else ''} of 8**"
                yield Planned(heading, tuple(given), ("Phases of one rank",) if size == "70B" else ())


def block(each: Planned) -> str:
    """What the command prints, with the tables that are shown."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.chdir(ROOT):
        rlhf(each.arguments)
    _, begin, rest = printed.getvalue().partition(f"{each.arguments[1]} on ")  # behind what libraries log
    lines = [line.rstrip() for line in (begin + rest).splitlines()]
    kept, shown = [], True
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if following.startswith("┏"):
            shown = each.tables is None or line in each.tables
        elif not line.startswith(("┏", "┃", "┡", "│", "├", "└")):
            shown = True
        if shown:
            kept.append(line)
    return "\n".join(kept)


def rewritten(document: str, blocks: Collection[Planned]) -> str:
    """The document with these blocks anew."""
    for each in blocks:
        before, heading, behind = document.partition(each.heading)
        opening, _, rest = behind.partition("```text\n")
        if not heading or not rest or opening.strip():
            raise ValueError(f"{DOCUMENT}: no block behind {each.heading!r}")
        document = f"{before}{heading}{opening}```text\n{block(each)}\n```{rest.partition('```')[2]}"
    return document


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


if __name__ == "__main__":
    _parser().parse_args()
    write_text(DOCUMENT, rewritten(DOCUMENT.read_text(encoding="utf-8"), list(planned())))
