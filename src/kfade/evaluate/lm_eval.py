"""Any task of the package lm-eval (lm-evaluation-harness), on a model in memory."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfade.errors import InputError
from kfade.evaluate.generation import shares_batches
from kfade.models import frozen


def check_installed() -> None:
    """Raises InputError where the package lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks needs the package lm-eval: pip install 'kfade[lm-eval]'")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(values by item, figures by task) as lm-eval computes them.

    Args:
        task_folder: a folder with tasks of one's own, in lm-eval's YAML.
        limit: items of each task.
        batch_size: sequences in one forward pass; 1 for a model that sees what is beside them.

    Raises:
        InputError: the package is missing, a task is unknown, its data cannot be loaded.
    """
    check_installed()
    from lm_eval import simple_evaluate  # an optional extra, and slow to import
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    try:
        manager.load(list(tasks))
    except Exception as error:  # whatever its registry, datasets and their back ends raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"--tasks {','.join(tasks)}: could not be loaded ({reason}); check the names with "
            "lm-eval ls tasks, and that their data are there or the hub can be reached"
        ) from None
    if not shares_batches(model, tokenizer):
        batch_size = 1
    with frozen(model):
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None  # None on ranks other than the first
    items = {}
    for task, samples in found["samples"].items():
        for sample in samples:
            values = {metric: sample[metric] for metric in sample["metrics"]}
            name = f"{task} {sample['doc_id']}"
            items[name if sample["filter"] == "none" else f"{name} {sample['filter']}"] = values
    figures = {task: _figures(values) for task, values in found["results"].items()}
    return items, figures


def _figures(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """``acc,none`` and ``acc_stderr,none`` as ``{"acc": {"value", "standard_error"}}``."""
    figures = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric},{kind}"
        figures[name] = {"value": float(value)}
        if isinstance(error, int | float) and math.isfinite(error):  # not defined for one item
            figures[name]["standard_error"] = float(error)
    return figures
