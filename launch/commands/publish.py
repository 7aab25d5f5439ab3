"""``rlhf publish RUN``: the weights that the checkpoints of a run hold, as its ``final/``."""

import argparse
import importlib
import json
import subprocess
from pathlib import Path

from launch.commands.arguments import Subparsers, add_settings, command, positive_int
from rlhf.core.errors import UserError
from rlhf.core.paths import home_path

_DESCRIPTION = """\
Publish what a run has trained, without training on: the weights that its recipe asks for (train.publish: best or
last; best where it says none) are taken from its checkpoints, evaluated, written and checked as at the end of the run.
For runs whose publication failed, that were not to publish anything, or that stopped early and shall not go on.
"""


def add_parser(subparsers: Subparsers) -> None:
    about = "publish a trained run from its checkpoints"
    parser = command(subparsers, "publish", run, help=about, description=_DESCRIPTION)
    parser.add_argument("folder", metavar="RUN", type=home_path, help="the folder of the run")
    ranks = "processes (default: as many as it was trained on, up to all GPUs, or 2 on a CPU)"
    parser.add_argument("--ranks", type=positive_int, help=ranks)
    settings = "settings, such as train.publish=last or another data.train if the data has moved"
    add_settings(parser, settings)


def run(options: argparse.Namespace) -> int:
    from launch.jobs.devices import default_ranks
    from launch.jobs.launcher import Machine, stage_command
    from launch.stages import read_stage
    from rlhf.core.files import CONFIG, DONE
    from rlhf.train.done import Completion, config_digest, write_completion
    from rlhf.train.status import read_status, write_status

    folder: Path = options.folder
    recipe = folder / CONFIG
    if not recipe.is_file():
        raise UserError(
            f"{folder}: no folder of a run that has begun to train (there is no {recipe.name}); give the output of an "
            "SFT, reward, preference or PPO run"
        )
    status = read_status(folder)
    if status is not None and status.state == "running" and not status.is_gone:
        raise UserError(
            f"{folder}: the run is at work ({status.where}; process {status.process}); it publishes by itself at its "
            f"end, or saves and stops if asked to: touch {folder / 'STOP'}"
        )
    saved = _newest(folder)
    stage, trained = read_stage([recipe], [], None if status is None else status.stage, program="rlhf publish")
    arguments = ["--config", str(recipe), f"output={folder}"]
    if trained.train.publish == "none":
        arguments.append("train.publish=best")
    arguments += [*options.overrides, "train.resume=publish"]
    ranks = options.ranks or (1 if saved["ranks"] == 1 else min(saved["ranks"], default_ranks()))
    if ranks == 1:
        code = importlib.import_module(f"{stage.module}.__main__").main(arguments)
    else:
        code = subprocess.run(stage_command(stage, arguments, Machine(ranks=ranks)), check=False).returncode
    state, total = saved["state"], saved["identity"]["total steps"]
    if state["step"] < total and not state["stopped_early"]:
        if status is not None:
            write_status(folder, status)  # it has not ended: whoever looks after the run may let it go on
        if code == 0:
            print(f"{folder}: has trained {state['step']} of {total} steps; its own command goes on from there")
    elif code == 0 and not (folder / DONE).is_file():
        done = Completion(stage=stage.name, config=config_digest(trained), step=state["step"], seconds=0.0)
        write_completion(folder, done)
    return code


def _newest(folder: Path) -> dict:
    """What the newest checkpoint says of itself.

    Raises:
        UserError: if there is none, or one of another version.
    """
    from rlhf.engine.checkpoint import checkpoint_folder, saved_steps, step_folder

    checkpoints = checkpoint_folder(folder)
    steps = saved_steps(checkpoints)
    if not steps:
        raise UserError(
            f"{checkpoints}: no checkpoint to publish from; let the run train on (its own command goes on where it "
            "stopped)"
        )
    path = step_folder(checkpoints, steps[-1]) / "loop.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"state": found["state"], "identity": found["identity"], "ranks": int(found["ranks"])}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}): remove the checkpoint, and the one before it "
            "is taken"
        ) from error
