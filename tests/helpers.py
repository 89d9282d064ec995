"""Small things that many tests need: tiny models, random sequences, and a snapshot of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import kfade
from kfade.data.batches import Batch
from kfade.data.sequences import TokenSequence
from kfade.method.measure import hidden_reference, mean_divergence
from kfade.method.update import Update
from kfade.models.head import read_head

VOCABULARY = 17


def tiny_llama(
    dtype: torch.dtype = torch.float64,
    *,
    layers: int = 2,
    std: float = 0.5,
    seed: int = 0,
    mlp_bias: bool = False,
) -> LlamaForCausalLM:
    """A random Llama of hidden size 8 whose outputs are far from uniform.

    Llama's norms compute in float32 whatever the model's dtype, which would cap every comparison
    in float64 at 1e-7; they are replaced by torch's norm of the same formula.
    """
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=std,
        mlp_bias=mlp_bias,
    )
    with torch.random.fork_rng(), torch.device("cpu"):  # the same weights on every device
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=std)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if "norm" in name:
                    norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
                    norm.load_state_dict(child.state_dict())
                    setattr(module, name, norm)
    return model.to(dtype).to(torch.get_default_device()).eval()


def random_sequences(
    count: int,
    *,
    seed: int = 0,
    shortest: int = 3,
    longest: int = 9,
    one_loss_token: bool = False,
) -> list[TokenSequence]:
    """Random tokens of varied lengths.

    The first third of each is a prompt that is not scored, and every other sequence has an unscored
    tail; with ``one_loss_token`` only the last token is scored.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        tokens = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        first = length - 1 if one_loss_token else max(1, length // 3)
        last = length - 2 if index % 2 and length - 2 >= first else length - 1
        made.append(TokenSequence(tuple(tokens), tuple(first <= t <= last for t in range(length))))
    return made


def small_sets() -> dict[str, list[TokenSequence]]:
    """A forget set, a retain set and held-out retain data of a few random sequences."""
    sizes = {"forget": 6, "retain": 12, "held_out": 8}
    return {name: random_sequences(n, seed=7 + i) for i, (name, n) in enumerate(sizes.items())}


def one_of_all_draws(k: int) -> Callable:
    """u = √p_k (e_k − p). Summed over all k, u uᵀ is exactly diag(p) − p pᵀ."""

    def exhaustive(p_NV, key_N):
        onehot = torch.zeros_like(p_NV)
        onehot[:, k] = 1.0
        return p_NV[:, k : k + 1].sqrt() * (onehot - p_NV)

    return exhaustive


def said_by(model: torch.nn.Module, token: int) -> TokenSequence:
    """What a model says after a token: at each place the likeliest one."""
    tokens = [token]
    with torch.no_grad():
        for _ in range(7):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return TokenSequence(tuple(tokens), (False, *[True] * 7))


def flat(**options: Any) -> dict[str, Any]:
    """Options of ``kfade.unlearn`` with those of its settings sorted into them, where there are
    some: ``flat(targets=t, kl=0.01, fit=f)`` is run=Run(targets=t), size=StepSize(kl=0.01), fit=f.

    A run has one step in one band, or steps that go equal parts of the way, a damping of 0.1, fits
    at each step, weighs no texts, has no bound and no noise, and corrects nothing, unless the
    options say otherwise.
    """
    plain = {
        "steps": 1,
        "bands": 1,
        "bound": 0.0,
        "noise": 0.0,
        "weigh_texts": False,
        "refit": True,
        "correction": kfade.Correction(count=0),
    }
    plain["damping"] = kfade.Damping()
    options = {**plain, **options}
    options.setdefault("first_share", 1 / options["steps"])
    if isinstance(options.get("damping"), float):
        options["damping"] = kfade.Damping(options["damping"], options.pop("relative", True))
    kinds = {"direction": kfade.Direction, "size": kfade.StepSize, "run": kfade.Run}
    sorted_options = {}
    for name, kind in kinds.items():
        own = {f.name: options.pop(f.name) for f in fields(kind) if f.name in options}
        if own:
            sorted_options[name] = kind(**own)
    return {**sorted_options, **options}


def command_line(given: Sequence[str], more: Sequence[str]) -> list[str]:
    """The arguments ``given`` and ``more``. An option in ``more`` replaces that in ``given``, where
    each has one value."""
    kept = list(given)
    for word in more:
        if word.startswith("--") and word in kept:
            at = kept.index(word)
            del kept[at : at + 2]
    return [*kept, *more]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def measured_kl(model: nn.Module, batches: Sequence[Batch], update: Update) -> float:
    """Mean KL(model ‖ model with ``update``) per loss token, as kfade measures it."""
    before = hidden_reference(model, batches, "before")
    with update.applied_to(model):
        after = hidden_reference(model, batches, "after")
    return mean_divergence(read_head(model), before, after)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal dtype, shape and bytes, on any devices: tells −0 from 0 and takes NaN for itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (x.detach().cpu().reshape(-1).view(torch.uint8) for x in (first, second))
    return torch.equal(one, other)


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model that a computation must leave as it was."""

    weights: dict[str, Tensor]
    identities: dict[str, int]
    flags: dict[str, bool]
    modes: dict[str, bool]
    hooks: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        parameters = dict(model.named_parameters())
        return cls(
            {name: p.detach().clone() for name, p in parameters.items()},
            {name: id(p) for name, p in parameters.items()},
            {name: p.requires_grad for name, p in parameters.items()},
            {name: m.training for name, m in model.named_modules()},
            {name: _count_hooks(m) for name, m in model.named_modules()},
        )

    def differences(self, model: nn.Module) -> list[str]:
        """What is no longer as it was, in words; [] if nothing."""
        now = Snapshot.of(model)
        bits = {name: same_bits(w, now.weights[name]) for name, w in self.weights.items()}
        found = [f"bits of {name}" for name, same in bits.items() if not same]
        for what in ("identities", "flags", "modes", "hooks"):
            if getattr(self, what) != getattr(now, what):
                found.append(what)
        found += [f"grad of {n}" for n, p in model.named_parameters() if p.grad is not None]
        return found


def _count_hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for kind in kinds)


class Tripwire(nn.Module):
    """An activation function that raises in its n-th forward or its n-th backward pass."""

    def __init__(self, inner: nn.Module, *, forward_at: int = 0, backward_at: int = 0) -> None:
        super().__init__()
        self.inner = inner
        self.forward_at, self.backward_at = forward_at, backward_at
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if self.forwards == self.forward_at:
            raise RuntimeError("tripped in forward")
        y = self.inner(x)
        if y.requires_grad:
            y.register_hook(self._trip_backward)
        return y

    def _trip_backward(self, gradient: Tensor) -> None:
        self.backwards += 1
        if self.backwards == self.backward_at:
            raise RuntimeError("tripped in backward")


def greedy(model: nn.Module, prompt: Sequence[int], ends: Sequence[int], count: int) -> list[int]:
    """One sequence, no padding, no cache: the plainest loop; an end token is kept."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


class NoFit:
    """An estimator that must not be fitted."""

    def fit(self, *args, **options):
        raise AssertionError("fitted")


class Counted:
    """A draw that counts its calls, one a batch, and fails at the n-th."""

    __name__ = "square_root_draw"

    def __init__(self, fail_at: int = 0) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, p_NV, key_N):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("cut short")
        return kfade.square_root_draw(p_NV, key_N)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their peak; those of ``apart`` do not count."""

    def __init__(self, apart) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.apart = [tensor.untyped_storage() for tensor in apart]
        self.known = {id(storage) for storage in self.apart}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key, taken = id(storage), storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += taken
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.drop, key, taken)
        return result

    def drop(self, key: int, taken: int) -> None:
        self.known.discard(key)
        self.now -= taken
