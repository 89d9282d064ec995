"""The command line: each command parses options, calls one function of ``kfade.runs``, and prints.

Exit codes: 0 success; 2 wrong input, with one line that says what is wrong, where, and what to do;
130 interrupted; 1 any other error. With ``--json`` one JSON object goes to stdout. Everything else
goes to stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from cyclopts import App, CycloptsError, Parameter

from kfade.cli import (
    attack,
    baseline,
    check,
    demo,
    edit,
    eval_choice,
    eval_judge,
    eval_kl,
    eval_memorisation,
    eval_quantisation,
    eval_tofu,
    fit,
    plan,
    report,
    sweep,
    unlearn,
)
from kfade.cli.defaults import fill_options, shown_default
from kfade.cli.messages import message_of
from kfade.cli.session import console
from kfade.errors import InputError
from kfade.runs.options import MODEL
from kfade.runtime import distributed
from kfade.runtime.files import FULL, unwritable
from kfade.runtime.interrupts import interruptible

INTERRUPTED = 130  # the exit code that shells report for Ctrl-C

app = App(
    name="kfade",
    help="Make a language model unlearn: a few Gauss-Newton steps with K-FAC / EK-FAC curvature.",
    help_format="markdown",
    group_arguments=MODEL,
    config=fill_options,
    default_parameter=Parameter(show_default=shown_default),
)
eval_app = App(
    name="eval",
    group_arguments=MODEL,
    help="Measure a model, with or without an update: benchmarks, specificity, memorisation.",
)
COMMANDS: tuple[Callable[..., None], ...] = (
    unlearn.unlearn,
    fit.fit,
    plan.plan,
    sweep.sweep,
    baseline.baseline,
    edit.apply,
    edit.revert,
    report.report,
    edit.merge,
    edit.export_lora,
    attack.attack,
    check.check,
    demo.demo,
)
EVALUATIONS: tuple[Callable[..., None], ...] = (
    eval_kl.kl,
    eval_tofu.tofu,
    eval_choice.choice,
    eval_judge.mt_bench,
    eval_memorisation.memorisation,
    eval_quantisation.quantisation,
)
SEVERAL = (
    *(fit.fit, unlearn.unlearn, baseline.baseline, attack.attack, check.check),
    *EVALUATIONS,
)
"""Commands that run in several processes."""
for command in COMMANDS:
    app.command(command)
for command in EVALUATIONS:
    eval_app.command(command)
app.command(eval_app)


def main(arguments: list[str] | None = None) -> int:
    """Run one command, in each process that ``torchrun`` started; returns the exit code."""
    resumes = False
    try:
        with interruptible(), distributed.processes():
            command, given, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
            resumes = "resume" in signature(command).parameters
            if distributed.count() > 1:
                _check_several(command)
                console.quiet = distributed.rank() > 0
            command(*given.args, **given.kwargs)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except CycloptsError as error:
        return _fail(message_of(error), 2)
    except InputError as error:
        return _fail(str(error), 2)
    except (torch.OutOfMemoryError, MemoryError):
        return _out_of_memory()
    except RuntimeError as error:
        if "allocate memory" in str(error):  # the message of PyTorch's CPU allocator
            return _out_of_memory()
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        return _fail(str(unwritable(error.filename or "the output", error)), 2)
    except KeyboardInterrupt:
        remedy = "; to continue, run the same command with --resume" if resumes else ""
        return _fail(f"interrupted{remedy}", INTERRUPTED)
    return 0


def _check_several(command: Callable[..., Any]) -> None:
    """Raises InputError if the command does not support several processes."""
    if command not in SEVERAL:
        raise InputError(
            f"kfade {command.__name__} does not run in several processes; start it without torchrun"
        )


def _out_of_memory() -> int:
    return _fail(
        "out of memory: lower --batch-tokens, then --sequence-length, or target fewer --layers; "
        "fit, unlearn and sweep need less memory with --recompute",
        2,
    )


def _fail(message: str, code: int) -> int:
    print(f"kfade: {message}", file=sys.stderr)
    return code
