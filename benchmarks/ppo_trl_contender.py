"""TRL's side of ppo_vs_trl.py, in a process of its own: trains once and writes what it measured.

``ppo`` needs a TRL that still has its PPOTrainer (1.12 is the last), ``rloo`` runs with the current one. Both are
used as a user would, with the settings that are fastest here and compute the same.

    python benchmarks/ppo_trl_contender.py SETTINGS.json MEASURED.json
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from ppo_workload import Measured, read_prompts
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


def run_ppo(settings: dict[str, Any], measured: Measured) -> None:
    """PPOTrainer: one response to each prompt, a value model of its own."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class WatchedTrainer(PPOTrainer):
        def log(self, logs: dict[str, float], *args: Any) -> None:
            measured.score(logs["objective/scores"])
            super().log(logs, *args)

    tokenizer = AutoTokenizer.from_pretrained(settings["policy"], padding_side="left")
    texts = [row["text"] for row in read_prompts(settings)]
    trainer = WatchedTrainer(
        args=PPOConfig(
            # One micro-batch of all rows: TRL cuts it to the minibatch. With accumulation it would step once for
            # all minibatches together, since it hands the same number to Accelerate.
            per_device_train_batch_size=settings["rows_per_step"],
            gradient_accumulation_steps=1,
            num_mini_batches=settings["minibatches"],
            num_ppo_epochs=settings["epochs"],
            total_episodes=settings["rows_per_step"] * total_steps(settings),
            local_rollout_forward_batch_size=settings["rows_per_step"],
            num_sample_generations=0,
            response_length=settings["response_tokens"],
            temperature=settings["temperature"],
            stop_token="eos",
            kl_coef=settings["kl_coefficient"],
            gamma=settings["gamma"],
            lam=settings["lam"],
            cliprange=settings["clip"],
            cliprange_value=settings["value_clip"],
            vf_coef=settings["value_coefficient"],
            **common(settings),
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(settings["policy"], dtype=precision()),
        ref_model=None,  # it copies the policy
        reward_model=load_classifier(settings),
        value_model=load_classifier(settings),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]}),
        callbacks=[Watch(measured, updates_per_step=1)],
    )
    wanted = settings.get("gradient_checkpointing", False)
    assert trainer.policy_model.is_gradient_checkpointing == wanted, "its checkpointing is not as it was set"
    watch_ppo(ppo_trainer, tokenizer.eos_token_id, measured)
    trainer.train()


def watch_ppo(module: Any, end: int, measured: Measured) -> None:
    """Look over the shoulder of the functions that the trainer calls by name."""
    generate, forward, get_reward = module.batch_generation, module.forward, module.get_reward

    def watched_generation(model: Any, queries: torch.Tensor, *args: Any) -> Any:
        with measured.phase("generation"):
            rows, logits = generate(model, queries, *args)
        drawn = [row[queries.shape[1] :].tolist() for row in rows]
        lengths = [row.index(end) + 1 if end in row else len(row) for row in drawn]
        measured.rollout(lengths, sum(end in row for row in drawn))
        return rows, logits

    def watched_forward(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args)
        with measured.phase("scoring"):
            return forward(*args)

    def watched_reward(*args: Any) -> Any:
        with measured.phase("scoring"):
            return get_reward(*args)

    module.batch_generation, module.forward, module.get_reward = watched_generation, watched_forward, watched_reward


def run_rloo(settings: dict[str, Any], measured: Measured) -> None:
    """RLOOTrainer: several responses to each prompt, no value model."""
    from trl import RLOOConfig, RLOOTrainer

    class WatchedTrainer(RLOOTrainer):
        def _generate_single_turn(self, *args: Any) -> list[list[int]]:
            with measured.phase("generation"):
                responses = super()._generate_single_turn(*args)
            measured.rollout([len(ids) for ids in responses], sum(ids[-1] in self.eos_token_ids for ids in responses))
            return responses

        def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*args, **options)
            with measured.phase("scoring"):
                return super()._get_per_token_logps_and_entropies(*args, **options)

        def _calculate_rewards(self, *args: Any) -> torch.Tensor:
            with measured.phase("scoring"):
                rewards = super()._calculate_rewards(*args)
            measured.score(rewards.mean().item())
            return rewards

    tokenizer = AutoTokenizer.from_pretrained(settings["policy"], padding_side="left")
    updates = settings["minibatches"] * settings["epochs"]
    trainer = WatchedTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["policy"], dtype=precision()),
        reward_funcs=load_classifier(settings),
        args=RLOOConfig(
            per_device_train_batch_size=settings["rows_per_step"] // settings["minibatches"],
            gradient_accumulation_steps=1,
            generation_batch_size=settings["rows_per_step"],
            num_iterations=settings["epochs"],
            max_steps=updates * total_steps(settings),
            num_generations=settings["samples"],
            max_completion_length=settings["response_tokens"],
            temperature=settings["temperature"],
            beta=settings["kl_coefficient"],
            epsilon=settings["clip"],
            max_grad_norm=1.0,
            **common(settings),
        ),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [row["text"] for row in read_prompts(settings)]}),
        callbacks=[Watch(measured, updates_per_step=updates)],
    )
    trainer.train()


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """Options of both trainers. Gradient checkpointing is on by default and takes effect in RLOO alone."""
    return {
        "output_dir": str(Path(settings["folder"]) / "run"),
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": settings["weight_decay"],
        "gradient_checkpointing": settings.get("gradient_checkpointing", False),
        "use_liger_kernel": settings.get("liger", False),
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": settings["seed"],
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def precision() -> torch.dtype:
    """Type of the weights, as ours has them."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def total_steps(settings: dict[str, Any]) -> int:
    return settings["warmup_steps"] + settings["steps"]


def load_classifier(settings: dict[str, Any]) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(settings["reward"], num_labels=1, dtype=precision())


class Watch(TrainerCallback):
    """PPOTrainer calls it once by rollout, RLOOTrainer after every update."""

    def __init__(self, measured: Measured, updates_per_step: int) -> None:
        self._measured, self._updates = measured, updates_per_step

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        self._measured.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step % self._updates == 0:
            self._measured.step_done()


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    measured = Measured(settings)
    register_optimizer_step_post_hook(measured.update)
    {"ppo": run_ppo, "rloo": run_rloo}[settings["kind"]](settings, measured)
    assert torch.get_num_threads() == settings["threads"], "a library has changed the number of threads"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    report = measured.report() | {"load_average": os.getloadavg()[0], "versions": versions}
    Path(sys.argv[2]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
