"""Along which dimension processes divide the matrices of experts."""

from __future__ import annotations

from collections.abc import Sequence

from kfade.errors import InputError


def check_entries(shape: Sequence[int], processes: int) -> None:
    """Raises InputError where entries of a parameter of experts would not be divided.

    Args:
        shape: [E, O, I], or [E, O] of biases.
    """
    if side_to_divide(shape, processes) == 0:
        sides = " x ".join(str(size) for size in shape[1:])
        raise InputError(
            f"--shard: {processes} processes cannot divide each expert's {sides} numbers evenly: "
            "start as many as divide a side, give --experts none, or leave --shard out"
        )


def side_to_divide(shape: Sequence[int], processes: int) -> int:
    """The dimension along which ``distributed.shard`` divides a parameter of experts.

    The first after that of the experts that divides evenly, as FSDP needs it; 0 if none does.

    Args:
        shape: [E, O, I], or [E, O] of biases.
    """
    return next((i for i in range(1, len(shape)) if shape[i] % processes == 0), 0)
