"""``kfade demo``: watch a real model forget the capitals of the world and keep the rest."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from kfade.cli import options as o
from kfade.cli.session import console, session, show
from kfade.cli.unlearn import summary
from kfade.demo.data import data_file
from kfade.demo.run import PROMPTS, demo_model, examine, table_rows
from kfade.method.update import Update
from kfade.runs.config import DataConfig, ModelConfig, RunConfig, SizeConfig, StepConfig
from kfade.runs.session import load
from kfade.runs.unlearning import unlearn
from kfade.runtime.files import write_text
from kfade.runtime.run_dir import check_free
from kfade.runtime.stages import stage

OtherModel = Annotated[
    str | None, Parameter(help="Hub id, folder or GGUF file. Unset: SmolLM2-135M-Instruct.")
]


def demo_config(model: str) -> RunConfig:
    """The demo's settings: one EK-FAC step with the margin, up to a budget of retain KL."""
    return RunConfig(
        model=ModelConfig(model=model, dtype="float32"),
        data=DataConfig(
            forget=str(data_file("forget.jsonl")),
            retain=str(data_file("retain.jsonl")),
            template="plain",
            sequence_length=128,
            holdout=50,
        ),
        step=StepConfig(relative_damping=1.0),
        size=SizeConfig(kl=0.0005, max_kl=0.00055),  # a search meets a KL within 10 %
    )


def demo(*, out: o.Out = Path("out/demo"), model: OtherModel = None, json: o.Json = False) -> None:
    """Make SmolLM2-135M-Instruct forget the capitals of the world, and show what changed.

    Fits on statements about 74 countries and asks in other words; neighbouring geography and
    general knowledge must stay. Five to eight minutes on two cores.
    """
    check_free(out)
    config = demo_config(model or demo_model())
    with session() as clock:
        loaded = load(config.model, config.fit)
        with stage("questions"):
            before = examine(loaded.model, loaded.tokenizer)
    with session():
        metrics = unlearn(config, out, loaded=loaded)
    update = Update.load(out)
    with session() as after_clock, stage("questions"), update.applied_to(loaded.model) as edited:
        after = examine(edited, loaded.tokenizer)
    metrics["seconds"].update(
        load=clock.seconds["load"],
        questions=clock.seconds["questions"] + after_clock.seconds["questions"],
        total=clock.total,
    )
    result = {**metrics, "before": before, "after": after, "kl_budget": config.size.max_kl}
    write_text(out / "demo.json", json_module.dumps(result, indent=2) + "\n")
    if not json:
        answers = Table("prompt", "before", "after", title="What it says (greedy)")
        for prompt, old, new in zip(PROMPTS, before["answers"], after["answers"], strict=True):
            answers.add_row(prompt, old, new)
        accuracy = Table(title="Accuracy of four choices, %: per token of the choice, and in all")
        for column in ("questions not used in fitting", "before", "after", "in all", "after"):
            accuracy.add_column(column)
        for row in table_rows(before, after):
            accuracy.add_row(*row)
        console.print(answers)
        console.print(accuracy)
    budget = f"budget of retain KL: {config.size.max_kl} nats/token"
    show(result, json, [*summary(result), budget])
