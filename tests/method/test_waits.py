"""How often passes wait for the device.

On a GPU, reading a number, looking for true entries and copying a number to the device wait for all
work there. Passes over the data do so a few times, but not once for each batch. transformers does
so once for each forward pass, which is not counted here: it looks whether sequences are packed.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from helpers import tiny_llama
from torch.overrides import TorchFunctionMode, resolve_name

import kfade
from kfade.curvature.draws import sampled_labels, square_root_draw
from kfade.curvature.estimators import EKFAC
from kfade.curvature.product import gauss_newton_product, quadratic_form
from kfade.data.batches import Batch, make_batches
from kfade.data.sequences import TokenSequence
from kfade.method.gradient import forget_gradient
from kfade.method.measure import TokenLosses, hidden_reference, mean_divergence, mean_objectives
from kfade.method.objectives import margin
from kfade.models.head import read_head
from kfade.models.load import frozen

WAITS = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique"),
    *("__bool__", "__float__", "__int__", "__index__", "tensor", "equal", "allclose"),
}
FEW, MANY = 5, 7  # batches; a pass looks for NaN after 1, 2, 4 of either


class Waits(TorchFunctionMode):
    """Counts calls that wait for the device on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or str(function)).rpartition(".")[2]
        if sys._getframe(1).f_globals["__name__"].startswith("transformers."):
            pass
        elif name in WAITS:
            self.counts[name] += 1
        elif name in ("__getitem__", "__setitem__") and has_mask(args[1]):
            self.counts["mask"] += 1
        return function(*args, **(kwargs or {}))


def has_mask(index) -> bool:
    """Whether an index has a tensor of truth values."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def batches_of(count: int) -> list[Batch]:
    """Batches with padding, and with positions that are not scored."""
    sequences = [
        TokenSequence(tuple(range(1, 2 + n)), (False, False) + (True,) * (n - 1)) for n in (5, 4)
    ]
    return [make_batches(sequences, budget=10)[0] for _ in range(count)]


def waits(work, *args) -> Counter[str]:
    with Waits() as mode:
        work(*args)
    return mode.counts


def fit(draw):
    return lambda model, batches, targets: EKFAC(draw).fit(model, batches, targets)


def along_ones(targets):
    return {target.name: torch.ones(target.shape) for target in targets}


def divergence(model, batches, targets):
    reference = hidden_reference(model, batches, "reference")
    with frozen(model):
        mean_divergence(read_head(model), reference, reference)


PASSES = {
    "fit, sampled labels": fit(sampled_labels),
    "fit, square roots": fit(square_root_draw),
    "gradient": lambda *given: forget_gradient(*given, margin),
    "objectives": lambda model, batches, targets: mean_objectives(
        model, batches, [margin, TokenLosses()]
    ),
    "divergence": divergence,
    "quadratic form": lambda *given: quadratic_form(*given, along_ones(given[2])),
    "product": lambda *given: gauss_newton_product(*given, along_ones(given[2])),
}


@pytest.mark.parametrize("name", PASSES)
def test_waits_do_not_grow_with_the_batches(name, model):
    targets = kfade.find_targets(model)
    few, many = batches_of(FEW), batches_of(MANY)
    assert not few[0].full
    assert waits(PASSES[name], model, many, targets) == waits(PASSES[name], model, few, targets)


def test_a_wait_for_each_batch_is_seen(model):
    def losses(tokens_NV, target_N):
        value_N = margin(tokens_NV, target_N)
        value_N[value_N > 0].sum().item()
        return value_N

    found = [waits(mean_objectives, model, batches_of(count), [losses]) for count in (FEW, MANY)]
    assert found[1] - found[0] == Counter(mask=MANY - FEW, item=MANY - FEW)
