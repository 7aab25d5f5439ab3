"""What dpo_vs_trl.py and reward_vs_trl.py share: the same slice and pairs for every contender, runs, tables.

Every contender trains the same slice of a real model on the same pairs in the same order, each in a process of its
own, one after the other.
"""

import argparse
import contextlib
import gzip
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORDER_SEED = 0
"""Seed of the order in which our stages take the pairs."""
MEMORY_STEPS = 2  # from the second step on, Adam's moments are there while activations are
GIB = 2**30
SPEEDS = ("pairs_per_second", "pairs_per_cpu_second")
"""The second one is fair on a machine that does something else as well."""
TRL_DEFAULT = "TRL"
"""The contender that leaves its trainer's settings as they are, but for precision."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is trained beside TRL, and by whom."""

    stage: str
    """reward or dpo."""
    contenders: dict[str, dict[str, Any]]
    """Who takes part, in the order of the first round; every other round goes backwards."""
    extra: dict[str, dict[str, Any]]
    """Only when named."""
    settings: dict[str, Any]
    """What all contenders are told."""
    tolerance: dict[str, float]
    """Largest difference of each figure of a step between two sides that compute the same."""
    start_loss: float | None = None
    """What the loss of the first step is known to be; ``None`` where it depends on the model."""
    goal_speed: float
    """Times the pairs a second of the fastest TRL."""
    goal_memory: float | None = None
    """Share of the peak memory of the first TRL contender at most, if there is such a goal."""

    @property
    def all_contenders(self) -> dict[str, dict[str, Any]]:
        return self.contenders | self.extra

    def plain(self, name: str) -> bool:
        """Whether a contender is to compute what TRL does: those with a margin do not."""
        return self.all_contenders[name].get("margin", "none") == "none"


def compare(comparison: Comparison, parser: argparse.ArgumentParser) -> int:
    """Run what the command line asks for; the exit code, 1 where the sides do not compute the same."""
    options = checked_options(comparison, parser)
    work = Path(tempfile.mkdtemp(prefix=f"{comparison.stage}_vs_trl-", dir=options.work))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets whoever imports Transformers
            shared = prepare(comparison, options, work)
        runs = measure(comparison, options, shared, work)
    finally:
        shutil.rmtree(work)
    rows, differences = summary(comparison, runs), agreement(comparison, runs)
    agreed = agreement_lines(comparison, differences)
    print("\n" + "\n".join([*table(rows), "", *verdict(comparison, rows), "", *agreed]))
    if options.output is not None:
        chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        report = {"options": chosen, "machine": machine(), "runs": runs, "summary": rows, "differences": differences}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(agrees(comparison, found) for found in differences.values()) else 1


def parser_of(comparison: Comparison, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--data", type=Path, help="conversational preference pairs, jsonl or jsonl.gz")
    parser.add_argument("--memory-case", action="store_true", help="synthetic rows of exactly --max-tokens tokens")
    parser.add_argument("--layers", type=int, default=8, help="first so many layers (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=64, help="one pass over so many (default %(default)s)")
    parser.add_argument("--pairs-per-step", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="pairs with longer rows are not taken")
    parser.add_argument("--threads", type=int, default=2, help="of each contender (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which of the pairs are taken (default %(default)s)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=list(comparison.all_contenders),
        default=list(comparison.contenders),
        metavar="NAME",
        help=f"default: all but {'; '.join(comparison.extra)}",
    )
    parser.add_argument("--work", type=Path, help="scratch folder, about 1.5 GB (default: the system's)")
    parser.add_argument("--output", type=Path, help="write everything measured here, as JSON")
    return parser


def checked_options(comparison: Comparison, parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        parser.error(
            f"--model {options.model}: there is no model. `make quickstart` makes models/SmolLM2-135M-Instruct; "
            "`rlhf import-gguf` turns any GGUF file into a folder"
        )
    if (options.data is None) != options.memory_case:
        parser.error("give --data PAIRS or --memory-case, one of them")
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data {options.data}: there is no such file")
    if options.pairs % options.pairs_per_step:
        parser.error(f"--pairs {options.pairs} is no multiple of --pairs-per-step {options.pairs_per_step}")
    if options.memory_case:
        options.pairs = MEMORY_STEPS * options.pairs_per_step
    if any(comparison.all_contenders[name]["side"] == "trl" for name in options.contenders):
        try:
            importlib.metadata.version("trl")
        except importlib.metadata.PackageNotFoundError:
            parser.error("TRL is not installed: pip install trl==1.16.0")
    return options


# What all contenders share


def prepare(comparison: Comparison, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The model's slice and the pairs, as files; the settings of every contender."""
    from transformers.utils import logging as transformers_logging

    from rlhf.data.batching import global_batch
    from rlhf.models.tokenizer import load_tokenizer

    transformers_logging.set_verbosity_error()  # the layers that are left out are no news
    transformers_logging.disable_progress_bar()
    folder = work / "model"
    tokenizer = load_tokenizer(options.model)  # its padding token ends no text: TRL reads the score before padding
    model_slice(comparison, options, tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.chat_template = without_last_space(tokenizer.get_chat_template())
    tokenizer.save_pretrained(folder)
    pairs = exact_pairs(options, tokenizer) if options.memory_case else fitting_pairs(options, tokenizer)
    steps = options.pairs // options.pairs_per_step
    batches = [
        global_batch(step, items=options.pairs, batch_size=options.pairs_per_step, seed=ORDER_SEED)
        for step in range(steps)
    ]
    ordered = [pairs[index] for batch in batches for index in batch]
    return comparison.settings | {
        "stage": comparison.stage,
        "order_seed": ORDER_SEED,
        "model": str(folder),
        "pairs": str(write_lines(work / "pairs.jsonl", pairs)),
        "ordered_pairs": str(write_lines(work / "ordered_pairs.jsonl", ordered)),
        "pairs_per_step": options.pairs_per_step,
        "max_tokens": options.max_tokens,
        "threads": options.threads,
    }


def model_slice(comparison: Comparison, options: argparse.Namespace, pad: int) -> Any:
    """The first layers of the model in float32; as a reward model under a head of one label, drawn from the seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(options.model)
    config.num_hidden_layers = options.layers
    if comparison.stage == "dpo":
        return AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=torch.float32)
    config.num_labels, config.pad_token_id = 1, pad
    model = AutoModelForSequenceClassification.from_pretrained(options.model, config=config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(options.seed)
    torch.nn.init.normal_(model.score.weight, std=config.initializer_range, generator=generator)
    return model


def without_last_space(template: str) -> str:
    """The template without white space behind the last message.

    TRL trains the model to write that space, ours ends with the end token; so both get the same tokens.
    """
    return "{% set text %}" + template + "{% endset %}{{ text if add_generation_prompt else text.rstrip() }}"


def tokens_of(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> int:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def fitting_pairs(options: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """A seeded sample of the pairs whose rows both fit: neither side has anything to cut."""
    content = options.data.read_bytes()
    if options.data.suffix == ".gz":
        content = gzip.decompress(content)
    found = [json.loads(line) for line in content.decode().splitlines()]
    random.Random(options.seed).shuffle(found)
    pairs: list[dict[str, Any]] = []
    for row in found:
        longest = max(tokens_of(tokenizer, row["prompt"] + row[side]) for side in ("chosen", "rejected"))
        if longest <= options.max_tokens:
            pairs.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
        if len(pairs) == options.pairs:
            return pairs
    raise SystemExit(f"{options.data}: {len(pairs)} pairs fit into {options.max_tokens} tokens, not {options.pairs}")


def exact_pairs(options: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]]:
    """Pairs of random words; every row has max_tokens tokens, half of them in the response."""
    generator = random.Random(options.seed)
    words = sorted(
        token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isascii() and token[1:].islower()
    )
    words = [word for word in words if word.isalpha() and len(word) > 3]

    def written(role: str, before: list[dict[str, str]], target: int) -> list[dict[str, str]]:
        text = [generator.choice(words) for _ in range(target)]
        while True:
            messages = [{"role": role, "content": " ".join(text)}]
            excess = tokens_of(tokenizer, before + messages, prompt=role == "user") - target
            if excess == 0:
                return messages
            text = text[:-excess] if excess > 0 else text + [generator.choice(words) for _ in range(-excess)]

    pairs = []
    for _ in range(options.pairs):
        prompt = written("user", [], options.max_tokens // 2)
        sides = {side: written("assistant", prompt, options.max_tokens) for side in ("chosen", "rejected")}
        pairs.append({"prompt": prompt, **sides})
    return pairs


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# The runs


def measure(
    comparison: Comparison, options: argparse.Namespace, shared: dict[str, Any], work: Path
) -> list[dict[str, Any]]:
    """One record by contender and round."""
    runs = []
    for number in range(options.rounds):
        for name in options.contenders[:: -1 if number % 2 else 1]:
            settings = shared | comparison.all_contenders[name]
            run = run_contender(name, settings, work / f"run-{len(runs)}")
            run |= {"contender": name, "round": number, "pairs": options.pairs}
            run["pairs_per_second"] = options.pairs / (run["reference_seconds"] + run["training_seconds"])
            run["pairs_per_cpu_second"] = options.pairs / run["cpu_seconds"]
            check_tokens(run, options)
            peak = run["peak_rss_bytes"][-1] / GIB
            print(f"{name}: {run['pairs_per_second']:.3f} pairs/s, peak {peak:.2f} GiB", file=sys.stderr, flush=True)
            runs.append(run)
    return runs


def run_contender(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Start it in a process of its own and read what it measured."""
    folder.mkdir()
    written, measured, log = folder / "settings.json", folder / "measured.json", folder / "log.txt"
    written.write_text(json.dumps(settings | {"folder": str(folder)}))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(settings["threads"]),
        "MKL_NUM_THREADS": str(settings["threads"]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).with_name("pair_contender.py")), str(written), str(measured)]
    with log.open("w") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{name} ended with code {code}:\n" + "\n".join(log.read_text().splitlines()[-30:]))
    result = json.loads(measured.read_text())
    shutil.rmtree(folder)  # checkpoints of several hundred MB
    return result


def check_tokens(run: dict[str, Any], options: argparse.Namespace) -> None:
    """Refuse a run that did not see every row whole."""
    steps = options.pairs // options.pairs_per_step
    assert len(run["steps"]) == len(run["peak_rss_bytes"]) == steps, f"{run['contender']}: not {steps} steps"
    if options.memory_case:
        assert run["tokens"] == 2 * options.pairs * options.max_tokens, f"{run['contender']}: {run['tokens']} tokens"


# What came out


def summary(comparison: Comparison, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds, and ratios to the fastest and to the leanest TRL of this table."""
    rows = []
    for name in dict.fromkeys(run["contender"] for run in runs):
        own = [run for run in runs if run["contender"] == name]
        loaded = statistics.median(run["loaded_rss_bytes"] for run in own)
        peak = statistics.median(run["peak_rss_bytes"][-1] for run in own)
        row = {"contender": name, "side": comparison.all_contenders[name]["side"]}
        for name in SPEEDS:
            row[name] = statistics.median(run[name] for run in own)
        row |= {"loaded_rss_bytes": loaded, "peak_rss_bytes": peak, "above_loaded_bytes": peak - loaded}
        row["first_step_peak_rss_bytes"] = statistics.median(run["peak_rss_bytes"][0] for run in own)
        row["padding_share"] = 1 - own[0]["needed_tokens"] / own[0]["computed_tokens"]
        rows.append(row | {"computed_share": own[0]["computed_tokens"] / own[0]["tokens"]})
    theirs = [row for row in rows if row["side"] == "trl"]
    for row in rows if theirs else []:
        for name in SPEEDS:
            row[f"{name}_ratio"] = row[name] / max(other[name] for other in theirs)
        for name in ("peak_rss", "above_loaded"):
            row[f"{name}_ratio"] = row[f"{name}_bytes"] / min(other[f"{name}_bytes"] for other in theirs)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    heads = ("contender", "pairs/s", "of fastest TRL", "pairs/CPU s", "of fastest TRL")
    heads += ("RSS loaded", "RSS peak", "of leanest TRL")
    heads += ("peak above loaded", "of leanest TRL", "padding", "tokens computed")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        loaded, peak, above = (
            f"{row[f'{name}_bytes'] / GIB:.2f} GiB" for name in ("loaded_rss", "peak_rss", "above_loaded")
        )
        wall, cpu, peak_ratio, above_ratio = (
            f"{row[f'{name}_ratio']:.2f}" if f"{name}_ratio" in row else "-"
            for name in (*SPEEDS, "peak_rss", "above_loaded")
        )
        cells = (row["contender"], f"{row['pairs_per_second']:.3f}", wall, f"{row['pairs_per_cpu_second']:.3f}", cpu)
        cells += (loaded, peak, peak_ratio, above)
        shares = (f"{row['padding_share']:.1%}", f"{row['computed_share']:.0%} of real ones")
        lines.append("| " + " | ".join([*cells, above_ratio, *shares]) + " |")
    return lines


def verdict(comparison: Comparison, rows: list[dict[str, Any]]) -> list[str]:
    """Each of ours against the goals, by the strictest reading of speed: beside the fastest TRL."""
    ours, theirs = ([row for row in rows if row["side"] == side] for side in ("ours", "trl"))
    if not ours or not theirs:
        return ["one side only: nothing to compare"]
    fastest = max(theirs, key=lambda row: row["pairs_per_second"])
    default = next((row for row in theirs if row["contender"] == TRL_DEFAULT), None)
    lines = [f"fastest TRL: {fastest['contender']}"]
    for row in ours:
        speed, limit = row["pairs_per_second_ratio"], comparison.goal_memory
        line = f"{row['contender']}: {speed:.2f} times the pairs per second of the fastest TRL (goal "
        line += f"{comparison.goal_speed:g}: {_met(speed >= comparison.goal_speed)})"
        if default is not None:
            of_default = row["peak_rss_bytes"] / default["peak_rss_bytes"]
            line += f", {row['pairs_per_second'] / default['pairs_per_second']:.2f} times those of its defaults and "
            line += f"{of_default:.2f} of their peak memory"
            line += "" if limit is None else f" (goal {limit:.2f}: {_met(of_default <= limit)})"
        lines.append(line)
    return lines


def _met(flag: bool) -> str:
    return "met" if flag else "missed"


def agreement(comparison: Comparison, runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Largest differences over all steps from the first TRL run; each step has the same pairs on both sides.

    Contenders with a margin train something else, and are left out.
    """
    runs = [run for run in runs if comparison.plain(run["contender"])]
    if not runs:
        return {}
    reference = next((run for run in runs if run["contender"].startswith("TRL")), runs[0])
    differences = {}
    for run in runs:
        assert run["tokens"] == reference["tokens"], f"{run['contender']} saw other tokens than the first run"
        found = {
            name: max(abs(a[name] - b[name]) for a, b in zip(run["steps"], reference["steps"], strict=True))
            for name in comparison.tolerance
        }
        first, last = run["steps"][0], run["steps"][-1]
        start = first["loss"] if comparison.start_loss is None else comparison.start_loss
        found["loss_moved"] = max(abs(step["loss"] - start) for step in run["steps"])
        found |= {f"first_{name}": first[name] for name in comparison.tolerance}
        differences[f"{run['contender']}, round {run['round'] + 1}"] = found | {"last_loss": last["loss"]}
    return differences


def agrees(comparison: Comparison, found: dict[str, float]) -> bool:
    return all(found[name] <= limit for name, limit in comparison.tolerance.items())


def agreement_lines(comparison: Comparison, differences: dict[str, dict[str, float]]) -> list[str]:
    names = list(comparison.tolerance)
    limits = ", ".join(f"{name} {limit:g}" for name, limit in comparison.tolerance.items())
    heads = ["run", *(f"{name}, step 1" for name in names), "loss, last step", "loss moved by"]
    heads += [f"difference: {name}" for name in names]
    lines = [f"Largest differences over all steps from the first TRL run (limits: {limits}):", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for run, found in differences.items():
        cells = [run, *(f"{found[f'first_{name}']:.4f}" for name in names), f"{found['last_loss']:.6f}"]
        cells += [f"{found[key]:.1e}" for key in ("loss_moved", *names)]
        lines.append("| " + " | ".join(cells) + " |")
    same = all(agrees(comparison, found) for found in differences.values())
    return [*lines, "", "Both compute the same." if same else "THEY DO NOT COMPUTE THE SAME: no comparison of speed."]


def machine() -> dict[str, Any]:
    versions = {}
    for name in ("torch", "transformers", "trl", "accelerate", "datasets"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "cpus": os.cpu_count(), "platform": platform.platform(), **versions}
