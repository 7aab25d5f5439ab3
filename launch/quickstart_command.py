"""``rlhf quickstart``: reward model, preference policy and PPO policy from a small real model, from nothing."""

import argparse
import json
import subprocess
import time
from pathlib import Path

from launch.launcher import default_ranks, launcher, launcher_environment
from rlhf.core.errors import UserError
from rlhf.models.gguf import embedded_model, import_gguf
from rlhf.models.manifest import MANIFEST_NAME

HERE = Path(__file__).parent
MODEL = Path("models/SmolLM2-135M-Instruct")
RUNS = Path("runs/quickstart")
STAGES = {"reward": "reward", "preference": "policy.preference", "ppo": "policy.ppo"}
"""Module of each stage; its recipe is quickstart_<stage>.yaml, its run folder has its name."""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="reward model, preference policy and PPO policy from SmolLM2-135M and a shipped corpus, all measured",
        description="Import SmolLM2-135M-Instruct; under the deepspeed launcher, train a reward model with optimal-"
        "transport margins and a policy by APO-hinge-zero on the shipped sentiment pairs, and go on from that policy "
        "by PPO against the reward model; evaluate all on held-out topics and publish them. Started again, it goes on "
        "where it stopped.",
    )
    parser.add_argument("--ranks", type=int, help="processes (default: all GPUs, or 2 on a CPU with 2 or more cores)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="stage.key=value",
        help="settings of a stage's recipe to change, such as preference.loss.kind=sigmoid",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    overrides = _by_stage(options.overrides)
    _say(f"1/5  the backbone: {MODEL}")
    import_gguf(embedded_model(), MODEL)
    ranks = options.ranks or default_ranks()
    _run_stage("2/5  the reward model", "reward", ranks, overrides["reward"])
    _run_stage("3/5  a policy from preferences", "preference", ranks, overrides["preference"])
    _run_stage("4/5  PPO against the reward model", "ppo", ranks, overrides["ppo"])
    _say("5/5  gold reward of fresh samples for held-out prompts")
    _evaluate()
    rewards = json.loads((RUNS / "reward" / "final" / MANIFEST_NAME).read_text())["rewards"]
    print(
        f"\ndone in {time.monotonic() - began:.0f} s.\n"
        f"{RUNS}/reward/final opens with AutoModelForSequenceClassification; "
        f"held-out rewards: mean {rewards['mean']:.2f}, standard deviation {rewards['standard_deviation']:.2f}.\n"
        f"{RUNS}/preference/final and {RUNS}/ppo/final open with AutoModelForCausalLM; "
        f"what they wrote: {RUNS}/evaluation/samples_ppo.jsonl and so on\n"
        "Next, score texts of your own (a JSON line each: prompt and response, or prompt, chosen and rejected):\n"
        f"  .venv/bin/rlhf score --model {RUNS}/reward/final --data launch/quickstart/sentiment_pairs_heldout.jsonl "
        "--output runs/quickstart/scores.jsonl"
    )
    return 0


def _by_stage(overrides: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for override in overrides:
        stage, _, setting = override.partition(".")
        if stage not in STAGES or "=" not in setting:
            raise UserError(f"{override}: expected STAGE.KEY=VALUE, where STAGE is {' or '.join(STAGES)}")
        found[stage].append(setting)
    return found


def _run_stage(title: str, stage: str, ranks: int, overrides: list[str]) -> None:
    recipe = HERE / "recipes" / f"quickstart_{stage}.yaml"
    command = [*launcher(ranks), "--module", STAGES[stage], "--config", str(recipe), *overrides]
    _say(f"{title}: {' '.join(map(_shown, command))}")
    code = subprocess.run(command, check=False, env=launcher_environment()).returncode
    # The deepspeed command can exit 0 although a rank was killed.
    if code != 0 or not (RUNS / stage / "final" / MANIFEST_NAME).is_file():
        raise UserError(f"the {stage} stage did not finish (exit code {code}); the lines above say why")


def _evaluate() -> None:
    from rich.console import Console

    from launch.quickstart.gold import gold_reward
    from policy.evaluate import evaluate_policies, evaluation_table, read_prompts
    from policy.sampling import SamplingSettings

    found = evaluate_policies(
        {stage: RUNS / stage / "final" for stage in ("preference", "ppo")},
        MODEL,
        read_prompts(HERE / "quickstart" / "prompts_heldout.jsonl"),
        gold_reward,
        template=str(HERE / "quickstart" / "chat.jinja"),
        settings=SamplingSettings(samples=1, max_new_tokens=40, batch_rows=85),
        output=RUNS / "evaluation",
    )
    Console().print(evaluation_table(found))


def _shown(part: str) -> str:
    path = Path(part)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return part


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
