"""PPO and RLOO side by side with TRL: responses learned from per second, peak memory.

Every contender draws responses of the same slice of a real model to the same prompts, scores them with the same reward
model and learns from them, each in a process of its own, one after the other. Give them an idle machine.

    python benchmarks/ppo_vs_trl.py --trl-python PYTHON
    python benchmarks/ppo_vs_trl.py --contenders ours-rloo trl-rloo

TRL's PPOTrainer is last in TRL 1.12, hence an environment of its own; RLOOTrainer is in the current TRL, here:

    python -m venv trl-ppo
    grep -v '^trl==' constraints.txt > trl-constraints.txt
    trl-ppo/bin/pip install -c trl-constraints.txt torch==2.13.0 trl==1.12.0
    pip install trl==1.16.0
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ppo_workload import add_workload_options, write_workload

CONTENDERS = {
    "ours-ppo": {"side": "ours", "kind": "ppo", "file": "ppo_contender.py"},
    "trl-ppo": {"side": "trl", "kind": "ppo", "file": "ppo_trl_contender.py"},
    "ours-rloo": {"side": "ours", "kind": "rloo", "file": "ppo_contender.py"},
    "trl-rloo": {"side": "trl", "kind": "rloo", "file": "ppo_trl_contender.py"},
}
"""Contenders in the order of the first round; every other round goes backwards."""
FIGURES = (
    "samples_per_second",
    "samples_per_cpu_second",
    "response_tokens_per_second",
    "mean_response_tokens",
    "ended_share",
    "start_rss_gib",
    "peak_rss_gib",
)
SAME_LENGTH = 0.05
"""Lengths are drawn; sides whose mean lengths differ by a larger share have not done the same work."""


def main() -> int:
    options = parse_options()
    work = Path(tempfile.mkdtemp(prefix="ppo_vs_trl-", dir=options.work))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets whoever imports Transformers
            shared = prepare(options, work)
        runs = measure(options, shared, work)
    finally:
        shutil.rmtree(work)
    rows = summary(runs)
    compared, alike = comparison(rows)
    print("\n" + "\n".join([*table(rows), "", *compared]))
    if options.output is not None:
        chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        report = {"options": chosen, "machine": machine(), "runs": runs, "summary": rows}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if alike else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_options(parser)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--trl-python", help="interpreter whose TRL has PPOTrainer; needed for trl-ppo")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contender (default %(default)s)")
    parser.add_argument("--work", type=Path, help="scratch folder, about 1 GB (default: the system's)")
    parser.add_argument("--output", type=Path, help="write everything measured here, as JSON")
    return parser


def parse_options() -> argparse.Namespace:
    parser = build_parser()
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(
            f"--model {options.model}: there is no model. `make quickstart` makes models/SmolLM2-135M-Instruct; "
            "`rlhf import-gguf` turns any GGUF file into a folder"
        )
    for path in (options.prompts, Path(options.template)):
        if not path.is_file():
            parser.error(f"{path}: there is no such file; run this from the root of the repository")
    for name in ("minibatches", "samples"):
        if options.rows_per_step % getattr(options, name):
            parser.error(f"--rows-per-step {options.rows_per_step} is no multiple of --{name} {getattr(options, name)}")
    if options.prompt_count < options.rows_per_step:
        parser.error(f"--prompt-count {options.prompt_count}: a step has {options.rows_per_step} rows")
    if options.steps < 1 or not 0 <= options.end_rate < 1:
        parser.error(f"--steps {options.steps}, --end-rate {options.end_rate}: expected at least 1, and 0 <= rate < 1")
    for name in options.contenders:
        if CONTENDERS[name]["side"] == "trl":
            check_trl(parser, options, name)
    return options


def check_trl(parser: argparse.ArgumentParser, options: argparse.Namespace, name: str) -> None:
    """Find out now, not after the other contenders, that an interpreter has not what TRL's side needs."""
    if name == "trl-ppo" and options.trl_python is None:
        parser.error("trl-ppo needs --trl-python, an interpreter with TRL 1.12; --help says how to make one")
    module = "trl.experimental.ppo" if name == "trl-ppo" else "trl"
    code = f"import importlib.util as u, sys; sys.exit(0 if u.find_spec({module!r}) else 1)"
    if subprocess.run([interpreter(options, name), "-c", code], stderr=subprocess.DEVNULL).returncode:
        parser.error(f"{name}: {interpreter(options, name)} has no {module}; --help says what to install")


def interpreter(options: argparse.Namespace, name: str) -> str:
    return options.trl_python if name == "trl-ppo" else sys.executable


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # the layers that are left out are no news
    transformers_logging.disable_progress_bar()
    return write_workload(options, work)


# The runs


def measure(options: argparse.Namespace, shared: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """One record by contender and round."""
    runs = []
    for number in range(options.rounds):
        for name in options.contenders[:: -1 if number % 2 else 1]:
            run = run_contender(name, options, shared, work / f"run-{len(runs)}")
            run |= {"contender": name, "round": number}
            check_work(run, options)
            speed, peak = run["samples_per_second"], run["peak_rss_gib"]
            print(f"{name}: {speed:.3f} samples/s, peak {peak:.2f} GiB", file=sys.stderr, flush=True)
            runs.append(run)
    return runs


def run_contender(name: str, options: argparse.Namespace, shared: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Start it in a process of its own and read what it measured."""
    folder.mkdir()
    settings, measured, log = folder / "settings.json", folder / "measured.json", folder / "log.txt"
    kind = CONTENDERS[name]["kind"]
    own = {"kind": kind, "samples": 1 if kind == "ppo" else options.samples, "folder": str(folder)}
    settings.write_text(json.dumps(shared | own))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(shared["threads"]),
        "MKL_NUM_THREADS": str(shared["threads"]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    file = str(Path(__file__).with_name(CONTENDERS[name]["file"]))
    command = [interpreter(options, name), file, str(settings), str(measured)]
    with log.open("w") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{name} ended with code {code}:\n" + "\n".join(log.read_text().splitlines()[-30:]))
    result = json.loads(measured.read_text())
    shutil.rmtree(folder)
    return result


def check_work(run: dict[str, Any], options: argparse.Namespace) -> None:
    """Refuse a run with other steps, responses or updates than asked for."""
    name, steps = run["contender"], run["steps"]
    assert len(steps) == options.warmup_steps + options.steps, f"{name}: {len(steps)} steps"
    for step in steps:
        tokens, updates = step["response_tokens"], options.minibatches * options.epochs
        assert len(tokens) == options.rows_per_step, f"{name}: {len(tokens)} responses in a step"
        assert step["updates"] == updates, f"{name}: {step['updates']} updates in a step, not {updates}"
        assert min(tokens) >= 1 and max(tokens) <= options.response_tokens, f"{name}: responses of {tokens} tokens"


# What came out


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds."""
    rows = []
    for name in dict.fromkeys(run["contender"] for run in runs):
        own = [run for run in runs if run["contender"] == name]
        row = {"contender": name, "kind": CONTENDERS[name]["kind"], "side": CONTENDERS[name]["side"]}
        row |= {figure: statistics.median(run[figure] for run in own) for figure in FIGURES}
        row["step_seconds"] = statistics.median(second for run in own for second in run["step_seconds"])
        phases = dict.fromkeys(phase for run in own for phase in run["phase_seconds"])
        row["phase_seconds"] = {
            phase: statistics.median(run["phase_seconds"].get(phase, 0.0) for run in own) for phase in phases
        }
        rows.append(row | {"versions": own[0].get("versions", {})})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    heads = ("contender", "samples/s", "samples/CPU s", "seconds of a step", "of them", "response tokens", "ended")
    heads += ("RSS start", "RSS peak")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phase_seconds"].items())
        cells = [row["contender"], f"{row['samples_per_second']:.3f}", f"{row['samples_per_cpu_second']:.3f}"]
        cells += [f"{row['step_seconds']:.1f}", phases]
        cells += [f"{row['mean_response_tokens']:.1f}", f"{row['ended_share']:.0%}"]
        lines.append("| " + " | ".join([*cells, *(f"{row[f'{n}_rss_gib']:.2f} GiB" for n in ("start", "peak"))]) + " |")
    return lines


def comparison(rows: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Ours over TRL for each kind that has both, and whether the sides did the same work."""
    heads = (
        "ours / TRL",
        "samples/s",
        "samples/CPU s",
        "response tokens/s",
        "RSS peak",
        "peak above start",
        "response tokens",
    )
    lines, alike = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"], True
    for kind in ("ppo", "rloo"):
        sides = {row["side"]: row for row in rows if row["kind"] == kind}
        if len(sides) < 2:
            continue
        ours, theirs = sides["ours"], sides["trl"]
        for row in (ours, theirs):
            row["above_start"] = row["peak_rss_gib"] - row["start_rss_gib"]
        names = ("samples_per_second", "samples_per_cpu_second", "response_tokens_per_second")
        names += ("peak_rss_gib", "above_start")
        ratios = [ours[name] / theirs[name] for name in (*names, "mean_response_tokens")]
        lines.append(f"| {kind} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
        alike = alike and ratios[-1] >= 1 - SAME_LENGTH  # where ours are longer, the ratio is a lower bound
    if len(lines) == 2:
        return ["one side only: nothing to compare"], True
    if not alike:
        lines += ["", "OUR RESPONSES ARE SHORTER: no comparison of samples; read the tokens, or take more steps."]
    return lines, alike


def machine() -> dict[str, Any]:
    """The contenders' versions are with each run."""
    found = {"python": platform.python_version(), "cpus": os.cpu_count(), "platform": platform.platform()}
    return found | {"torch": importlib.metadata.version("torch"), "load_average": os.getloadavg()[0]}


if __name__ == "__main__":
    sys.exit(main())
