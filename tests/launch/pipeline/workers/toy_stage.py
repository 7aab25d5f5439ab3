"""A stage that takes no time: it adds its number to that of its input, step by step, or does what a test tells it."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rlhf.core.annotations import NoResult
from rlhf.core.errors import ConfigError, RunStopped
from rlhf.train.single import single_main
from rlhf.train.status import report_metrics

KILL_AT = "TOY_KILL_AT"
"""Environment variable: the step at which the stage dies, once for each run folder."""


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    output: Annotated[Path, NoResult()]
    number: int = 0
    source: str = ""
    behave: str = "finish"
    data: str = ""
    cache_dir: Annotated[str, NoResult()] = ""
    meets: Annotated[tuple[str, ...], NoResult()] = ()
    """Names of stages that must be at work at the same time."""
    steps: int = 0


def run(config: ToyConfig) -> None:
    (config.output / "final").mkdir(parents=True, exist_ok=True)
    with (config.output / "starts").open("a") as starts:
        starts.write("x")
    (config.output / f"seen{os.environ.get('RANK', '0').strip('0')}").write_text(json.dumps(dict(os.environ)))
    meet([config.output.parent / name for name in config.meets])
    before = int((Path(config.source) / "number").read_text()) if config.source else 0
    if config.cache_dir:
        Path(config.cache_dir).mkdir()
    if config.behave == "refuse":
        raise ConfigError("toy: this cannot work")
    if config.behave == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.behave == "lie":
        sys.exit(0)
    if config.behave in ("wait", "wait and crash", "deaf"):
        wait(config.output, config.behave)
    train(config)
    (config.output / "final" / "number").write_text(str(before + config.number))
    report_metrics({"eval/number": before + config.number, "eval/half": config.number / 2})


def train(config: ToyConfig) -> None:
    """Go on from the last step that was saved."""
    saved = config.output / "checkpoints"
    done = len(saved.read_text()) if saved.exists() else 0
    for step in range(done + 1, config.steps + 1):
        if str(step) == os.environ.get(KILL_AT) and (config.output / "starts").read_text() == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        with saved.open("a") as steps:
            steps.write("x")
        report_metrics({"loss": 1 / step}, step=step, total=config.steps)


def meet(others: list[Path]) -> None:
    """Until all of them have begun: stages one after the other never do."""
    deadline = time.monotonic() + 20
    while not all((other / "seen").exists() for other in others):
        if time.monotonic() > deadline:
            raise ConfigError("toy: the others did not come")
        time.sleep(0.05)


def wait(output: Path, behave: str) -> None:
    """Until asked to stop; a deaf stage does not care."""
    (output / "pid").write_text(str(os.getpid()))
    report_metrics({"loss": 0.5}, phase="training", step=1, total=9, eta_seconds=8.0)
    while not (output / "STOP").exists() or behave == "deaf":
        time.sleep(0.05)
    (output / "STOP").unlink()
    if behave == "wait and crash":
        raise RuntimeError("cannot save")
    raise RunStopped("the file STOP", "at step 1 of 9", 1)


if __name__ == "__main__":
    sys.exit(single_main(ToyConfig, run, None, program="toy", description="a toy"))
