"""Find the weights to change: the linear maps of the feed-forward blocks, by structure.

No table of model families: the decoder's blocks are the longest list of modules with linear maps
in it; within a block everything that is not attention is feed-forward (paper §3, "Components
targeted"). A glob over parameter names and a range of blocks narrow the choice. Whether a weight
can be changed is seen in a forward pass over a few tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kfade.errors import InputError
from kfade.models.experts import (
    ExpertLayer,
    ExpertMap,
    expert_modules,
    is_expert_layer,
    routers,
)
from kfade.models.interface import check_interface
from kfade.models.probe import probe, share_inputs
from kfade.models.targets import Choice, LeftOut, Target, memory_of, refuse_compiled

ALL, NONE = "all", "none"
"""Words for routed experts."""


def find_targets(
    model: nn.Module,
    *,
    layers: str | None = None,
    pattern: str | None = None,
    joint_bias: bool = False,
    experts: str = ALL,
    shared_inputs: bool = False,
) -> list[Target]:
    """The weights to change, in the order of the forward pass; see :func:`choose_targets`."""
    return choose_targets(
        model,
        layers=layers,
        pattern=pattern,
        joint_bias=joint_bias,
        experts=experts,
        shared_inputs=shared_inputs,
    ).targets


def choose_targets(
    model: nn.Module,
    *,
    layers: str | None = None,
    pattern: str | None = None,
    joint_bias: bool = False,
    experts: str = ALL,
    shared_inputs: bool = False,
    attention: bool = False,
) -> Choice:
    """The weights to change, and those of the default that cannot be changed.

    Without ``pattern`` every linear map of the blocks outside their attention is taken: the
    feed-forward maps, those of experts, and in blocks without attention those of the mixer. Where
    nothing is left of them, the maps of attention are taken.

    These weights are left out: convolutions, routers, experts that transformers cannot run in
    another way, tied maps, maps whose weight is made of other parameters, and maps that a forward
    pass does not run exactly once with one vector for each position.

    Args:
        layers: blocks as in ``3-6`` or ``0,2,8-11``, counted from 0; all when None.
        pattern: a glob over parameter names (``*.mlp.down_proj.weight``); it may reach attention
            too. What it matches is taken or refused.
        joint_bias: treat a layer's bias as one more column of its weight.
        experts: numbers of the routed experts of each layer, as in ``3,7,20-30``; ``all`` or
            ``none``.
        shared_inputs: give the chosen experts of a layer one input factor A for each of their two
            matrices, instead of one for each expert.
        attention: take attention's maps too where there is no ``pattern``.

    Raises:
        InputError: nothing is left; a match of ``pattern`` cannot be changed or lies outside the
            blocks; a weight is quantised; a module is compiled; later tokens change earlier hidden
            states; the model does not run on tokens alone.
    """
    refuse_compiled(model)
    check_interface(model)
    blocks_name, blocks = decoder_blocks(model)
    sharers = _names_by_memory(model)
    found: list[Target] = []
    left_out: list[LeftOut] = []
    for index in sorted(parse_layers(layers, len(blocks))):
        prefix = f"{blocks_name}.{index}"
        own, unfit = _linear_maps(prefix, blocks[index], pattern, sharers)
        found += [_target(name, module, index, joint_bias) for name, module in own]
        left_out += unfit
        for name, map_ in _expert_maps(prefix, blocks[index], pattern, experts):
            found.append(_target(name, map_, index, joint_bias))
    if pattern is not None:
        _refuse_outside(model, pattern, blocks_name, sharers)
        _refuse(left_out)
    if not found and pattern is not None and experts == NONE:
        _refuse_experts_only(model, layers, pattern)
    _refuse_if_none(model, found, left_out, layers, pattern)
    seen, unfit = probe(model, found)
    left_out += unfit
    misfits = {weight.name for weight in unfit}
    by_name = {target.name: target for target in found if target.name not in misfits}
    found = [by_name[name] for name in seen.inputs if name in by_name]
    if pattern is not None:
        _refuse(unfit)
        return Choice(share_inputs(found, seen, shared_inputs), [])

    def feed_forward(weight: Target | LeftOut) -> bool:
        block, _, path = weight.name.removeprefix(f"{blocks_name}.").partition(".")
        return not _inside_attention(blocks[int(block)], path.rpartition(".")[0])

    if not attention and any(feed_forward(target) for target in found):
        found = [target for target in found if feed_forward(target)]
        left_out = [weight for weight in left_out if feed_forward(weight)]
    _refuse_if_none(model, found, left_out, layers, pattern)
    return Choice(share_inputs(found, seen, shared_inputs), left_out)


def _names_by_memory(model: nn.Module) -> dict[Hashable, list[str]]:
    """The names of the model's parameters, those that share memory (tied weights) together."""
    names: dict[Hashable, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(memory_of(parameter), []).append(name)
    return names


def _linear_maps(
    prefix: str, block: nn.Module, pattern: str | None, sharers: Mapping[Hashable, list[str]]
) -> tuple[list[tuple[str, nn.Module]], list[LeftOut]]:
    """(the linear maps of one block by name, its weights that cannot be changed).

    With a ``pattern`` only what it matches; else all, and no other parameters of attention.
    """
    found: list[tuple[str, nn.Module]] = []
    left_out: list[LeftOut] = []
    choosing = routers(block)
    for name, module in block.named_modules(prefix=prefix):
        if pattern is not None and not _matches(name, module, pattern):
            continue
        _refuse_quantised(name, module)
        is_linear = isinstance(module, nn.Linear | Conv1D)
        path = name[len(prefix) + 1 :]
        if pattern is not None or is_linear or not _inside_attention(block, path):
            left_out += _not_linear(name, module)
        if not is_linear:
            continue
        unfit = _unfit(f"{name}.weight", module, choosing, sharers)
        if unfit is None:
            found.append((f"{name}.weight", module))
        else:
            left_out.append(unfit)
    return found, left_out


def _expert_maps(
    prefix: str, block: nn.Module, pattern: str | None, experts: str
) -> list[tuple[str, ExpertMap]]:
    """The maps of a block's routed experts, by the names of their weights."""
    found: list[tuple[str, ExpertMap]] = []
    for name, module in block.named_modules(prefix=prefix) if experts != NONE else ():
        if not is_expert_layer(module):
            continue
        layer = ExpertLayer(module)
        given = None if experts == ALL else experts
        wanted = parse_numbers(given, len(layer.first), "--experts", f"{name} has experts")
        for map_ in layer.maps:
            whole = f"{name}.{map_.parameter}"
            if map_.expert in wanted and (pattern is None or fnmatchcase(whole, pattern)):
                found.append((f"{name}.{map_.name}", map_))
    return found


def _unfit(
    name: str, module: Any, choosing: Collection[int], sharers: Mapping[Hashable, list[str]]
) -> LeftOut | None:
    """Why the weight of a linear map cannot be changed, as far as is known before it is run."""
    if id(module) in choosing:
        reason = "is a router: which experts run depends on it, not only what they give"
        return LeftOut(name, "routers", reason)
    tied = sharers.get(memory_of(module.weight))
    if tied is None:
        reason = (
            "is made of other parameters in each pass (parametrised, normalised or pruned): make "
            "it permanent first (remove_parametrizations, prune.remove)"
        )
        return LeftOut(name, "weights made of other parameters", reason)
    others = [other for other in tied if other != name]
    if others:
        reason = f"is tied to {others[0]}: changing one would change both"
        return LeftOut(name, "tied weights", reason)
    return None


def parse_layers(layers: str | None, count: int) -> set[int]:
    """The block numbers of ``3-6`` or ``0,2,8-11``; all ``count`` of them for None."""
    return parse_numbers(layers, count, "--layers", "this model has blocks")


def parse_numbers(words: str | None, count: int, option: str, have: str) -> set[int]:
    """The numbers of ``3-6`` or ``0,2,8-11``, from 0 to ``count`` − 1; all of them for None.

    Raises:
        InputError: they are written otherwise, or too large; names the ``option`` and what there is
            (``have``).
    """
    if words is None:
        return set(range(count))
    wanted: set[int] = set()
    for part in words.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            kind = option.removeprefix("--").removesuffix("s").replace("layer", "block")
            raise InputError(f"{option} {words}: write {kind} numbers as 3-6 or 0,2,8-11")
        wanted.update(range(int(first), int(last) + 1))
    if max(wanted) >= count:
        raise InputError(f"{option} {words}: {have} 0 to {count - 1}")
    return wanted


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, modules) of the longest outermost ModuleList of which each entry holds a matrix.

    Raises:
        InputError: there is none.
    """
    decoder = getattr(model, "get_decoder", lambda: None)() or model
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model
    within = {id(module) for module in decoder.modules()}  # no tower for images or sound
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if id(module) not in within or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if not inner and all(any(p.ndim >= 2 for p in b.parameters()) for b in module):
            lists[name] = module
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks: not supported")
    return max(lists.items(), key=lambda item: len(item[1]))


def _inside_attention(block: nn.Module, path: str) -> bool:
    """Whether a module lies in the block's attention, which its class or attribute name tells."""
    module = block
    for part in path.split(".") if path else []:
        module = module.get_submodule(part)
        if "attn" in part.lower() or "attention" in type(module).__name__.lower():
            return True
    return False


def _matches(module_name: str, module: nn.Module, pattern: str) -> bool:
    """Whether a glob matches a module's weight, or another parameter of three dimensions."""
    own = module.named_parameters(recurse=False)
    names = ["weight", *(name for name, parameter in own if parameter.ndim == 3)]
    return any(fnmatchcase(f"{module_name}.{name}", pattern) for name in names)


def _not_linear(name: str, module: nn.Module) -> list[LeftOut]:
    """A module's own parameters that cannot be changed: convolutions, experts that transformers
    runs in one way only, other parameters of three dimensions."""
    found: list[LeftOut] = []
    if is_expert_layer(module):
        return found
    # Matrices of all experts, one below another:
    in_rows = "expert" in type(module).__name__.lower()
    for own_name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < (2 if in_rows else 3):
            continue
        shape = f"of shape {tuple(parameter.shape)}"
        plain = "kfade changes plain linear maps [O, I]"
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kind, reason = "convolutions", f"is a convolution's weight {shape}: {plain}"
        elif in_rows or "expert" in f"{name}.{own_name}".lower():
            kind = "fused expert weights"
            reason = (
                f"is a fused mixture-of-experts weight {shape}, and {type(module).__name__} is not "
                "a layer of experts that transformers can run in another way, as kfade needs"
            )
        else:
            kind = "parameters that no linear map holds"
            reason = f"is a parameter that no linear map holds, {shape}: {plain}"
        found.append(LeftOut(f"{name}.{own_name}", kind, reason))
    return found


def _refuse_quantised(name: str, module: nn.Module) -> None:
    fused = [(n, p) for n, p in module.named_parameters(recurse=False) if p.ndim >= 3]
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for tensor_name, tensor in [
        *fused,
        *((n, t) for n, t in tensors if n in ("qweight", "weight")),
    ]:
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise InputError(
                f"{name}.{tensor_name} is quantised ({tensor.dtype}): load the model in bfloat16 "
                "or float32 and quantise the edited model afterwards"
            )


def _refuse(left_out: list[LeftOut]) -> None:
    """Raises InputError for the first of them, if there is one."""
    if left_out:
        name, reason = left_out[0].name, left_out[0].reason
        raise InputError(f"{name} {reason}; leave it out with --target or --layers")


def _refuse_if_none(
    model: nn.Module,
    found: list[Target],
    left_out: list[LeftOut],
    layers: str | None,
    pattern: str | None,
) -> None:
    if found:
        return
    _refuse(left_out)
    what = f"no weight matches '{pattern}'" if pattern else "no linear map found"
    some = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)][:3]
    raise InputError(
        f"{what} in {f'blocks {layers}' if layers else 'any block'} of {type(model).__name__}: "
        f"give --target a glob over parameter names such as '{some[0] if some else '*'}.weight'"
    )


def _refuse_experts_only(model: nn.Module, layers: str | None, pattern: str) -> None:
    """Raises InputError where ``pattern`` matches routed experts, which are to be left out."""
    prefix, blocks = decoder_blocks(model)
    for index in parse_layers(layers, len(blocks)):
        if _expert_maps(f"{prefix}.{index}", blocks[index], pattern, ALL):
            raise InputError(
                f"--target {pattern} matches routed experts only, and --experts none leaves these "
                "out: leave one of the two options out"
            )


def has_experts(model: nn.Module) -> bool:
    """Whether a block of the model is a mixture of experts."""
    blocks = decoder_blocks(model)[1]
    others = [weight for module in blocks.modules() for weight in _not_linear("", module)]
    fused = any(weight.kind == "fused expert weights" for weight in others)
    fused = fused or bool(expert_modules(blocks))
    return fused or any(routers(block) for block in blocks)


def _refuse_outside(
    model: nn.Module, pattern: str, blocks_name: str, sharers: Mapping[Hashable, list[str]]
) -> None:
    """Raises InputError where a glob matches a matrix outside the decoder's blocks."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        inside = name.startswith(blocks_name + ".")
        if inside or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            continue
        if fnmatchcase(f"{name}.weight", pattern):
            tied = _unfit(f"{name}.weight", module, (), sharers)
            _refuse([tied] if tied else [])
            raise InputError(
                f"--target {pattern} matches {name}.weight, which is outside the decoder's blocks "
                f"({blocks_name}.*): only linear maps within them can be targeted"
            )


def _target(name: str, module: nn.Module, block: int, joint_bias: bool) -> Target:
    """The target with the weight ``name``."""
    transposed = isinstance(module, Conv1D)
    bias_name = name.removesuffix("weight") + "bias"
    if isinstance(module, ExpertMap):
        transposed = module.layer.transposed
        bias_name = name.replace("[", "_bias[")
    weight = cast(Tensor, module.weight)
    outputs, inputs = weight.T.shape if transposed else weight.shape
    bias = bias_name if joint_bias and module.bias is not None else None
    shape = (outputs, inputs + (bias is not None))
    return Target(name, module, block, shape, transposed, bias, input_of=name)
