"""Models whose outputs at a position depend on the length of the whole input.

The rotary frequencies of some models follow the longest sequence of the batch. ``longrope`` has one
set of them up to some length and another beyond it; ``dynamic`` changes them with every token
beyond some length. Two sequences may share a batch only if each gets the same frequencies alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kfade.data.batches import Batch, make_batches
from kfade.data.sequences import TokenSequence
from kfade.errors import InputError


@dataclass(frozen=True)
class LengthClass:
    """Which lengths of inputs get the same rotary frequencies."""

    switches: tuple[int, ...] = ()
    """Lengths beyond which other frequencies hold."""
    grows_from: int | None = None
    """Length beyond which they change with every token."""

    def __call__(self, positions: int) -> int:
        """The class of an input of that many positions: lengths of one class may be mixed."""
        if self.grows_from is not None and positions > self.grows_from:
            return positions
        return -sum(positions > switch for switch in self.switches)

    @property
    def borders(self) -> list[int]:
        """The lengths beyond which frequencies change; none where length does not matter."""
        grows = () if self.grows_from is None else (self.grows_from,)
        return sorted({*self.switches, *grows})

    def steps(self, positions: int, most: int) -> int:
        """How often, up to ``most`` times, an input can be run within one class if it grows by one
        position after each run."""
        own = self(positions)
        return next((n for n in range(1, most) if self(positions + n) != own), most)


def length_class(model: Any) -> LengthClass:
    """How the outputs of ``model`` depend on its input's length, by its configuration.

    Frequencies may be given once, or for each kind of layer.
    """
    window = _window_in_config(model)
    switches: set[int] = set()
    grows: set[int] = set()
    for kind, trained, _ in _ropes(model):
        borders = [n for n in (trained, window) if n is not None]
        if kind in ("longrope", "su"):  # su: its name in the first checkpoints
            switches.update(borders[:1])
        elif "dynamic" in kind:
            grows.update(borders)
    return LengthClass(tuple(sorted(switches)), min(grows, default=None))


def model_window(model: Any) -> int | None:
    """The longest input that ``model`` was made for; None where its configuration does not tell.

    That is ``max_position_embeddings``, or for ``dynamic`` rotary frequencies ``factor`` times the
    length from which they change, if that is longer.
    """
    window = _window_in_config(model)
    if window is None:
        return None
    stretched = [
        int(factor * (trained or window))
        for kind, trained, factor in _ropes(model)
        if "dynamic" in kind and factor
    ]
    return max(window, min(stretched, default=window))


def batches_for(model: Any, sequences: Sequence[TokenSequence], budget: int = 4096) -> list[Batch]:
    """:func:`~kfade.data.batches.make_batches`, on the model's device and by its length classes.

    Raises:
        InputError: a sequence is over the model's window.
    """
    device = next(model.parameters()).device
    batches = make_batches(sequences, budget=budget, device=device, group=length_class(model))
    check_lengths(model, batches)
    return batches


def refuse_too_long(model: Any, positions: int, where: str = "a sequence") -> None:
    """Raises InputError where an input of so many positions is over the model's window.

    Args:
        where: the input's place, for the message.
    """
    window = model_window(model)
    if window and positions > window:
        raise InputError(
            f"{where}: {positions} positions, over the window of {window} of "
            f"{type(model).__name__}; make sequences with kfade.encode(..., window={window}), "
            "which names the text that is too long, or cuts it with truncate=True"
        )


def check_lengths(model: Any, batches: Sequence[Batch]) -> None:
    """Raises InputError where a batch holds a sequence over the model's window, or sequences that
    would get other frequencies alone."""
    refuse_too_long(model, max((batch.input_BT.shape[1] for batch in batches), default=0))
    group = length_class(model)
    if not group.borders:
        return
    for batch in batches:
        if any(group(n) != group(batch.input_BT.shape[1]) for n in batch.reaches if n):
            raise InputError(
                f"a batch holds sequences of {min(batch.reaches)} and {max(batch.reaches)} "
                "positions, and this model's rotary frequencies change with the length beyond "
                f"{group.borders[0]}: make batches with make_batches(..., "
                "group=length_class(model))"
            )


@contextlib.contextmanager
def fresh_frequencies(model: nn.Module) -> Iterator[None]:
    """Within the ``with``, dynamic rotary frequencies follow the present input alone.

    transformers keeps those of the longest input so far for the shorter ones after it.
    """
    own = [module for module in model.modules() if _is_dynamic(module)]
    handles = [module.register_forward_pre_hook(lambda m, _: _reset(m)) for module in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in own:
            _reset(module)


def _window_in_config(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _ropes(model: Any) -> Iterator[tuple[str, int | None, float | None]]:
    """(kind, length trained on, factor) of the rotary frequencies of each kind of layer."""
    config = model.config.get_text_config()
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None) or {}
        for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
            kind = part.get("rope_type") or part.get("type") or ""
            trained = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            yield kind, trained, part.get("factor")


def _kinds(module: nn.Module) -> dict[str, str]:
    """{prefix of its tensors' names: kind of its frequencies} of a rotary embedding; else empty."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, dict):
        return {f"{layer_type}_": own for layer_type, own in kind.items()}
    return {"": kind} if isinstance(kind, str) else {}


def _is_dynamic(module: nn.Module) -> bool:
    return hasattr(module, "original_max_seq_len") and any(
        "dynamic" in kind for kind in _kinds(module).values()
    )


def _reset(module: Any) -> None:
    """Set the frequencies to those that the module was made with."""
    for prefix, kind in _kinds(module).items():
        if "dynamic" in kind:
            original = getattr(module, f"{prefix}original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
