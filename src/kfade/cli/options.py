"""Options that several commands share."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")

DATA, FIT, STEP, SIZE, RUN = "Data", "Curvature", "Step", "Step size (give one)", "Run"
JUDGED = "What is judged"


def _option(panel: str, text: str, *names: str, **checks: Any):
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **checks)


def _unless_empty(given: list[str] | None) -> list[str] | None:
    """An option that was not given, as all others: None."""
    return given or None


Model = Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or LoRA adapter.")]
Forget = Annotated[
    str | None,
    _option(
        DATA,
        "What to forget: a JSONL file, a folder, or hf:NAME[:CONFIG][:SPLIT], SPLIT as in train or "
        "train[:1000], which downloads no more than that.",
        "--forget",
    ),
]
Retain = Annotated[
    str | None, _option(DATA, "What must not change, in the same forms.", "--retain")
]
SequenceLength = Annotated[
    int | None,
    _option(
        DATA,
        "Tokens of a packed sequence. [512, or the model's window if it is shorter]",
        "--sequence-length",
    ),
]
Template = Annotated[
    str | None, _option(DATA, "chat, plain or auto: chat where there is a template. [auto]")
]
TemplateFile = Annotated[
    str | None,
    _option(DATA, "A chat template in Jinja. [the tokenizer's own]", "--template-file"),
]
TemplateArgs = Annotated[
    list[str] | None,
    _option(
        DATA,
        "Tell the template NAME=VALUE, as in enable_thinking=false; may be given several times.",
        "--template-arg",
        callback=_unless_empty,
    ),
]
TemplateDate = Annotated[
    str | None,
    _option(
        DATA,
        "The date that a template is told that asks for it. [when the run, or that of --update, "
        "began]",
        "--template-date",
    ),
]
ScoreEnd = Annotated[
    bool | None,
    _option(
        DATA,
        "Score the EOS that closes a {text}, too. [no-score-end]",
        "--score-end/--no-score-end",
    ),
]
Pack = Annotated[
    bool | None,
    _option(DATA, "Join texts end to end, or keep one a sequence. [pack]", "--pack/--no-pack"),
]
Truncate = Annotated[
    bool | None,
    _option(DATA, "Cut sequences that are over the model's window.", "--truncate/--no-truncate"),
]
Holdout = Annotated[
    int | None,
    _option(DATA, "Retain examples held out to measure on. [a tenth, 1 to 64]", "--holdout"),
]
BatchTokens = Annotated[
    int | None,
    _option(DATA, "Positions in one forward pass; lower it to save memory. [4096]"),
]
Estimator = Annotated[str | None, _option(FIT, "ekfac, kfac, diagonal or identity. [ekfac]")]
Labels = Annotated[
    str | None, _option(FIT, "sqrt (square-root draw) or sampled pseudo-labels. [sqrt]")
]
Layers = Annotated[str | None, _option(FIT, "Blocks as in 3-6 or 0,2,8-11, from 0. [all]")]
Target = Annotated[
    str | None, _option(FIT, "Glob over weight names. [every feed-forward weight]", "--target")
]
JointBias = Annotated[
    bool | None,
    _option(FIT, "Change biases too, as one more column.", "--joint-bias/--no-joint-bias"),
]
Memory = Annotated[
    str | None,
    _option(FIT, "What a device may hold, as in 20GB: fit the layers in groups that fit. [all]"),
]
Recompute = Annotated[
    bool | None,
    _option(
        FIT,
        "Run each block again in a backward pass instead of keeping what it made: less memory, "
        "more work, the same result. [no]",
        "--recompute/--no-recompute",
    ),
]
CurvatureDir = Annotated[
    Path | None, _option(FIT, "Use a curvature that kfade fit saved.", "--curvature")
]
ObjectiveName = Annotated[
    str | None, _option(STEP, "margin or ce (cross-entropy). [margin]", "--objective")
]
LaterObjective = Annotated[
    str | None,
    _option(
        STEP,
        "Objective of all steps after the first; ce where a step of the margin has made the text "
        "unlikely. [as --objective]",
    ),
]
Steps = Annotated[int | None, _option(STEP, "Number of Gauss-Newton steps. [1]")]
ForgetBatch = Annotated[
    int | None, _option(STEP, "Forget sequences a step, without replacement. [all]")
]
Refit = Annotated[
    bool | None, _option(STEP, "Fit anew at each step. [refit]", "--refit/--no-refit")
]
Damping = Annotated[float | None, _option(STEP, "Damping, absolute (the paper's).", "--damping")]
RelativeDamping = Annotated[
    float | None,
    _option(STEP, "Damping in multiples of each layer's mean eigenvalue. [0.1]"),
]
ExactNorm = Annotated[
    bool | None,
    _option(
        STEP,
        "Measure a step's length by the exact Gauss-Newton form.",
        "--exact-norm/--fitted-norm",
    ),
]
Refine = Annotated[
    int | None,
    _option(
        STEP,
        "Improve each direction by N iterations of conjugate gradients on exact Gauss-Newton "
        "products, and take the best on held-out retain data. [0]",
        "--refine",
    ),
]
RefineSequences = Annotated[
    int | None, _option(STEP, "Retain sequences in each of those products. [64]")
]
Alpha = Annotated[float | None, _option(SIZE, "G-norm of each step: predicts a KL of alpha²/2.")]
Kl = Annotated[
    float | None,
    _option(SIZE, "Measured KL on held-out retain data, nats per token. [0.01]", "--kl"),
]
Until = Annotated[
    str | None, _option(SIZE, "Forgetting target, as in forget_loss=2.7 or forget_probability=0.1.")
]
MaxKl = Annotated[
    float | None, _option(SIZE, "Cap on the measured KL of the whole run, besides.", "--max-kl")
]
Dtype = Annotated[str | None, _option(RUN, "float32 or bfloat16. [the checkpoint's]")]
Device = Annotated[str | None, _option(RUN, "cpu, cuda, cuda:1, ... [the GPU if there is one]")]
TrustRemoteCode = Annotated[
    bool | None,
    _option(RUN, "Let code that comes with a hub model run.", "--trust-remote-code"),
]
Revision = Annotated[
    str | None,
    _option(RUN, "Branch, tag or commit of MODEL on the hub. [its main branch]", "--revision"),
]
Tokenizer = Annotated[
    str | None,
    _option(RUN, "Where the tokenizer is: hub id or folder. [with MODEL]", "--tokenizer"),
]
Shard = Annotated[
    bool | None,
    _option(RUN, "Spread the weights of the model's blocks over torchrun's processes.", "--shard"),
]
Seed = Annotated[int | None, _option(RUN, "Seed of draws, batches and the held-out split. [0]")]
Config = Annotated[
    Path | None,
    _option(RUN, "Settings from YAML; options given here go before them.", "--config"),
]
Resume = Annotated[bool, _option(RUN, "Go on with an interrupted run in --out.", "--resume")]
ExportModel = Annotated[
    bool, _option(RUN, "Also write the edited model, for from_pretrained.", "--export-model")
]
Json = Annotated[bool, _option(RUN, "Print one JSON object on stdout.", "--json")]
Out = Annotated[Path, _option(RUN, "Folder to write; it must not exist yet.", "--out")]
UpdateDir = Annotated[
    Path | None,
    _option(JUDGED, "Judge MODEL with this update: folder of a kfade unlearn run.", "--update"),
]
Quantise = Annotated[
    str | None,
    _option(JUDGED, "Judge it rounded to nearest: int8 or int4. [as it is]", "--quantise"),
]
Positions = Annotated[
    int,
    _option(
        DATA,
        "Positions in one forward pass; lower it to save memory. [4096]",
        "--batch-tokens",
        min=1,
    ),
]
ResamplingSeed = Annotated[int, _option(RUN, "Seed of what is resampled. [0]", "--seed")]
Limit = Annotated[
    int | None, _option(DATA, "Take the first so many items only. [all]", "--limit", min=1)
]


def request_of(kind: type[T], options: Mapping[str, Any]) -> T:
    """What a command asks for: its ``options`` by name, each put where its name belongs.

    An option that is None was not given, and keeps the default of ``kind``; so does a field of
    which there is no option.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if is_dataclass(hints[field.name]):
            values[field.name] = request_of(hints[field.name], options)
        elif options.get(field.name) is not None:
            values[field.name] = options[field.name]
    return kind(**values)
