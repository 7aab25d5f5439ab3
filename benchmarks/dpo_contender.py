"""One contender of dpo_vs_trl.py, in a process of its own: trains once and writes what it measured.

The clock runs from the loaded model and the tokenized data to the end of the last step: reference pass and
training, batching included. Each side imports its own libraries only, so that neither pays for the other's memory.

    python benchmarks/dpo_contender.py SETTINGS.json MEASURED.json
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from memory import memory


class Measured:
    """What one run took, and what it computed; every number is of this process alone."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {"reference_seconds": 0.0, "peak_rss_bytes": [], "steps": []}

    def loaded(self) -> None:
        """The model that is to be trained is in memory, and nothing else of weight."""
        self.numbers["loaded_rss_bytes"] = memory("VmRSS")

    def reference_done(self, seconds: float) -> None:
        self.numbers["reference_seconds"] += seconds

    def training_begins(self) -> None:
        self._began = time.perf_counter()

    def step_done(self) -> None:
        self.numbers["training_seconds"] = time.perf_counter() - self._began
        self.numbers["peak_rss_bytes"].append(memory("VmHWM"))

    def tokens(self, real: float, padded: float) -> None:
        """Tokens of the rows of all training steps, and what was computed for them."""
        self.numbers |= {"tokens": round(real), "padded_tokens": round(padded)}


def run_ours(settings: dict[str, Any], measured: Measured) -> None:
    """The preference stage, watched at the seams between its parts."""
    from policy.preference import stage
    from policy.preference.config import LossConfig, PreferenceConfig
    from policy.preference.task import PreferenceTask
    from rlhf.data.options import DataConfig
    from rlhf.engine.options import EngineConfig, OptimizerConfig
    from rlhf.engine.ranks import start_ranks, stop_ranks
    from rlhf.train.options import TrainConfig

    start_engine, clock, counts = stage.start_engine, {}, {"tokens": 0.0, "padded": 0.0}

    def watched_engine(model, *args, **options):
        measured.loaded()
        engine = start_engine(model, *args, **options)
        clock["reference"] = time.perf_counter()
        return engine

    class WatchedTask(PreferenceTask):
        def __init__(self, *args: Any) -> None:
            measured.reference_done(time.perf_counter() - clock["reference"])
            super().__init__(*args)
            measured.training_begins()

        def step_metrics(self) -> dict[str, float]:
            metrics = super().step_metrics()
            measured.step_done()
            found = {"loss": "loss", "chosen": "logprobs/chosen", "rejected": "logprobs/rejected", "gap": "gap"}
            measured.numbers["steps"].append({name: metrics[key] for name, key in found.items()})
            counts["tokens"] += metrics["tokens"]
            counts["padded"] += metrics["tokens"] / (1 - metrics["padding_share"])
            return metrics

    stage.start_engine, stage.PreferenceTask = watched_engine, WatchedTask
    folder = Path(settings["folder"])
    config = PreferenceConfig(
        output=folder / "run",
        model=stage.PolicyConfig(path=settings["model"], gradient_checkpointing=settings["gradient_checkpointing"]),
        data=DataConfig(
            train=settings["pairs"],
            eval_share=0.0,
            max_tokens=settings["max_tokens"],
            over_length="error",
            cache_dir=folder / "cache",
        ),
        loss=LossConfig(kind="sigmoid", parameters={"beta": settings["beta"]}),
        optim=OptimizerConfig(learning_rate=settings["learning_rate"], schedule="constant", warmup_share=0.0),
        train=TrainConfig(
            global_batch_size=settings["pairs_per_step"],
            micro_batch_tokens=settings["micro_batch_tokens"],
            seed=settings["order_seed"],
            tensorboard=False,
            evaluate_every=0,
            checkpoint_every=0,
            publish="none",
        ),
        engine=EngineConfig(kind="local"),
    )
    try:
        stage.run(config, start_ranks())
    finally:
        stop_ranks()
    measured.tokens(counts["tokens"], counts["padded"])


def run_trl(settings: dict[str, Any], measured: Measured) -> None:
    """DPOTrainer on the pairs in the order in which ours takes them."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    counts = {"tokens": 0.0, "padded": 0.0}

    class CountingCollator(DataCollatorForPreference):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            counts["tokens"] += float(batch["attention_mask"].sum())
            counts["padded"] += float(batch["attention_mask"].numel())
            return batch

    class WatchedTrainer(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any) -> Dataset:
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            measured.reference_done(time.perf_counter() - began)
            return dataset

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            counts.update(tokens=0.0, padded=0.0)  # the reference pass has used the collator as well
            measured.training_begins()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            measured.step_done()

    lines = Path(settings["ordered_pairs"]).read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    measured.loaded()
    at_once = settings.get("pairs_at_once", settings["pairs_per_step"])
    trainer = WatchedTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(Path(settings["folder"]) / "run"),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=settings["pairs_per_step"] // at_once,
            num_train_epochs=1,
            max_length=settings["max_tokens"],
            beta=settings["beta"],
            loss_type=["sigmoid"],
            precompute_ref_log_probs=settings["precompute"],
            gradient_checkpointing=settings["gradient_checkpointing"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=tokenizer,
        data_collator=CountingCollator(pad_token_id=tokenizer.pad_token_id, max_length=settings["max_tokens"]),
        callbacks=[Watch()],
    )
    trainer.train()
    found = {"loss": "loss", "chosen": "logps/chosen", "rejected": "logps/rejected", "gap": "rewards/margins"}
    for row in trainer.state.log_history:
        if "loss" in row:
            measured.numbers["steps"].append({name: row[key] for name, key in found.items()})
    measured.tokens(counts["tokens"], counts["padded"])


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
