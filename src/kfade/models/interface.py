"""What kfade asks of a model, and which tokens and lengths a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from kfade.data.sequences import TokenSequence, check_sequences
from kfade.errors import InputError, first_line
from kfade.models.head import hidden_states
from kfade.models.lengths import model_window, refuse_too_long
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


def check_sets(model: Any, sets: Mapping[str, Sequence[TokenSequence]]) -> None:
    """Raises InputError if one of the named sets is empty, holds anything but token sequences, or
    holds one that ``model`` cannot read."""
    for name, sequences in sets.items():
        if not sequences:
            raise InputError(f"the {name} is empty: give at least one sequence")
        check_sequences(sequences, f"the {name}")
    for name, sequences in sets.items():
        check_readable(model, sequences, f"the {name}")


def check_readable(model: Any, sequences: Sequence[TokenSequence], name: str = "sequences") -> None:
    """Raises InputError where ``model`` has no embedding for a token, or a sequence is too long.

    Args:
        name: what the sequences are, for the message.
    """
    if not sequences:
        return
    least = min(min(s.tokens) for s in sequences)
    _check_embedded(model, least, max(max(s.tokens) for s in sequences))
    longest = max(range(len(sequences)), key=lambda i: sequences[i].live)
    check_length(model, sequences[longest].live, f"{name}, number {longest}")


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


def check_length(model: Any, positions: int, where: str = "a sequence") -> None:
    """Check that ``model`` reads an input of so many positions.

    If the model's configuration states no window, the input is run as a trial.

    Args:
        where: the input's place, for the message.

    Raises:
        InputError: it is over the window, or the trial fails, as it does where positions are
            learned or kept in a table.
    """
    if model_window(model):
        refuse_too_long(model, positions, where)
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
        raise InputError(
            f"{where}: {type(model).__name__} cannot read {positions} positions at once "
            f"({first_line(error)}); give shorter sequences, with --sequence-length or window= of "
            "kfade.encode"
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
