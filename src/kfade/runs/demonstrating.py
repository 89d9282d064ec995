"""Demo: SmolLM2-135M-Instruct forgets the capitals of the world, measured before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kfade.demo.data import data_file
from kfade.demo.run import demo_model, examine
from kfade.method.update import Update
from kfade.runs.config import DataConfig, ModelConfig, RunConfig
from kfade.runs.session import load
from kfade.runs.step_config import SizeConfig, StepConfig
from kfade.runs.unlearning import unlearn
from kfade.runtime.files import write_text
from kfade.runtime.run_dir import check_free
from kfade.runtime.stages import Clock, stage, timing


def demo_config(model: str) -> RunConfig:
    """The settings of the demo: one EK-FAC step with the margin and a limit of the retain KL."""
    return RunConfig(
        model=ModelConfig(model=model, dtype="float32"),
        data=DataConfig(
            forget=str(data_file("forget.jsonl")),
            retain=str(data_file("retain.jsonl")),
            template="plain",
            sequence_length=128,
            holdout=50,
        ),
        step=StepConfig(quality="fast", relative_damping=1.0),
        size=SizeConfig(kl=0.0005, max_kl=0.00055),  # the search reaches a KL within 10 %
    )


def demo(out: Path, model: str | None = None) -> dict[str, Any]:
    """Run the demo; returns the metrics of the run, with accuracies and answers before and after.

    Args:
        model: hub id, folder or GGUF file. None: SmolLM2-135M-Instruct.
    """
    check_free(out)
    config = demo_config(model or demo_model())
    clock, later = Clock(), Clock()
    with timing(clock):
        loaded = load(config.model, config.fit)
        with stage("questions"):
            before = examine(loaded.model, loaded.tokenizer)
        metrics = unlearn(config, out, loaded=loaded)
    with timing(later), stage("questions"), Update.load(out).applied_to(loaded.model) as edited:
        after = examine(edited, loaded.tokenizer)
    metrics["seconds"].update(
        load=clock.seconds["load"],
        questions=clock.seconds["questions"] + later.seconds["questions"],
        total=clock.total,
    )
    result = {**metrics, "before": before, "after": after, "kl_budget": config.size.max_kl}
    write_text(out / "demo.json", json.dumps(result, indent=2) + "\n")
    return result
