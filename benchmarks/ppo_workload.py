"""What all contenders of ppo_vs_trl.py share: models, prompts, settings, and how a run is measured.

The driver writes the workload once, as plain folders and files; contenders only read it. Reading and measuring needs
nothing beyond the standard library, so that TRL's side pays for none of our packages.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory import memory

SETTINGS = {
    "temperature": 1.0,
    "learning_rate": 1e-6,
    "kl_coefficient": 0.05,
    "gamma": 1.0,
    "lam": 0.95,
    "clip": 0.2,
    "value_clip": 0.2,
    "value_coefficient": 0.1,
    "weight_decay": 0.0,
}
"""AdamW at a constant rate, so small that responses keep their lengths over the few steps of a run."""
GIB = 2**30
FIT_ROWS = 32  # responses that the end token is fitted to, see `end_more_often`


# Written by the driver


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    quickstart = Path("launch/quickstart")
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--layers", type=int, default=8, help="first so many layers (default %(default)s)")
    parser.add_argument("--reward-layers", type=int, help="of reward and value model (default: like --layers)")
    parser.add_argument("--prompts", type=Path, default=quickstart / "prompts_train.jsonl", help='lines with "prompt"')
    parser.add_argument("--prompt-count", type=int, default=256, help="the first so many (default %(default)s)")
    parser.add_argument("--template", default=str(quickstart / "chat.jinja"), help="(default %(default)s)")
    parser.add_argument("--response-tokens", type=int, default=48, help="at most (default %(default)s)")
    parser.add_argument(
        "--end-rate",
        type=float,
        default=0.0,
        help="chance of the end token at each place of a response; 0: the slice as it is, which never ends one",
    )
    parser.add_argument("--rows-per-step", type=int, default=32, help="responses of a step (default %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="of each prompt, RLOO (default %(default)s; PPO: 1)")
    parser.add_argument("--minibatches", type=int, default=2, help="updates of an epoch (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="over the responses of a step (default %(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=1, help="not timed (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="timed (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each contender (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def write_workload(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Policy, reward model and prompts as files; the settings of every contender.

    ``policy/`` and ``reward/`` open with plain Transformers and bring the tokenizer. ``reward/`` has one label and
    is the start of the value model as well. ``prompts.jsonl`` has the text of each prompt as a user writes it
    ("prompt") and as the model reads it ("text").
    """
    from rlhf.data.templates import chat_format
    from rlhf.models.tokenizer import load_tokenizer

    template = Path(options.template).read_text(encoding="utf-8")
    # TRL finds padding by its token: it must be none that prompts or responses have, as the model's own is.
    tokenizer = load_tokenizer(options.model, chat_template=template)
    chat = chat_format(tokenizer, template)
    lines = options.prompts.read_text(encoding="utf-8").splitlines()[: options.prompt_count]
    assert len(lines) == options.prompt_count, f"{options.prompts}: {len(lines)} prompts, not {options.prompt_count}"
    prompts = [json.loads(line)["prompt"] for line in lines]
    rows = [{"prompt": text, "text": chat.render_prompt(({"role": "user", "content": text},))} for text in prompts]
    texts = [row["text"] for row in rows]
    assert tokenizer(texts)["input_ids"] == tokenizer(texts, add_special_tokens=False)["input_ids"], "a BOS was added"
    policy = _policy_slice(options, tokenizer)
    if options.end_rate:
        end_more_often(policy, tokenizer, texts[:FIT_ROWS], options)
    for name, model in (("policy", policy), ("reward", _classifier_slice(options, tokenizer))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = ("response_tokens", "rows_per_step", "minibatches", "epochs", "warmup_steps", "steps", "threads", "seed")
    return SETTINGS | {name: getattr(options, name) for name in names} | {
        "policy": str(folder / "policy"),
        "reward": str(folder / "reward"),
        "prompts": str(folder / "prompts.jsonl"),
    }


def _policy_slice(options: argparse.Namespace, tokenizer: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(options.model)
    config.num_hidden_layers = options.layers
    model = AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=torch.float32)
    for settings in (model.config, model.generation_config):
        settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return model


def _classifier_slice(options: argparse.Namespace, tokenizer: Any) -> Any:
    """The same layers under a random head of one label, drawn from the seed: scores differ, and mean nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(options.model)
    config.num_hidden_layers = options.reward_layers or options.layers
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_pretrained(options.model, config=config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(options.seed)
    torch.nn.init.normal_(model.score.weight, std=config.initializer_range, generator=generator)
    return model


def end_more_often(policy: Any, tokenizer: Any, texts: list[str], options: argparse.Namespace) -> None:
    """Give the end token about the chance ``options.end_rate`` at every place of a response, in place.

    A model without its upper layers never ends a response. The row of the end token in the output projection is
    replaced by the ridge regression of the logit that has this chance on the states of drawn responses.
    """
    import torch

    weight, end = policy.get_output_embeddings().weight, tokenizer.eos_token_id
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(weight.device)
    width, drawing = prompts["input_ids"].shape[1], {"do_sample": True, "temperature": SETTINGS["temperature"]}
    torch.manual_seed(options.seed)
    with torch.no_grad():
        rows = policy.generate(**prompts, **drawing, top_k=0, top_p=1.0, max_new_tokens=options.response_tokens)
        mask = torch.nn.functional.pad(prompts["attention_mask"], (0, rows.shape[1] - width), value=1)
        states = policy.base_model(rows, attention_mask=mask).last_hidden_state[:, width - 1 : -1].flatten(0, 1)
        others = (states @ weight.T).index_fill(1, torch.tensor([end], device=weight.device), -torch.inf)
        wanted = others.logsumexp(-1).double() + torch.tensor(options.end_rate, dtype=torch.double).logit()
        states = states.double()
        ridge = states.pow(2).mean() * torch.eye(states.shape[1], dtype=torch.double, device=states.device)
        weight[end] = torch.linalg.solve(states.T @ states + ridge, states.T @ wanted).to(weight.dtype)


# Used by the contenders


def read_prompts(settings: dict[str, Any]) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()]


class Measured:
    """What one run took, step by step; a step is rollout, scoring and all its updates. Every number is of one process.

    A contender calls ``begin`` when its models are loaded, then for each step ``rollout`` once, ``update`` after
    every optimizer step, ``score`` where it is known, and ``step_done``. ``phase`` may say where the time goes.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.steps: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Every model is in memory, gradients, moments and activations are not; the clock starts."""
        self.start_rss_bytes = memory("VmRSS")
        self._new_step(time.perf_counter())

    def _new_step(self, now: float) -> None:
        self._began, self._cpu_began = now, time.process_time()
        self._step: dict[str, Any] = {"updates": 0, "response_tokens": [], "ended": 0, "score": None}
        self._phases: dict[str, float] = defaultdict(float)
        self._cpu_phases: dict[str, float] = defaultdict(float)

    def rollout(self, response_tokens: Sequence[int], ended: int) -> None:
        """Tokens of each response, the end token included; how many the model ended by itself."""
        self._step["response_tokens"] += list(response_tokens)
        self._step["ended"] += ended

    def update(self, *_: Any) -> None:
        self._step["updates"] += 1

    def score(self, mean: float) -> None:
        """Mean score of the reward model, KL penalty not included."""
        self._step["score"] = mean

    @contextmanager
    def phase(self, name: str):
        began, cpu_began = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._phases[name] += time.perf_counter() - began
            self._cpu_phases[name] += time.process_time() - cpu_began

    def phases(self, seconds: dict[str, float]) -> None:
        """Add phases whose time something else has taken; see :meth:`phase`."""
        self._phases |= seconds

    def step_done(self) -> None:
        now = time.perf_counter()
        self._step |= {"seconds": now - self._began, "cpu_seconds": time.process_time() - self._cpu_began}
        self._step |= {"phases": dict(self._phases), "cpu_phases": dict(self._cpu_phases)}
        self._step["peak_rss_bytes"] = memory("VmHWM")
        torch = sys.modules["torch"]  # whoever trains has imported it
        if torch.cuda.is_available():
            self._step["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        self.steps.append(self._step)
        self._new_step(now)

    def report(self) -> dict[str, Any]:
        """Everything, and the figures of the timed steps."""
        timed = self.steps[self.settings["warmup_steps"] :]
        seconds = sum(step["seconds"] for step in timed)
        tokens = [count for step in timed for count in step["response_tokens"]]
        names = dict.fromkeys(name for step in timed for name in step["phases"])
        phases = {name: sum(step["phases"].get(name, 0.0) for step in timed) / len(timed) for name in names}
        phases["rest"] = seconds / len(timed) - sum(phases.values())
        return {
            "samples_per_second": len(tokens) / seconds,
            "samples_per_cpu_second": len(tokens) / sum(step["cpu_seconds"] for step in timed),
            "response_tokens_per_second": sum(tokens) / seconds,
            "step_seconds": [step["seconds"] for step in timed],
            "phase_seconds": phases,
            "mean_response_tokens": statistics.fmean(tokens),
            "ended_share": sum(step["ended"] for step in timed) / len(tokens),
            "updates": [step["updates"] for step in self.steps],
            "start_rss_gib": self.start_rss_bytes / GIB,
            "peak_rss_gib": self.steps[-1]["peak_rss_bytes"] / GIB,
            "steps": self.steps,
        }
