"""Sigmoid DPO side by side with TRL's DPOTrainer: pairs per second, peak memory, and whether both compute the same.

Every contender trains the same slice of a real model on the same pairs in the same order, each in a process of its
own, one after the other. Give them an idle machine.

    python benchmarks/dpo_vs_trl.py --model models/SmolLM2-135M-Instruct --data PAIRS.jsonl.gz
    python benchmarks/dpo_vs_trl.py --model models/SmolLM2-135M-Instruct --memory-case
"""

import argparse
import contextlib
import gzip
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONTENDERS = {
    "TRL": {"side": "trl", "precompute": False, "gradient_checkpointing": True},
    "ours, 8192 tokens": {"side": "ours", "micro_batch_tokens": 8192, "gradient_checkpointing": False},
    "TRL, precomputed": {"side": "trl", "precompute": True, "gradient_checkpointing": True},
    "ours, 2048 tokens": {"side": "ours", "micro_batch_tokens": 2048, "gradient_checkpointing": False},
    "TRL, no checkpointing": {"side": "trl", "precompute": False, "gradient_checkpointing": False},
    "ours, 2048 tokens, checkpointing": {"side": "ours", "micro_batch_tokens": 2048, "gradient_checkpointing": True},
    "TRL, precomputed, no checkpointing": {"side": "trl", "precompute": True, "gradient_checkpointing": False},
}
"""Contenders in the order of the first round; every other round goes backwards."""
EXTRA = {
    "TRL, precomputed, 2 pairs at once": {
        "side": "trl",
        "precompute": True,
        "gradient_checkpointing": True,
        "pairs_at_once": 2,
    },
    "ours, 1024 tokens": {"side": "ours", "micro_batch_tokens": 1024, "gradient_checkpointing": False},
    "ours, 8192 tokens, checkpointing": {"side": "ours", "micro_batch_tokens": 8192, "gradient_checkpointing": True},
}
"""Only when named. Two pairs at once, accumulated to a step: TRL's counterpart of our smaller token budgets."""
SETTINGS = {"beta": 0.1, "learning_rate": 1e-6, "order_seed": 0}
MEMORY_STEPS = 2  # from the second step on, Adam's moments are there while activations are
TOLERANCE = {"loss": 1e-4, "gap": 1e-4, "chosen": 1e-2, "rejected": 1e-2}
"""Loss and gap of implicit rewards; log-probabilities summed over some hundred response tokens, mean over the step."""
GIB = 2**30
GOAL_SPEED, GOAL_MEMORY = 2.0, 1 / 3


def main() -> int:
    options = parse_options()
    work = Path(tempfile.mkdtemp(prefix="dpo_vs_trl-", dir=options.work))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets whoever imports Transformers
            shared = prepare(options, work)
        runs = measure(options, shared, work)
    finally:
        shutil.rmtree(work)
    rows, differences = summary(runs), agreement(runs)
    print("\n" + "\n".join([*table(rows), "", *verdict(rows), "", *agreement_lines(differences)]))
    if options.output is not None:
        chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        report = {"options": chosen, "machine": machine(), "runs": runs, "summary": rows, "differences": differences}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(agrees(found) for found in differences.values()) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    names = {"choices": [*CONTENDERS, *EXTRA], "default": list(CONTENDERS), "metavar": "NAME"}
    parser.add_argument("--contenders", nargs="+", **names, help=f"default: all but {'; '.join(EXTRA)}")
    parser.add_argument("--work", type=Path, help="scratch folder, about 1.5 GB (default: the system's)")
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
    if (options.data is None) != options.memory_case:
        parser.error("give --data PAIRS or --memory-case, one of them")
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data {options.data}: there is no such file")
    if options.pairs % options.pairs_per_step:
        parser.error(f"--pairs {options.pairs} is no multiple of --pairs-per-step {options.pairs_per_step}")
    if options.memory_case:
        options.pairs = MEMORY_STEPS * options.pairs_per_step
    if any((CONTENDERS | EXTRA)[name]["side"] == "trl" for name in options.contenders):
        try:
            importlib.metadata.version("trl")
        except importlib.metadata.PackageNotFoundError:
            parser.error("TRL is not installed: pip install trl==1.16.0")
    return options


# What all contenders share


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The model's slice and the pairs, as files; the settings of every contender."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from rlhf.data.batching import global_batch

    transformers_logging.set_verbosity_error()  # the layers that are left out are no news
    transformers_logging.disable_progress_bar()
    folder = work / "model"
    config = AutoConfig.from_pretrained(options.model)
    config.num_hidden_layers = options.layers
    AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = without_last_space(tokenizer.get_chat_template())
    tokenizer.save_pretrained(folder)
    pairs = exact_pairs(options, tokenizer) if options.memory_case else fitting_pairs(options, tokenizer)
    steps = options.pairs // options.pairs_per_step
    batches = [
        global_batch(step, items=options.pairs, batch_size=options.pairs_per_step, seed=SETTINGS["order_seed"])
        for step in range(steps)
    ]
    ordered = [pairs[index] for batch in batches for index in batch]
    return SETTINGS | {
        "model": str(folder),
        "pairs": str(write_lines(work / "pairs.jsonl", pairs)),
        "ordered_pairs": str(write_lines(work / "ordered_pairs.jsonl", ordered)),
        "pairs_per_step": options.pairs_per_step,
        "max_tokens": options.max_tokens,
        "threads": options.threads,
    }


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


def measure(options: argparse.Namespace, shared: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """One record by contender and round."""
    runs = []
    for number in range(options.rounds):
        for name in options.contenders[:: -1 if number % 2 else 1]:
            run = run_contender(name, shared, work / f"run-{len(runs)}")
            run |= {"contender": name, "round": number, "pairs": options.pairs}
            run["pairs_per_second"] = options.pairs / (run["reference_seconds"] + run["training_seconds"])
            check_tokens(run, options)
            peak = run["peak_rss_bytes"][-1] / GIB
            print(f"{name}: {run['pairs_per_second']:.3f} pairs/s, peak {peak:.2f} GiB", file=sys.stderr, flush=True)
            runs.append(run)
    return runs


def run_contender(name: str, shared: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Start it in a process of its own and read what it measured."""
    folder.mkdir()
    settings, measured, log = folder / "settings.json", folder / "measured.json", folder / "log.txt"
    settings.write_text(json.dumps(shared | (CONTENDERS | EXTRA)[name] | {"folder": str(folder)}))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(shared["threads"]),
        "MKL_NUM_THREADS": str(shared["threads"]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).with_name("dpo_contender.py")), str(settings), str(measured)]
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


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds, and ratios to the fastest and to the leanest TRL of this table."""
    rows = []
    for name in dict.fromkeys(run["contender"] for run in runs):
        own = [run for run in runs if run["contender"] == name]
        loaded = statistics.median(run["loaded_rss_bytes"] for run in own)
        peak = statistics.median(run["peak_rss_bytes"][-1] for run in own)
        row = {"contender": name, "side": (CONTENDERS | EXTRA)[name]["side"]}
        row["pairs_per_second"] = statistics.median(run["pairs_per_second"] for run in own)
        row |= {"loaded_rss_bytes": loaded, "peak_rss_bytes": peak, "above_loaded_bytes": peak - loaded}
        row["first_step_peak_rss_bytes"] = statistics.median(run["peak_rss_bytes"][0] for run in own)
        rows.append(row | {"padding_share": 1 - own[0]["tokens"] / own[0]["padded_tokens"]})
    theirs = [row for row in rows if row["side"] == "trl"]
    for row in rows if theirs else []:
        row["speed_ratio"] = row["pairs_per_second"] / max(other["pairs_per_second"] for other in theirs)
        for name in ("peak_rss", "above_loaded"):
            row[f"{name}_ratio"] = row[f"{name}_bytes"] / min(other[f"{name}_bytes"] for other in theirs)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    heads = ("contender", "pairs/s", "of fastest TRL", "RSS loaded", "RSS peak", "of leanest TRL")
    heads += ("peak above loaded", "of leanest TRL", "padding")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        loaded, peak, above = (
            f"{row[f'{name}_bytes'] / GIB:.2f} GiB" for name in ("loaded_rss", "peak_rss", "above_loaded")
        )
        speed, peak_ratio, above_ratio = (
            f"{row[f'{name}_ratio']:.2f}" if f"{name}_ratio" in row else "-"
            for name in ("speed", "peak_rss", "above_loaded")
        )
        cells = (row["contender"], f"{row['pairs_per_second']:.3f}", speed, loaded, peak, peak_ratio, above)
        lines.append("| " + " | ".join([*cells, above_ratio, f"{row['padding_share']:.1%}"]) + " |")
    return lines


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Each of ours against the goals, by the strictest reading: the fastest and the leanest TRL need not be one."""
    ours, theirs = ([row for row in rows if row["side"] == side] for side in ("ours", "trl"))
    if not ours or not theirs:
        return ["one side only: nothing to compare"]
    fastest = max(theirs, key=lambda row: row["pairs_per_second"])
    leanest = min(theirs, key=lambda row: row["peak_rss_bytes"])
    lines = [f"fastest: {fastest['contender']}; leanest: {leanest['contender']}"]
    for row in ours:
        speed, memory = row["speed_ratio"], row["peak_rss_ratio"]
        of_fastest = row["peak_rss_bytes"] / fastest["peak_rss_bytes"]
        lines.append(
            f"{row['contender']}: {speed:.2f} times the pairs per second of the fastest TRL "
            f"(goal {GOAL_SPEED:g}: {_met(speed >= GOAL_SPEED)}), {of_fastest:.2f} of its peak memory "
            f"(goal {GOAL_MEMORY:.2f}: {_met(of_fastest <= GOAL_MEMORY)}), {memory:.2f} of that of the leanest TRL "
            f"({_met(memory <= GOAL_MEMORY)})"
        )
    return lines


def _met(flag: bool) -> str:
    return "met" if flag else "missed"


def agreement(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Largest differences over all steps from the first TRL run; each step has the same pairs on both sides."""
    reference = next((run for run in runs if run["contender"].startswith("TRL")), runs[0])
    differences = {}
    for run in runs:
        assert run["tokens"] == reference["tokens"], f"{run['contender']} saw other tokens than the first run"
        found = {
            name: max(abs(a[name] - b[name]) for a, b in zip(run["steps"], reference["steps"], strict=True))
            for name in TOLERANCE
        }
        moved = max(abs(step["loss"] - math.log(2)) for step in run["steps"])
        first, last = run["steps"][0], run["steps"][-1]
        found |= {"loss_moved": moved, "first_chosen": first["chosen"], "first_rejected": first["rejected"]}
        differences[f"{run['contender']}, round {run['round'] + 1}"] = found | {"last_loss": last["loss"]}
    return differences


def agrees(found: dict[str, float]) -> bool:
    return all(found[name] <= limit for name, limit in TOLERANCE.items())


def agreement_lines(differences: dict[str, dict[str, float]]) -> list[str]:
    limits = ", ".join(f"{name} {limit:g}" for name, limit in TOLERANCE.items())
    heads = ("run", "chosen, step 1", "rejected, step 1", "loss, last step", "moved from log 2 by")
    heads += tuple(f"difference: {name}" for name in TOLERANCE)
    lines = [f"Largest differences over all steps from the first TRL run (limits: {limits}):", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, found in differences.items():
        cells = [name, f"{found['first_chosen']:.4f}", f"{found['first_rejected']:.4f}", f"{found['last_loss']:.6f}"]
        cells += [f"{found[key]:.1e}" for key in ("loss_moved", *TOLERANCE)]
        lines.append("| " + " | ".join(cells) + " |")
    same = all(agrees(found) for found in differences.values())
    return [*lines, "", "Both compute the same." if same else "THEY DO NOT COMPUTE THE SAME: no comparison of speed."]


def machine() -> dict[str, Any]:
    versions = {}
    for name in ("torch", "transformers", "trl", "accelerate", "datasets"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "cpus": os.cpu_count(), "platform": platform.platform(), **versions}


if __name__ == "__main__":
    sys.exit(main())
