"""What kfade asks of a model, and which tokens and lengths a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.overrides import TorchFunctionMode

from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError, first_line
from kfade.models.head import hidden_states
from kfade.models.lengths import model_window
from kfade.models.load import frozen
from kfade.models.targets import Target

NEEDED = ("get_input_embeddings", "get_output_embeddings", "base_model", "config")


def check_interface(model: Any) -> None:
    """Raises InputError where ``model`` lacks the interface of a causal language model.

    Examples are a wrapper around a model, and a vocabulary head of several maps.
    """
    kind = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        raise InputError(
            f"{kind}: adapters are wrapped around the model's layers; merge them first, "
            "model = model.merge_and_unload(), or give the model within, model.get_base_model()"
        )
    missing = [name for name in NEEDED if not hasattr(model, name)]
    if not missing and not hasattr(model.config, "get_text_config"):
        missing = ["config.get_text_config"]
    if missing:
        raise InputError(
            f"{kind} has no {missing[0]}: kfade needs a causal language model as transformers has "
            f"them, with {', '.join(NEEDED)}; give the model itself, not what is wrapped around it "
            "(of a DataParallel its .module)"
        )
    head = model.get_output_embeddings()
    if head is not None and not isinstance(getattr(head, "weight", None), Tensor):
        raise InputError(
            f"{kind}: its vocabulary head, a {type(head).__name__}, is not one linear map with a "
            "weight [V, D]: this model is not supported"
        )


def check_model(model: Any, targets: Sequence[Target]) -> None:
    """:func:`check_interface`, and that there are targets."""
    check_interface(model)
    if not targets:
        raise InputError(
            "targets: an empty list; give some of find_targets(model), or none at all for every "
            "feed-forward weight"
        )


def check_readable(model: Any, sequences: Sequence[TokenSequence]) -> None:
    """Raises InputError where ``model`` has no embedding for a token, or a sequence is too long."""
    least = min((min(s.tokens) for s in sequences), default=0)
    _check_embedded(model, least, max((max(s.tokens) for s in sequences), default=0))
    check_length(model, max((s.live for s in sequences), default=0))


def check_batches(model: Any, batches: Sequence[Batch]) -> None:
    """:func:`check_readable` of sequences that are in batches already."""
    tensors = [tokens_BT for batch in batches for tokens_BT in (batch.input_BT, batch.target_BT)]
    if not tensors:
        raise InputError("there are no batches: give at least one sequence")
    ends = torch.stack([torch.stack(tokens_BT.aminmax()) for tokens_BT in tensors])
    _check_embedded(model, int(ends.min()), int(ends.max()))
    check_length(model, max(batch.input_BT.shape[1] for batch in batches))


def _check_embedded(model: Any, least: int, largest: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if not 0 <= least <= largest < rows:
        raise InputError(
            f"a text holds the token {largest if largest >= rows else least}, but the model's "
            f"embedding has {rows} rows: the tokenizer is another model's, or the text holds a "
            "mark (of an image, say) that this model cannot read"
        )


def check_length(model: Any, positions: int) -> None:
    """Check that ``model`` reads an input of so many positions.

    An input longer than the window of the model's configuration is run as a trial.

    Raises:
        InputError: the trial fails, as it does where positions are learned or kept in a table.
    """
    window = model_window(model)
    if positions <= (window or 0):
        return
    weight = model.get_input_embeddings().weight
    input_BT = torch.zeros(1, positions, dtype=torch.long, device=weight.device)
    try:
        with frozen(model), torch.no_grad(), _RowsAreThere():
            hidden_states(model, input_BT)
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise  # of fake tensors: a plan explains it otherwise
    except (IndexError, RuntimeError) as error:
        if "memory" in str(error):
            raise
        most = f" Its window is {window}." if window else ""
        raise InputError(
            f"{type(model).__name__} cannot read {positions} positions at once "
            f"({first_line(error)}).{most} Give shorter sequences, with --sequence-length"
        ) from error


class _RowsAreThere(TorchFunctionMode):
    """Check the row numbers of embeddings: a GPU cannot be used further after a wrong one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.embedding and not isinstance(args[0], FakeTensor):
            row, rows = int(args[0].max()), args[1].shape[0]
            if row >= rows:
                raise IndexError(f"row {row} of a table of {rows}")
        return func(*args, **(kwargs or {}))
