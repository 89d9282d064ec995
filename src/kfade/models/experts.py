"""The experts of a mixture as linear maps of their own, that hooks can be put on.

In transformers a layer's experts are two parameters of three dimensions, [E, O, I] or, transposed,
[E, I, O]. The library calls one of several implementations of the layer, which a configuration
names. Within :func:`routed` it calls the one here. That gathers the rows of each expert, and sends
them through one :class:`ExpertMap` for each matrix. Nothing of the model's classes is changed.

Shapes: B sequences, T positions of each, N = B·T positions, K experts of a position, S = N·K rows
(a position and one of its experts), E experts, I inputs, O outputs of a matrix, D hidden width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kfade.data.batches import Batch
from kfade.runtime import distributed

IMPLEMENTATION = "kfade"
_MAPS = "_kfade_maps"
FACTS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "config")
"""What the library notes at a layer of experts whose implementation can be chosen."""


class Routing:
    """Which positions go to which expert, in one call of a layer.

    Rows are ordered by expert, then by position: those of a sequence are consecutive.
    """

    def __init__(self, chosen_NK: Tensor, experts: int) -> None:
        """``chosen_NK``: the experts of each position; ``experts`` and more mean none."""
        flat_S = chosen_NK.reshape(-1)
        self._experts, self.order_S = experts, flat_S.argsort(stable=True)
        """Index into the N·K pairs of each row; rows without an expert come last."""
        self.position_S = self.order_S // chosen_NK.shape[1]
        """Position of each row."""
        if isinstance(flat_S, FakeTensor):  # in a plan all experts get equally many
            counts = [(len(flat_S) + e) // experts for e in range(experts)]
        else:
            counts = flat_S.bincount(minlength=experts)[:experts].tolist()
        self.counts = counts
        """Number of rows of each expert."""
        self.rows = sum(counts)
        """Number of rows that have an expert."""
        self._live: tuple[Batch, Sequence[Tensor], list[list[int]]] | None = None
        self._lengths: tuple[Batch, list[list[list[int]]]] | None = None

    def live(self, batch: Batch, expert: int) -> tuple[Tensor, list[int]]:
        """(whether each row of ``expert`` is a live position of ``batch``, the number of live rows
        of each sequence that has any)."""
        if self._live is None or self._live[0] is not batch:
            self._live = (batch, *self._count(batch))
        _, live, lengths = self._live
        return live[expert], lengths[expert]

    def lengths(self, batch: Batch, expert: int) -> list[list[int]]:
        """The lengths of :meth:`live` in each process, each with a batch of its own.

        The first call is collective: the processes exchange what they have, of all experts.
        """
        if self._lengths is None or self._lengths[0] is not batch:
            self.live(batch, expert)
            assert self._live is not None
            self._lengths = (batch, _everywhere(self._live[2]))
        return [own[expert] for own in self._lengths[1]]

    def _count(self, batch: Batch) -> tuple[Sequence[Tensor], list[list[int]]]:
        """What :meth:`live` returns, for each expert."""
        sequences, length = batch.live_BT.shape
        position_S = self.position_S[: self.rows]
        live_S = batch.live_BT.flatten()[position_S]
        sizes = torch.tensor(self.counts, device=live_S.device)
        expert_S = torch.arange(self._experts, device=live_S.device).repeat_interleave(sizes)
        cell_S = expert_S * sequences + position_S // length
        counts_ES = cell_S[live_S].bincount(minlength=self._experts * sequences)
        lengths = counts_ES.view(self._experts, sequences).tolist()
        return live_S.split(self.counts), [[n for n in own if n] for own in lengths]


def _everywhere(lengths: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Numbers above 0, some for each expert, of each process."""
    most = int(distributed.maximum(max(map(len, lengths), default=0)))
    flat = [n for own in lengths for n in (*own, *[0] * (most - len(own)))]
    return [
        [[int(n) for n in part[e * most : (e + 1) * most] if n] for e in range(len(lengths))]
        for part in distributed.gather_numbers(flat)
    ]


class ExpertMap(nn.Module):
    """One matrix of one expert, a view of the layer's parameter: rows a to W a (+ b)."""

    def __init__(self, layer: ExpertLayer, parameter: str, expert: int) -> None:
        super().__init__()
        self.layer, self.parameter, self.expert = layer, parameter, expert
        self.routing: Routing | None = None
        """That of the last call."""

    @property
    def name(self) -> str:
        """Name of its weight within the layer."""
        return f"{self.parameter}[{self.expert}]"

    @property
    def whole(self) -> Tensor:
        """The layer's parameter that W is a part of, [E, O, I] or [E, I, O]."""
        parameter: Tensor = getattr(self.layer.module, self.parameter)
        return parameter

    @property
    def weight(self) -> Tensor:
        """W as the layer stores it, [O, I] or [I, O]."""
        return distributed.entry(self.whole, self.expert)

    @property
    def bias(self) -> Tensor | None:
        """b [O], if the layer has biases."""
        whole = getattr(self.layer.module, f"{self.parameter}_bias", None)
        return None if whole is None else whole[self.expert]

    def forward(self, rows_RI: Tensor) -> Tensor:
        """The expert's outputs [R, O]."""
        weight = self.weight.T if self.layer.transposed else self.weight
        return nn.functional.linear(rows_RI.to(weight.dtype), weight, self.bias)


class ExpertLayer:
    """A layer of experts as maps.

    Args:
        module: one of which :func:`is_expert_layer` is true.
    """

    def __init__(self, module: nn.Module) -> None:
        facts: Any = module
        self.module = module
        self.transposed: bool = facts.is_transposed
        """Whether matrices are stored as [I, O]."""
        entering = "gate_up_proj" if facts.has_gate else "up_proj"
        experts = range(facts.num_experts)
        self.first = [ExpertMap(self, entering, expert) for expert in experts]
        """The maps into the inner width, gate and up in one; one for each expert."""
        self.second = [ExpertMap(self, "down_proj", expert) for expert in experts]
        """The maps back."""

    @property
    def maps(self) -> list[ExpertMap]:
        """All of them, in the order in which a forward pass runs them."""
        return [*self.first, *self.second]


def is_expert_layer(module: Any) -> bool:
    """Whether a module is a layer of experts that the library lets run in another way."""
    if not all(hasattr(module, name) for name in FACTS):
        return False
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = [getattr(module, name, None) for name in names]
    return all(
        isinstance(w, nn.Parameter) and w.ndim == 3 and len(w) == module.num_experts
        for w in weights
    )


def expert_modules(model: nn.Module) -> list[Any]:
    """All modules of ``model`` of which :func:`is_expert_layer` is true."""
    return [module for module in model.modules() if is_expert_layer(module)]


def routers(block: nn.Module) -> set[int]:
    """Ids of the linear maps that choose experts.

    They lie in a module whose name has "router" in it, or beside experts, with an output for each.
    """
    linear = [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    found = {id(module) for name, module in linear if "router" in name.lower()}
    for parent in block.modules():
        counts = set()
        for child in parent.children():
            if isinstance(child, nn.ModuleList):
                if len(child) > 1 and any(isinstance(m, nn.Linear) for m in child.modules()):
                    counts.add(len(child))
            elif not isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                own = child.parameters(recurse=False)
                counts.update(p.shape[0] for p in own if p.ndim == 3 and p.shape[0] > 1)
        for child in parent.children():
            for module in () if isinstance(child, nn.ModuleList) else child.modules():
                if isinstance(module, nn.Linear) and module.out_features in counts:
                    found.add(id(module))
    return found


@contextlib.contextmanager
def routed(layers: Iterable[ExpertLayer]) -> Iterator[None]:
    """Within the ``with``, these layers of experts run through their maps."""
    before: list[tuple[Any, Any, ExpertLayer | None]] = []
    layers = list(layers)
    if layers:
        _register()
    try:
        for layer in layers:
            module: Any = layer.module
            before.append((module, module.config, vars(module).get(_MAPS)))
            module.config = copy.copy(module.config)  # other layers read the same one
            vars(module.config)["_experts_implementation_internal"] = IMPLEMENTATION
            vars(module)[_MAPS] = layer
        yield
    finally:
        for module, config, outer in reversed(before):
            module.config = config
            vars(module)[_MAPS] = outer
            if outer is None:
                del vars(module)[_MAPS]


@contextlib.contextmanager
def choices(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Within the ``with``, the list gets every call of a layer of experts: the layer, and the
    experts [N, K] of its positions."""
    chosen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) > 1:  # (hidden states, experts of each position, their weights)
            chosen.append((module, args[1].flatten(0, -2)))

    handles = [m.register_forward_pre_hook(note) for m in expert_modules(model)]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def _register() -> None:
    """Make the implementation known to the library."""
    # The import takes long, and most models have no experts.
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run)


def _run(
    module: Any, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor, *rest: Any
) -> Tensor:
    """A layer's outputs [N, D]: Σ_k weight_k expert_k(hidden). The library calls it."""
    layer: ExpertLayer = vars(module)[_MAPS]
    routing = Routing(chosen_NK, module.num_experts)
    rows_SD = hidden_ND[routing.position_S[: routing.rows]]
    inner_SO = _through(layer.first, routing, rows_SD)
    inner_SI = module._apply_gate(inner_SO) if module.has_gate else module.act_fn(inner_SO)
    out_SD = _through(layer.second, routing, inner_SI)
    if module.has_post_expert_norm:
        out_SD = module.post_expert_norm(out_SD)
    order_S = routing.order_S[: routing.rows]
    out_SD = out_SD * weights_NK.reshape(-1)[order_S, None]
    # Sums of float32 or better, in the order of positions and their experts.
    count, each = chosen_NK.shape
    placed_SD = out_SD.new_zeros(count * each, out_SD.shape[1]).index_copy(0, order_S, out_SD)
    total_ND = placed_SD.view(count, each, -1).sum(dim=1)
    return total_ND.to(hidden_ND.dtype)


def _through(maps: list[ExpertMap], routing: Routing, rows_SI: Tensor) -> Tensor:
    """The rows of each expert through its map; also where an expert has none."""
    outputs = []
    for map_, rows_RI in zip(maps, rows_SI.split(routing.counts), strict=True):
        map_.routing = routing
        outputs.append(map_(rows_RI))
    return torch.cat(outputs)
