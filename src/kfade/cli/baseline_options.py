"""Options of ``kfade baseline`` alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kfade.runs.baseline_words import METHODS

LOSS, TRAINING, WEIGHTS = "Loss", "Training", "Which weights"


def _option(panel: str, text: str, *names: str, **checks: Any):
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **checks)


MethodName = Annotated[str, typer.Argument(help=f"{METHODS}.", metavar="METHOD")]
Beta = Annotated[float | None, _option(LOSS, "β of npo [0.1] and simnpo [2.5].")]
Gamma = Annotated[
    float | None, _option(LOSS, "γ of simnpo [0]; the retain loss's weight in soul [2].")
]
Coefficient = Annotated[
    float | None,
    _option(LOSS, "Forget term's weight in npo [1], simnpo [0.1375]; length c of rmu [6.5]."),
]
RetainWeight = Annotated[
    float | None, _option(LOSS, "Retain term's weight. [1; rmu 1200]", "--retain-weight")
]
Layer = Annotated[int | None, _option(LOSS, "Block whose output rmu steers, from 0. [7]")]
Concept = Annotated[
    str | None, _option(LOSS, "What elm erases, in words: 'Greek mythology, its gods'.")
]
Eta = Annotated[float | None, _option(LOSS, "Strength of elm's guidance. [1000]")]
Lr = Annotated[float | None, _option(TRAINING, "Highest learning rate. [the method's]", "--lr")]
Epochs = Annotated[
    float | None, _option(TRAINING, "Passes over the forget set. [the method's]", "--epochs")
]
Steps = Annotated[int | None, _option(TRAINING, "Optimiser steps, in place of --epochs.")]
BatchSize = Annotated[
    int | None, _option(TRAINING, "Sequences of each set in a batch. [32; rmu 4, elm 1]", "--batch")
]
Accumulate = Annotated[
    int | None, _option(TRAINING, "Batches a step, their losses averaged. [1; elm 4]")
]
WarmUp = Annotated[
    int | None,
    _option(
        TRAINING,
        "Steps of rising learning rate. [an epoch's; soul a tenth of all; rmu, elm 0]",
        "--warm-up",
    ),
]
Decay = Annotated[
    bool | None,
    _option(
        TRAINING, "Let the rate fall to 0 after it. [decay; not rmu, elm]", "--decay/--no-decay"
    ),
]
WeightDecay = Annotated[float | None, _option(TRAINING, "Weight decay. [0.01; soul 0.1]")]
Clip = Annotated[
    float | None, _option(TRAINING, "Longest gradient; 0 for any. [1; rmu, elm any]", "--clip")
]
EvaluateEvery = Annotated[
    int | None, _option(TRAINING, "Steps between evaluations. [a tenth of all]")
]
MaxKl = Annotated[
    float | None,
    _option(
        TRAINING,
        "Keep the evaluation that forgot most within this retain KL. [the last]",
        "--max-kl",
    ),
]
Checkpoints = Annotated[
    bool, _option(TRAINING, "Keep the update of every evaluation.", "--checkpoints")
]
Layers = Annotated[str | None, _option(WEIGHTS, "Blocks as in 3-6 or 0,2,8-11, from 0.")]
Target = Annotated[str | None, _option(WEIGHTS, "Glob over weight names.", "--target")]
LoraRank = Annotated[
    int | None, _option(WEIGHTS, "Rank of low-rank changes; 0 for whole weights. [0; elm 256]")
]
LoraAlpha = Annotated[float, _option(WEIGHTS, "Their scale is this over the rank. [16]")]
LoraDropout = Annotated[float, _option(WEIGHTS, "Dropout of their inputs. [0.05]")]
