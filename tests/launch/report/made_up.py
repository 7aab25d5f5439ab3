"""Run folders as stages write them, filled with numbers of no meaning and with texts that would like to be scripts."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from policy.grading.results import CATEGORIES
from policy.grading.results import summarize as summarize_grades
from policy.tax.results import TaskTax, Tax
from policy.win_rate.rate import win_rate
from policy.win_rate.run import Comparison
from reward.benchmarks.formulas import Scored
from reward.benchmarks.results import summarize, to_dict
from rlhf.core.files import write_json, write_text
from rlhf.core.findings import write_findings
from rlhf.core.intervals import Estimate
from rlhf.train.status import new_status, write_status

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def accuracy(value: float, pairs: int = 100) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.09, "pairs": pairs, "ties": 0}


def pair_evaluation() -> dict[str, Any]:
    buckets = [{"smallest": -9 + 5 * n, "largest": -5 + 5 * n, "accuracy": accuracy(0.6 + n / 20)} for n in range(4)]
    return {
        "accuracy": accuracy(0.75),
        "length_baseline": accuracy(0.55),
        "mean_loss": 0.5,
        "calibration_error": 0.04,
        "mean_gap": 0.8,
        "by_length_difference": buckets,
        "by_score_gap": None,
        "step": 40,
    }


def pair_rows(text: str = "plain") -> list[dict[str, Any]]:
    draw = random.Random(0)
    rows = []
    for number in range(100):
        gap = draw.gauss(0.8, 1)
        row: dict[str, Any] = {"row": f"pairs.jsonl:{number}", "group": str(number), "value": float(gap > 0)}
        row |= {"chosen_reward": gap, "rejected_reward": 0.0, "chosen_tokens": 12, "rejected_tokens": 9}
        if number < 20:
            row |= {"prompt": f"{text} prompt", "chosen": f"{text} chosen", "rejected": f"{text} rejected"}
        rows.append(row)
    return rows


def reward_run(folder: Path, *, steps: int = 40, seed: int = 0, text: str = "plain", state: str = "finished") -> Path:
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    margins: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.5 + 0.5 * math.exp(-step / 20) + draw.gauss(0, 0.05)
        middle = 0.5 - step / 100
        row = {"loss": loss, "accuracy": 0.7, "reward/chosen": step / 40, "reward/rejected": -step / 40}
        row |= {"margin/p10": middle - 0.1, "margin/p50": middle, "margin/p90": middle + 0.1, "grad_norm": 1.0}
        row |= {"time/step_seconds": 2.0, "time/pairs_per_second": 8.0, "time/tokens_per_second": 900.0}
        row |= {"memory/peak_gib": 1.5, "learning_rate": 1e-4, "step_skipped": 0.0}
        rows.append({"step": step, **row})
        margins.append({"step": step, "margin": [middle, 0.2], "gap": [step / 20, 0.1], "similarity": [0.9, 0.8]})
    rows.append({"step": steps, "eval/accuracy": 0.75, "eval/loss": 0.5})
    lines(folder / "metrics.jsonl", rows)
    lines(folder / "margins.jsonl", margins)
    lines(folder / "held_out.jsonl", pair_rows(text))
    lines(
        folder / "warnings.jsonl", [{"time": 0.0, "step": 3, "from": "rlhf.x", "text": f"{text} warning: set a=b"}] * 2
    )
    write_json(folder / "evaluation.json", pair_evaluation())
    write_json(folder / "data.json", {"train": {"items": 640, "fingerprint": "abc"}, "report": [f"template: {text}"]})
    write_text(folder / "config.yaml", f"output: {folder}\ntrain: {{seed: {seed}}}\nmodel: {{path: m}}\n")
    write_status(folder, new_status("reward", state=state, step=steps, total=steps))
    return folder


def preference_run(folder: Path, *, text: str = "plain") -> Path:
    rows: list[dict[str, Any]] = []
    for step in range(1, 21):
        row = {"loss": 1.0 - step / 100, "accuracy": 0.6, "zero_gradient_share": step / 30, "kl": step / 10}
        row |= {
            f"logprobs/{side}_drift_per_token": -step * slope for side, slope in (("chosen", 0.03), ("rejected", 0.05))
        }
        rows.append({"step": step, **row})
    rows.append({"step": 20, "eval/chosen_drift_per_token": -0.6, "eval/rejected_drift_per_token": -1.0})
    lines(folder / "metrics.jsonl", rows)
    lines(folder / "held_out.jsonl", pair_rows(text))
    write_json(folder / "evaluation.json", pair_evaluation())
    write_status(folder, new_status("preference", state="finished", step=20, total=20))
    return folder


def ppo_run(folder: Path, *, text: str = "plain", parts: bool = True) -> Path:
    rows: list[dict[str, Any]] = []
    for step in range(1, 17):
        second = 0.1 * step if step < 8 or not parts else 0.7 - 0.2 * (step - 7)
        row = {"reward": 0.2 * step, "score": 0.2 * step, "second": second, "kl": 1.5 * step, "entropy": 3 - step / 20}
        row |= {"score_deviation": 1.0, "second_deviation": 0.5, "tokens_per_response": 30.0 + step, "ended_share": 0.5}
        rows.append({"step": step, **row})
    lines(folder / "metrics.jsonl", rows)
    said = {
        "row": "prompts.jsonl:1",
        "prompt": f"{text} prompt",
        "response": f"{text} response",
        "tokens": 9,
        "ended": True,
    }
    lines(folder / "rollouts.jsonl", [{"step": step, "reward": step / 4, "kl": 1.0, **said} for step in (1, 16)])
    lines(folder / "held_out.jsonl", [{"reward": 1.0, "value": 1.0, "group": "1", "kl": 3.0, **said}])
    estimate = {"value": 1.0, "low": 0.8, "high": 1.2}
    record = {"reward": estimate, "score": estimate, "second": None, "kl": 3.0, "tokens": 31.0, "ended_share": 0.5}
    write_json(folder / "evaluation.json", record | {"prompts": 32, "step": 16})
    write_status(folder, new_status("ppo", state="finished", step=16, total=16))
    return folder


def evaluate_run(folder: Path, *, text: str = "plain") -> Path:
    found = []
    for number, name in enumerate(("reference", "ppo")):
        estimate = {"value": 0.2 + number / 2, "low": 0.1 + number / 2, "high": 0.3 + number / 2}
        more = {"kl": 2.0 * number, "kl_k3": 2.0 * number, "log_ratio": 2.0 * number, "tokens": 30.0, "prompts": 6}
        gain = {"value": 0.5, "low": 0.3, "high": 0.7} if number else None
        found.append({"name": name, "reward": estimate, "gain": gain, "ended_share": 0.5, "samples": 6, **more})
        said = [{"prompt": f"{text} prompt {n}", "response": f"{text} says {name} {n}"} for n in range(6)]
        rows = [{**each, "reward": number + n / 10, "ended": True} for n, each in enumerate(said)]
        lines(folder / f"samples_{name}.jsonl", rows)
    write_json(folder / "evaluation.json", {"kind": "evaluation", "policies": found})
    write_status(folder, new_status("evaluation", state="finished"))
    return folder


def benchmark_run(folder: Path, *, text: str = "plain") -> Path:
    draw = np.random.default_rng(0)
    items = [Scored(id=str(n), subset=f"{text} {n % 2}", scores=draw.normal([1, 0]), right=1) for n in range(40)]
    lengths, elsewhere = draw.integers(1, 9, (40, 2)), draw.normal(size=(40, 2))
    annotated = draw.integers(1, 6, (40, 2)).astype(float)
    found = summarize(
        "hh", text, items, lengths=lengths, elsewhere=elsewhere, annotated=annotated, notes=[f"{text} note"]
    )
    rows = [{"id": each.id, "subset": each.subset, "right": 1, "scores": each.scores.tolist()} for each in items]
    write_findings(folder, "benchmark", to_dict(found), rows)
    write_status(folder, new_status("benchmark", state="finished"))
    return folder


def win_rate_run(folder: Path, *, text: str = "plain") -> Path:
    draw = np.random.default_rng(0)
    preferences = draw.choice([0.0, 0.5, 1.0], 60, p=[0.3, 0.1, 0.6])
    rate = win_rate(preferences, draw.integers(50, 900, 60), draw.integers(50, 700, 60))
    found = Comparison(
        name=f"{text} new",
        reference="old",
        judge="a judge",
        questions=61,
        left_out=1,
        rate=rate,
        notes=(f"{text} note",),
    )
    answers = {"prompt": f"{text} prompt", "own": f"{text} own answer", "other": "the other answer"}
    rows = [{"id": f"outputs.json:{n}", **answers, "preference": each} for n, each in enumerate(preferences.tolist())]
    write_findings(folder, "win_rate", asdict(found), [*rows, {"id": "outputs.json:61", **answers, "preference": None}])
    write_status(folder, new_status("win_rate", state="finished"))
    return folder


def grading_run(folder: Path, *, text: str = "plain") -> Path:
    draw = np.random.default_rng(0)
    grades = {
        name: {str(n): draw.integers(low, low + 5, 2).astype(float).tolist() for n in range(80)}
        for name, low in ((f"{text} sft", 2), ("dpo", 4))
    }
    categories = {str(n): (*CATEGORIES[:7], f"{text}")[n // 10] for n in range(80)}
    found = summarize_grades("a judge", grades, categories, 80, (f"{text} note",))
    write_findings(folder, "grading", asdict(found), [{"id": "1", "grade": 3.0}])
    write_status(folder, new_status("grading", state="finished"))
    return folder


def tax_run(folder: Path, *, text: str = "plain") -> Path:
    change = Estimate(value=-0.04, low=-0.06, high=-0.02)
    task = {"before": 0.5, "after": 0.46, "higher_is_better": True, "items": 400}
    found = Tax(
        before="sft",
        after=text,
        tasks=(
            TaskTax(task=f"{text} task", measure="acc", change=change, **task),
            TaskTax(task="other", measure="perplexity", change=None, **task),
        ),
    )
    write_findings(folder, "tax", asdict(found), [{"id": "other/1", "before": 0.0, "after": 1.0}])
    write_status(folder, new_status("tax", state="finished"))
    return folder


def sft_run(folder: Path) -> Path:
    rows = [{"step": step, "loss": 3 - step / 10, "grad_norm": 1.0, "learning_rate": 1e-4} for step in range(1, 9)]
    lines(folder / "metrics.jsonl", [*rows, {"step": 8, "eval/loss": 2.0, "eval/perplexity": 7.4}])
    write_json(folder / "evaluation.json", {"loss": 2.0, "perplexity": 7.389, "conversations": 30, "step": 8})
    write_status(folder, new_status("sft", state="finished", step=8, total=8))
    return folder


def pipeline(folder: Path, *, text: str = "plain") -> Path:
    for make, name in (
        (reward_run, "reward"),
        (preference_run, "preference"),
        (ppo_run, "ppo"),
        (evaluate_run, "evaluate"),
    ):
        make(folder / name, text=text)
    return folder


def judged_pipeline(folder: Path, *, text: str = "plain") -> Path:
    """The same with judges at its end."""
    kinds = ((win_rate_run, "win_rate"), (grading_run, "grading"), (tax_run, "tax"), (benchmark_run, "bench"))
    for make, name in kinds:
        make(folder / name, text=text)
    return pipeline(folder, text=text)
