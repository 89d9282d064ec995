"""The command line: each command validates, calls one function, prints.

Exit codes: 0 done; 2 the user's input is at fault, one line says what, where and what to do;
130 interrupted; 1 anything else. With ``--json`` one JSON object goes to stdout; everything else
goes to stderr.
"""

from __future__ import annotations

import sys
from inspect import signature

import torch
import typer

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
from kfade.cli.eval import eval_app
from kfade.cli.session import console
from kfade.errors import InputError
from kfade.runtime import distributed
from kfade.runtime.files import FULL, unwritable

INTERRUPTED = 130  # typer's exit code of a KeyboardInterrupt within a command

app = typer.Typer(
    help="Make a language model unlearn: a few Gauss-Newton steps with K-FAC / EK-FAC curvature.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("unlearn")(unlearn.unlearn)
app.command("fit")(fit.fit)
app.command("plan")(plan.plan)
app.command("sweep")(sweep.sweep)
app.command("baseline")(baseline.baseline)
app.command("apply")(edit.apply)
app.command("revert")(edit.revert)
app.command("report")(report.report)
app.command("merge")(edit.merge)
app.command("export-lora")(edit.export_lora)
app.command("attack")(attack.attack)
app.command("check")(check.check)
app.command("demo")(demo.demo)
app.add_typer(eval_app, name="eval")
eval_app.command("kl")(eval_kl.kl)
eval_app.command("tofu")(eval_tofu.tofu)
eval_app.command("choice")(eval_choice.choice)
eval_app.command("mt-bench")(eval_judge.mt_bench)
eval_app.command("memorisation")(eval_memorisation.memorisation)
eval_app.command("quantisation")(eval_quantisation.quantisation)


def main(arguments: list[str] | None = None) -> int:
    """Run one command, in each process that ``torchrun`` started; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with distributed.processes():
            if distributed.count() > 1:
                _check_several(given)
                console.quiet = distributed.rank() > 0
            app(args=arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        return _interrupted(given) if code == INTERRUPTED else code
    except InputError as error:
        return _fail(str(error), 2)
    except (torch.OutOfMemoryError, MemoryError):
        return _out_of_memory()
    except RuntimeError as error:
        if "allocate memory" in str(error):  # how PyTorch's CPU allocator says it
            return _out_of_memory()
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        return _fail(str(unwritable(error.filename or "what it prints", error)), 2)
    except KeyboardInterrupt:
        return _interrupted(given)
    return 0


def _check_several(arguments: list[str]) -> None:
    if arguments[:1] not in (["fit"], ["unlearn"]):
        raise InputError(
            f"kfade {' '.join(arguments[:1])}: only fit and unlearn run in several processes; "
            "start it without torchrun"
        )


def _out_of_memory() -> int:
    return _fail(
        "out of memory: lower --batch-tokens, then --sequence-length, or target fewer --layers; "
        "fit, unlearn and sweep hold less with --recompute",
        2,
    )


def _interrupted(arguments: list[str]) -> int:
    commands = [*app.registered_commands, *eval_app.registered_commands]
    name = next((word for word in arguments if not word.startswith("-") and word != "eval"), None)
    called = [c.callback for c in commands if c.name == name and c.callback is not None]
    resumes = any("resume" in signature(callback).parameters for callback in called)
    goes_on = "; the same command with --resume goes on" if resumes else ""
    return _fail(f"interrupted{goes_on}", INTERRUPTED)


def _fail(message: str, code: int) -> int:
    print(f"kfade: {message}", file=sys.stderr)
    return code
