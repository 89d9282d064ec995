"""``kfade eval quantisation``: how much of an update is left when the weights are rounded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kfade.cli import options as o
from kfade.cli.eval import digest_model, evaluation, settings_of
from kfade.cli.session import show
from kfade.evaluate.quantisation import overall, survival
from kfade.runtime.stages import stage

Update = Annotated[
    Path,
    typer.Option(
        "--update", help="Folder of a kfade unlearn run, or its file.", rich_help_panel=o.JUDGED
    ),
]


def quantisation(
    model: o.Model,
    update: Update,
    out: o.Out,
    dtype: o.Dtype = None,
    device: o.Device = None,
    trust_remote_code: o.TrustRemoteCode = None,
    revision: o.Revision = None,
    tokenizer: o.Tokenizer = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """How much of an update survives bfloat16, int8 and int4 round-to-nearest, weight by weight.

    For what that does to a metric, give `--quantise int8` or `int4` to the other commands.
    """
    settings = settings_of(locals())
    with evaluation("quantisation", out, resume, settings) as run:
        subject = run.load(
            model, update=update, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, revision=revision, tokenizer=tokenizer,
        )  # fmt: skip
        digests = {"weights_sha256": digest_model(subject.model)}
        with run.items(**digests) as log:
            with stage("rounding"):
                found = survival(subject.model, subject.update)
            for name, figures in found.items():
                if name not in log.items:
                    log.add(name, **figures)
            aggregate = {
                "weights": len(found),
                "lost_in_dtype": subject.update.lost_fraction(subject.model),
                "rounding": overall(found),
            }
            run.finish(log, aggregate, **digests)
    show(run.result, json, _lines(run.result))


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"update of {result['weights']} weights"]
    for word, figures in result["rounding"].items():
        lines.append(
            f"{word}: {100 * figures['surviving']:.1f} % survives; what is added or lost is "
            f"{100 * figures['lost']:.3g} % of its norm"
        )
    return [*lines, f"every weight in {result['out']}/items.jsonl"]
