"""Tiny mixtures of several families, and what processes compute of one of them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from families import sequences, tiny_config, tiny_model

import kfade
from kfade import EKFAC, find_targets, make_batches, margin
from kfade.method.gradient import forget_gradient
from kfade.method.settings import Correction, Run
from kfade.method.size import StepSize
from kfade.runs.experts import expert_rows
from kfade.runtime import distributed

FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "glm4_moe"),
    *("granitemoe", "ernie4_5_moe", "qwen3_next", "lfm2_moe", "phimoe", "dots1", "nemotron_h"),
)


def muse_spark():
    """The configuration of a family whose text tower has a norm after each expert."""
    config = tiny_config("muse_spark_text")
    config._experts_implementation = "eager"
    return config


def mixture(family: str):
    """A tiny random model whose experts all see some retain text."""
    return tiny_model(family)


def retain(seed: int = 2):
    return sequences(24, seed)


def seen(model):
    """The targets whose experts see retain text."""
    rows = expert_rows(model, make_batches(retain(), budget=1000))
    return [
        t for t in find_targets(model)
        if not t.is_routed or rows[id(t.module.layer.module)][t.module.expert] > 0
    ]  # fmt: skip


def step_of(model, **size):
    """One step of the targets whose experts see retain text."""
    sets = {"forget": sequences(3, 1), "retain": retain(), "held_out": sequences(4, 3)}
    run = Run(targets=seen(model), steps=1, correction=Correction(count=0))
    return kfade.unlearn(model, **sets, size=StepSize(**size), run=run)


def gradient_of(model, texts, budget: int):
    return forget_gradient(model, make_batches(texts, budget=budget), seen(model), margin)


def found_in(family: str) -> dict[str, torch.Tensor]:
    """A gradient, and G x for one x, by layer."""
    model = mixture(family)
    targets, batches = seen(model), make_batches(retain(), budget=60)
    gradient = dict(forget_gradient(model, batches, targets, margin))
    curvature = EKFAC().fit(model, batches, targets)
    product = curvature.matvec({t.name: torch.ones(t.shape) for t in targets})
    return {**{f"g {n}": g for n, g in gradient.items()}, **product}


def main(folder: Path) -> None:
    with distributed.processes():
        torch.save(found_in("mixtral"), folder / f"{distributed.rank()}.pt")
