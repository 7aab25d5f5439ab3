"""One contender of dpo_vs_trl.py or reward_vs_trl.py, in a process of its own: trains once, writes what it measured.

The clock runs from the loaded model and the tokenized data to the end of the last step: training, batching included,
and the reference pass of DPO. Each side imports its own libraries only, so that neither pays for the other's memory.

    python benchmarks/pair_contender.py SETTINGS.json MEASURED.json
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory import memory

OURS = {
    "dpo": {"loss": "loss", "chosen": "logprobs/chosen", "rejected": "logprobs/rejected", "gap": "gap"},
    "reward": {"loss": "loss", "gap": "gap", "accuracy": "accuracy"},
}
"""What is compared of every step, and what our metrics call it."""
TRL = {
    "dpo": {"loss": "loss", "chosen": "logps/chosen", "rejected": "logps/rejected", "gap": "rewards/margins"},
    "reward": {"loss": "loss", "gap": "margin", "mean": "mean_reward", "accuracy": "accuracy"},
}
"""The same in TRL's log."""


class Measured:
    """What one run took, and what it computed; every number is of this process alone."""

    def __init__(self) -> None:
        names = ("peak_rss_bytes", "peak_device_bytes", "step_seconds", "steps")
        self.numbers: dict[str, Any] = {"reference_seconds": 0.0, **{name: [] for name in names}}
        self._reference_cpu = 0.0

    def loaded(self) -> None:
        """The model that is to be trained is in memory, and nothing else of weight."""
        self.numbers["loaded_rss_bytes"] = memory("VmRSS")

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Around the reference pass, or a part of it."""
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self.numbers["reference_seconds"] += time.perf_counter() - began
        self._reference_cpu += time.process_time() - cpu_began

    def training_begins(self) -> None:
        self._began = self._step_began = time.perf_counter()
        self._cpu_began = time.process_time()

    def step_done(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.numbers["peak_device_bytes"].append(torch.cuda.max_memory_allocated())
        now = time.perf_counter()
        self.numbers["training_seconds"] = now - self._began
        self.numbers["cpu_seconds"] = self._reference_cpu + time.process_time() - self._cpu_began
        self.numbers["step_seconds"].append(now - self._step_began)
        self.numbers["peak_rss_bytes"].append(memory("VmHWM"))
        self._step_began = now

    def tokens(self, rows: float, needed: float, computed: float) -> None:
        """Tokens of the rows of all training steps; without those that stand for others; and what was computed."""
        self.numbers |= {"tokens": round(rows), "needed_tokens": round(needed), "computed_tokens": round(computed)}


# Ours


def run_ours(settings: dict[str, Any], measured: Measured) -> None:
    """The stage, watched at the seams between its parts."""
    from rlhf.engine.ranks import start_ranks, stop_ranks

    stage, config, task_name = our_run(settings)
    start_engine, task, clock = stage.start_engine, getattr(stage, task_name), contextlib.ExitStack()
    counts = {"rows": 0.0, "needed": 0.0, "computed": 0.0}

    def watched_engine(model: Any, *args: Any, **options: Any) -> Any:
        measured.loaded()
        engine = start_engine(model, *args, **options)
        if settings["stage"] == "dpo":
            clock.enter_context(measured.reference())
        return engine

    class WatchedTask(task):
        def __init__(self, *args: Any) -> None:
            clock.close()
            super().__init__(*args)
            measured.training_begins()

        def micro_batches(self, step: int) -> Any:
            batches = list(super().micro_batches(step))
            counts["computed"] += sum(_computed(batch) for batch in batches)
            return batches

        def step_metrics(self) -> dict[str, float]:
            metrics = super().step_metrics()
            measured.step_done()
            found = {name: metrics[key] for name, key in OURS[settings["stage"]].items()}
            if settings["stage"] == "reward":
                found["mean"] = (metrics["reward/chosen"] + metrics["reward/rejected"]) / 2
            measured.numbers["steps"].append(found)
            counts["rows"] += metrics["tokens"]
            counts["needed"] += metrics["tokens"] * (1 - metrics.get("shared_share", 0.0))
            return metrics

    stage.start_engine = watched_engine
    setattr(stage, task_name, WatchedTask)
    try:
        stage.run(config, start_ranks())
    finally:
        stop_ranks()
    measured.tokens(**counts)


def our_run(settings: dict[str, Any]) -> tuple[Any, Any, str]:
    """The module of the stage, the configuration of the run, and the name of the stage's task."""
    return (_our_dpo if settings["stage"] == "dpo" else _our_reward)(settings)


def _computed(batch: Any) -> int:
    """Tokens that a model computes of a micro-batch: packed ones, which a GPU takes in one of a few lengths."""
    from rlhf.core.packing import padded_length

    packing = batch.buckets.packing
    if packing is None:
        return sum(bucket.tokens.numel() for bucket in batch.buckets)
    count = len(packing.tokens)
    return padded_length(count) if packing.tokens.is_cuda else count


def _our_dpo(settings: dict[str, Any]) -> tuple[Any, Any, str]:
    from policy.options import PolicyConfig
    from policy.preference import stage
    from policy.preference.config import LossConfig, PreferenceConfig

    config = PreferenceConfig(
        model=PolicyConfig(path=settings["model"], **_our_backbone(settings)),
        loss=LossConfig(kind="sigmoid", parameters={"beta": settings["beta"]}),
        **_our_common(settings),
    )
    return stage, config, "PreferenceTask"


def _our_reward(settings: dict[str, Any]) -> tuple[Any, Any, str]:
    from reward import stage
    from reward.config import MarginConfig, RewardConfig, RewardModelConfig

    config = RewardConfig(
        model=RewardModelConfig(path=settings["model"], **_our_backbone(settings)),
        margin=MarginConfig(kind=settings.get("margin", "none")),
        **_our_common(settings),
    )
    return stage, config, "RewardTask"


def _our_backbone(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "kernels": settings.get("kernels", "none"),
    }


def _our_common(settings: dict[str, Any]) -> dict[str, Any]:
    from rlhf.data.options import DataConfig
    from rlhf.engine.options import EngineConfig, OptimizerConfig
    from rlhf.train.options import TrainConfig

    folder = Path(settings["folder"])
    rows = {"over_length": "error", "cache_dir": folder / "cache"} | settings.get("data", {})
    return {
        "output": folder / "run",
        "data": DataConfig(train=settings["pairs"], eval_share=0.0, max_tokens=settings["max_tokens"], **rows),
        "optim": OptimizerConfig(learning_rate=settings["learning_rate"], schedule="constant", warmup_share=0.0),
        "train": TrainConfig(
            global_batch_size=settings["pairs_per_step"],
            micro_batch_tokens=settings["micro_batch_tokens"],
            seed=settings["order_seed"],
            tensorboard=False,
            evaluate_every=0,
            checkpoint_every=0,
            publish="none",
        ),
        "engine": EngineConfig(**settings.get("engine", {"kind": "local"})),
    }


# TRL's


def run_trl(settings: dict[str, Any], measured: Measured) -> None:
    """Its trainer on the pairs in the order in which ours takes them."""
    from datasets import Dataset

    lines = Path(settings["ordered_pairs"]).read_text(encoding="utf-8").splitlines()
    rows = Dataset.from_list([json.loads(line) for line in lines])  # of messages, or of tokens already
    counts = {"tokens": 0.0, "padded": 0.0}
    trainer = (_trl_dpo if settings["stage"] == "dpo" else _trl_reward)(settings, measured, rows, counts)
    trainer.train()
    for row in trainer.state.log_history:
        if "loss" in row:
            found = {name: row[key] for name, key in TRL[settings["stage"]].items()}
            measured.numbers["steps"].append(found)
    measured.tokens(counts["tokens"], counts["tokens"], counts["padded"])


def _trl_dpo(settings: dict[str, Any], measured: Measured, rows: Any, counts: dict[str, float]) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class WatchedTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            known = "chosen_ids" in dataset.column_names
            return dataset if known else super()._prepare_dataset(dataset, *args)

        def _precompute_ref_logps(self, *args: Any) -> Dataset:
            with measured.reference():
                return super()._precompute_ref_logps(*args)

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=_type(settings))
    measured.loaded()
    return WatchedTrainer(
        model=model,
        args=DPOConfig(
            beta=settings["beta"],
            loss_type=["sigmoid"],
            precompute_ref_log_probs=settings["precompute"],
            **_trl_common(settings),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=_counting(DataCollatorForPreference, counts)(
            pad_token_id=tokenizer.pad_token_id, max_length=settings["max_tokens"]
        ),
        callbacks=[_watch(measured, counts)],
    )


def _trl_reward(settings: dict[str, Any], measured: Measured, rows: Any, counts: dict[str, float]) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForSequenceClassification.from_pretrained(settings["model"], dtype=_type(settings))
    measured.loaded()
    if settings.get("liger", False):  # which looks for the head of a language model in the whole of it
        from liger_kernel.transformers import monkey_patch

        monkey_patch._apply_liger_kernel_to_instance(model=model.base_model)
    return RewardTrainer(
        model=model,
        args=RewardConfig(**_trl_common(settings | {"liger": False})),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=_counting(DataCollatorForPreference, counts)(pad_token_id=tokenizer.pad_token_id),
        callbacks=[_watch(measured, counts)],
    )


def _type(settings: dict[str, Any]) -> Any:
    import torch

    return getattr(torch, settings.get("precision", "float32"))


def _counting(collator: type, counts: dict[str, float]) -> type:
    class CountingCollator(collator):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            counts["tokens"] += float(batch["attention_mask"].sum())
            counts["padded"] += float(batch["attention_mask"].numel())
            return batch

    return CountingCollator


def _watch(measured: Measured, counts: dict[str, float]) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            counts.update(tokens=0.0, padded=0.0)  # the reference pass has used the collator as well
            measured.training_begins()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            measured.step_done()

    return Watch()


def _trl_common(settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    at_once = settings.get("pairs_at_once", settings["pairs_per_step"])
    return {
        "output_dir": str(Path(settings["folder"]) / "run"),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": settings["pairs_per_step"] // at_once,
        "num_train_epochs": 1,
        "max_length": settings["max_tokens"],
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "use_liger_kernel": settings.get("liger", False),
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": settings.get("precision") == "bfloat16",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(settings["threads"])
    measured = Measured()
    {"ours": run_ours, "trl": run_trl}[settings["side"]](settings, measured)
    assert torch.get_num_threads() == settings["threads"], "a library has changed the number of threads"
    measured.numbers["load_average"] = os.getloadavg()[0]
    Path(sys.argv[2]).write_text(json.dumps(measured.numbers))


if __name__ == "__main__":
    main()
