"""Tasks of lm-eval on two models, one after the other."""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from policy.evaluation.compare import check_model_folders
from policy.tax.config import TaxConfig
from policy.tax.results import Tax, compared
from rlhf.core.errors import ConfigError, UserError
from rlhf.core.findings import write_findings

KIND = "tax"


def evaluate_tax(config: TaxConfig, device: str) -> Tax:
    """Let both models do the tasks, and write evaluation.json and items.jsonl.

    Args:
        config: of the tax.
        device: where the models are put.
    Raises:
        UserError: if lm-eval is not installed.
        ConfigError: if there is no such task.
        ModelError: if a folder holds no model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install 'margin-rlhf[tax]' (an environment of its own is best)")
    check_model_folders([config.before, config.after])
    tasks = _tasks(config)
    found = [_evaluated(config, folder, tasks, device) for folder in (config.before, config.after)]
    measures, rows = compared(*found)
    result = Tax(before=str(config.before), after=str(config.after), tasks=tuple(measures))
    about = {
        "lm_eval": str(importlib.import_module("lm_eval").__version__),
        "versions": dict(found[0].get("versions", {})),
    }
    write_findings(config.output, KIND, {**asdict(result), **about}, rows)
    return result


def _tasks(config: TaxConfig) -> Any:
    """lm-eval's index of tasks, with the wanted ones in it."""
    if config.include is not None and not config.include.is_dir():
        raise ConfigError(f"include = {config.include}: no such folder; expected one with tasks in lm-eval's YAML")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=None if config.include is None else str(config.include)
    )
    unknown = [task for task in config.tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"tasks = {', '.join(unknown)}: lm-eval has no such task (lm-eval ls tasks lists all)")
    return manager


def _evaluated(config: TaxConfig, folder: Path, tasks: Any, device: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = importlib.import_module("lm_eval").simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": config.precision},
        tasks=list(config.tasks),
        task_manager=tasks,
        num_fewshot=config.shots,
        limit=config.limit,
        batch_size=config.batch_size,
        device=device,
        apply_chat_template=config.chat,
        log_samples=True,
        bootstrap_iters=0,
    )
    return found
