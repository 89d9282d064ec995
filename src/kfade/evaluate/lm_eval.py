"""Any task of the package lm-eval (lm-evaluation-harness), on a model in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from kfade.errors import InputError, first_line
from kfade.evaluate.division import in_order
from kfade.evaluate.generation import shares_batches
from kfade.models.lengths import length_class
from kfade.models.load import frozen
from kfade.runtime import distributed
from kfade.runtime.progress import counted, no_bars, waiting


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
        batch_size: sequences in one forward pass. 1 is used for a model whose outputs depend on the
            other sequences of a batch.

    Raises:
        InputError: the package is missing, a task is unknown, its data cannot be loaded.
    """
    check_installed()
    from lm_eval import simple_evaluate  # an optional extra, and slow to import
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    with no_bars():
        try:
            with waiting("loading tasks"):
                manager.load(list(tasks))
        except Exception as error:  # whatever its registry, datasets and their back ends raise
            raise InputError(
                f"--tasks {','.join(tasks)}: could not be loaded ({first_line(error)}); check the "
                "names with lm-eval ls tasks, and that their data are there or the hub can be "
                "reached"
            ) from None
        if not shares_batches(model, tokenizer):
            batch_size = 1
        with frozen(model):
            found = simple_evaluate(
                _language_model(model, tokenizer, batch_size),
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


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The model as lm-eval calls it, with progress and with changes of rotary frequencies."""
    from lm_eval.models.huggingface import HFLM

    group = length_class(model)

    def told(kind: str) -> Callable[..., Any]:
        """A method of HFLM that shows progress; it gets all requests of one kind in one call.

        Processes divide the requests, unless the model is sharded.
        """

        def answer(self: Any, requests: Sequence[Any], *more: Any, **named: Any) -> Any:
            own = _own_part(model, requests)
            with counted(f"lm-eval's {kind}", len(own)) as advance:
                self.cache_hook = _Counter(advance)
                asked = [request for _, request in own]
                answers = getattr(HFLM, kind)(self, asked, *more, **named) if asked else []
            return list(in_order(dict(zip((i for i, _ in own), answers, strict=True))))

        return answer

    class Told(HFLM):
        loglikelihood = told("loglikelihood")
        loglikelihood_rolling = told("loglikelihood_rolling")
        generate_until = told("generate_until")

        def _model_generate(self, context: Any, max_length: int, *more: Any, **named: Any) -> Any:
            new = max_length - context.shape[1]
            crossed = group.steps(context.shape[1], new) < new
            with _reading_anew(model) if crossed else contextlib.nullcontext():
                return super()._model_generate(context, max_length, *more, **named)

    return Told(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _own_part(model: Any, requests: Sequence[Any]) -> list[tuple[int, Any]]:
    """This process's part of the requests, numbered; with a sharded model all of them.

    Requests with one context stay together: lm-eval may answer them by one pass.
    """
    numbered = enumerate(requests)
    groups = [list(own) for _, own in groupby(numbered, key=lambda pair: pair[1].args[0])]
    if not distributed.is_sharded(model):
        groups = distributed.share(groups, lambda own: sum(len(str(r.args)) for _, r in own))
    return [pair for own in groups for pair in own]


class _Counter:
    """Takes the place of lm-eval's cache of answers, and counts them."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Called when one request is answered."""
        self._advance(1)


@contextlib.contextmanager
def _reading_anew(model: Any) -> Iterator[None]:
    """Generation without a cache, whose entries have the frequencies of a shorter text."""
    own = model.generate
    model.generate = lambda **named: own(**{**named, "use_cache": False})
    try:
        yield
    finally:
        del model.generate


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
