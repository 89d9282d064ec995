"""Find the weights to change: the linear maps of the feed-forward blocks, by structure.

No table of model families: the decoder's blocks are the longest list of modules with linear maps
in it; within a block everything that is not attention is feed-forward (paper §3, "Components
targeted"). A glob over parameter names and a range of blocks narrow the choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kfade import distributed
from kfade.errors import InputError
from kfade.head import hidden_states


@dataclass(frozen=True)
class Target:
    """One weight to change, seen as W of shape [O, I] that maps inputs a to outputs W a (+ b)."""

    name: str
    """The weight's parameter name in the model."""
    module: nn.Module
    block: int
    """Number of its decoder block, from 0."""
    shape: tuple[int, int]
    """(O, I); I counts one more for a joint bias."""
    transposed: bool
    """GPT-2's Conv1D stores W as [I, O]."""
    bias: str | None
    """Parameter name of the bias that is treated as one more column of W, if any."""
    input_of: str
    """Name of the first target that reads the same input tensor: gate and up share one A."""

    @property
    def weight(self) -> Tensor:
        """The weight as the module holds it now."""
        return cast(Tensor, self.module.weight)

    def inputs(self, a: Tensor) -> Tensor:
        """Layer inputs [..., I], with a column of ones for a joint bias."""
        return a if self.bias is None else torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)

    def to_parameters(self, matrix_OI: Tensor) -> dict[str, Tensor]:
        """A change of [W, b] as changes of parameters, each in its own layout."""
        weight = matrix_OI if self.bias is None else matrix_OI[:, :-1]
        changes = {self.name: (weight.T if self.transposed else weight).contiguous()}
        if self.bias is not None:
            changes[self.bias] = matrix_OI[:, -1].contiguous()
        return changes

    def from_parameters(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Inverse of :meth:`to_parameters`: the matrix [O, I] of named parameter changes."""
        weight = changes[self.name].T if self.transposed else changes[self.name]
        return weight if self.bias is None else torch.cat([weight, changes[self.bias][:, None]], 1)


def find_targets(
    model: nn.Module,
    *,
    layers: str | None = None,
    pattern: str | None = None,
    joint_bias: bool = False,
) -> list[Target]:
    """The weights to change, in the order of the forward pass.

    Args:
        layers: blocks as in ``3-6`` or ``0,2,8-11``, counted from 0; all when None.
        pattern: a glob over parameter names (``*.mlp.down_proj.weight``); it may reach attention
            too. None means every feed-forward weight.
        joint_bias: treat a layer's bias as one more column of its weight.

    Raises:
        InputError: nothing matches, or a match is tied, quantised, fused or outside the blocks.
    """
    blocks_name, blocks = decoder_blocks(model)
    wanted = parse_layers(layers, len(blocks))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    found: list[Target] = []
    for index in sorted(wanted):
        prefix = f"{blocks_name}.{index}"
        for module_name, module in blocks[index].named_modules(prefix=prefix):
            weight_name = f"{module_name}.weight"
            if pattern is None:
                chosen = not _inside_attention(blocks[index], module_name[len(prefix) + 1 :])
            else:
                chosen = fnmatchcase(weight_name, pattern)
                chosen = chosen or any(
                    fnmatchcase(f"{module_name}.{name}", pattern)
                    for name, parameter in module.named_parameters(recurse=False)
                    if parameter.ndim == 3
                )
            if not chosen:
                continue
            _refuse_unsupported(module_name, module)
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            _refuse_tied(owners[id(module.weight)])
            found.append(_target(module_name, module, index, joint_bias))
    if pattern is not None:
        _refuse_outside(model, pattern, blocks_name, owners)
    if not found:
        what = f"no weight matches '{pattern}'" if pattern else "no feed-forward linear map found"
        some = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)][:3]
        raise InputError(
            f"{what} in blocks {layers or 'all'} of {type(model).__name__}: "
            f"give --target a glob over parameter names such as '{some[0] if some else '*'}.weight'"
        )
    return _share_inputs(model, found)


def parse_layers(layers: str | None, count: int) -> set[int]:
    """The block numbers of ``3-6`` or ``0,2,8-11``; all ``count`` of them for None."""
    if layers is None:
        return set(range(count))
    wanted: set[int] = set()
    for part in layers.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise InputError(f"--layers {layers}: write block numbers as 3-6 or 0,2,8-11")
        wanted.update(range(int(first), int(last) + 1))
    if max(wanted) >= count:
        raise InputError(f"--layers {layers}: this model has blocks 0 to {count - 1}")
    return wanted


def parameter_names(targets: Iterable[Target]) -> list[str]:
    """Names of the parameters that the targets stand for, biases included where joint."""
    return [name for target in targets for name in (target.name, target.bias) if name is not None]


def digest_weights(
    model: nn.Module, names: Iterable[str] | None = None, dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over names, dtypes and bytes of parameters: says which model it is.

    Args:
        names: the parameters; all when None.
        dtype: of the values rounded to it, as if the model had been loaded so; None: as they are.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    digest = hashlib.sha256()
    for name in sorted(parameters if names is None else names):
        tensor = distributed.whole(parameters[name].detach()).to(dtype=dtype).cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest outermost ModuleList whose every entry holds a linear map or an expert, and its
    name.

    Raises:
        InputError: there is none.
    """
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inner:
            if all(any(p.ndim >= 2 for p in block.parameters()) for block in module):
                lists.append((name, module))
    best = max(lists, key=lambda item: len(item[1]), default=None)
    if best is None:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks: not supported")
    return best


def _inside_attention(block: nn.Module, path: str) -> bool:
    """Whether a module lies in the block's attention, which its class or attribute name tells."""
    module = block
    for part in path.split(".") if path else []:
        module = module.get_submodule(part)
        if "attn" in part.lower() or "attention" in type(module).__name__.lower():
            return True
    return False


def _refuse_unsupported(name: str, module: nn.Module) -> None:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for tensor_name, tensor in tensors:
        if isinstance(tensor, nn.Parameter) and tensor.ndim >= 3:
            is_filter = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            kind = "convolution's" if is_filter else "fused mixture-of-experts"
            raise InputError(
                f"{name}.{tensor_name} is a {kind} weight of shape {tuple(tensor.shape)}: kfade "
                "changes plain linear maps [O, I]; narrow --target or --layers to those"
            )
        quantised = tensor_name in ("qweight", "weight") and (
            not tensor.is_floating_point() or tensor.element_size() < 2
        )
        if quantised:
            raise InputError(
                f"{name}.{tensor_name} is quantised ({tensor.dtype}): load the model in bfloat16 "
                "or float32 and quantise the edited model afterwards"
            )


def _refuse_tied(names: list[str]) -> None:
    if len(names) > 1:
        raise InputError(
            f"{names[0]} is tied to {names[1]}: changing one would change both; "
            "leave it out with --target"
        )


def _refuse_outside(
    model: nn.Module, pattern: str, blocks_name: str, owners: Mapping[int, list[str]]
) -> None:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        inside = name.startswith(blocks_name + ".")
        if inside or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            continue
        if fnmatchcase(f"{name}.weight", pattern):
            _refuse_tied(owners[id(weight)])
            raise InputError(
                f"--target {pattern} matches {name}.weight, which is outside the decoder's blocks "
                f"({blocks_name}.*): only linear maps within them can be targeted"
            )


def _target(module_name: str, module: nn.Module, block: int, joint_bias: bool) -> Target:
    transposed = isinstance(module, Conv1D)
    rows, columns = cast(Tensor, module.weight).shape
    out_features, in_features = (columns, rows) if transposed else (rows, columns)
    bias = f"{module_name}.bias" if joint_bias and module.bias is not None else None
    name = f"{module_name}.weight"
    shape = (out_features, in_features + (bias is not None))
    return Target(name, module, block, shape, transposed, bias, input_of=name)


def _share_inputs(model: nn.Module, targets: list[Target]) -> list[Target]:
    """Run two tokens through the model and see which targets read one and the same tensor.

    Also puts the targets in the order in which the forward pass reaches them.
    """
    first: dict[tuple[int, bool], str] = {}
    order: list[Target] = []
    kept: list[Tensor] = []  # held, so that no address is used twice

    def note(target: Target):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if target in order:
                raise InputError(
                    f"{target.name} is used more than once in a forward pass (a shared layer): "
                    "leave it out with --target"
                )
            if args[0].shape[:-1] != (1, 2):
                raise InputError(
                    f"{target.name} does not read one vector for each position of each sequence, "
                    f"[1, 2, I], but {list(args[0].shape)} (positions in one list, or routed "
                    "experts): leave it out with --target"
                )
            order.append(target)
            kept.append(args[0])

        return hook

    handles = [target.module.register_forward_pre_hook(note(target)) for target in targets]
    try:
        with torch.no_grad():
            device = targets[0].weight.device
            hidden_states(model, torch.zeros(1, 2, dtype=torch.long, device=device))
    finally:
        for handle in handles:
            handle.remove()
    unused = [target.name for target in targets if target not in order]
    if unused:
        raise InputError(
            f"{unused[0]} takes no part in a forward pass (routed experts?): "
            "leave it out with --target"
        )
    shared = []
    for target, tensor in zip(order, kept, strict=True):
        key = (id(tensor), target.bias is not None)  # a column of ones makes another A
        shared.append(replace(target, input_of=first.setdefault(key, target.name)))
    return shared
