"""Peak memory of each stage of unlearning, in bytes, predicted before the run.

The prediction uses the shapes of the targets and one traced pass (``trace``), no weights or data.
Sequences are assumed to be packed: all have L tokens and T = L − 1 positions.

Shapes: O outputs, I inputs of a layer, D hidden width, V vocabulary, B sequences of a batch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kfade.curvature.estimators import KFAC, Estimator
from kfade.curvature.factors import sum_dtype
from kfade.curvature.groups import largest_share
from kfade.curvature.jacobian import sum_bytes
from kfade.errors import InputError
from kfade.models.experts import ExpertLayer, expert_modules, routed
from kfade.models.head import chunk_positions
from kfade.models.interface import check_length
from kfade.models.layers import decoder_blocks
from kfade.models.targets import Target, memory_of
from kfade.planning.trace import PassCost, trace_pass

RUNTIME_BYTES = 450_000_000
"""Python, PyTorch, transformers and their threads, measured on a CPU; a CUDA context is similar."""
LEAST_RETAIN = 64
"""Sequences at least, where a correction takes half of the retain set."""
HEAD_COPIES = {"fit": 4, "gradient": 5, "step": 6, "check": 8}
"""Number of tensors of a chunk's logits at the head: logits, probabilities, draws, differences."""


@dataclass(frozen=True)
class Work:
    """The settings of a run that its cost depends on."""

    estimator: Estimator = KFAC()
    """Estimator of the curvature."""
    retain_tokens: int = 4000 * 512
    """Tokens that the curvature is fitted on."""
    forget_tokens: int = 2500 * 512
    """Tokens of the forget set in one step."""
    sequence_length: int = 512
    """Tokens of a sequence."""
    batch_tokens: int = 4096
    """Positions in one pass."""
    recompute: bool = False
    """Whether blocks run again in backward passes instead of keeping their activations."""
    offload: bool = False
    """Whether gradient, direction, update and replaced weights are kept outside the device."""
    refine: int = 0
    """Iterations of conjugate gradients that improve the direction."""
    refine_sequences: int = 64
    """Retain sequences in each product with the Gauss-Newton matrix of these iterations."""
    steps: int = 1
    """Gauss-Newton steps by one fit."""
    has_noise: bool = False
    """Whether the forget gradient takes a noisy copy of each text, too."""
    chooses_at_prompts: bool = False
    """Whether a damping is chosen for a gradient of the prompts, by one of all positions."""
    correct: int = 0
    """Corrections after the last step."""
    correct_sequences: int | None = None
    """Retain sequences in the KL's gradient for each of them; None: half, at least 64."""

    @property
    def length(self) -> int:
        """Positions T of a sequence: the last token is predicted, but is no input."""
        return self.sequence_length - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T) of a batch, as ``make_batches`` makes it."""
        return max(1, self.batch_tokens // self.length), self.length

    def positions(self, tokens: int) -> float:
        """Number of positions in sequences with ``tokens`` tokens in total."""
        return tokens * self.length / self.sequence_length

    @property
    def correct_positions(self) -> float:
        """Positions in the KL's gradient for a correction."""
        retain = self.positions(self.retain_tokens)
        count = self.correct_sequences
        half = max(LEAST_RETAIN * self.length, retain / 2)
        asked = half if count is None else count * self.length
        return min(retain, float(asked))


@dataclass(frozen=True)
class Workload:
    """A model, its targets and the cost of a pass, as the estimates need them."""

    targets: Sequence[Target]
    cost: PassCost
    model_bytes: int
    head: tuple[int, int]
    """(V, D)."""
    device: torch.device
    """Device of the passes, which the size of the head's chunks depends on."""
    shards: int = 1
    """Number of processes over which the weights, the curvature's layers and vectors are spread."""

    @property
    def size(self) -> int:
        """Bytes of one entry of sums, gradients and updates."""
        return sum_dtype(self.targets[0].dtype).itemsize

    @property
    def targeted(self) -> int:
        """Number of parameters that can change."""
        return sum(target.shape[0] * target.shape[1] for target in self.targets)

    @property
    def vector_bytes(self) -> int:
        """Bytes of a gradient, a direction or an update, one [O, I] matrix for each target, in a
        process."""
        return sum_bytes(self.targets) // self.shards

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest matrix of a vector."""
        return max(sum_bytes([target]) for target in self.targets)

    @property
    def replaced_bytes(self) -> int:
        """Bytes of the targeted weights, which are kept while an update replaces them, in a
        process."""
        return self.targeted * self.targets[0].dtype.itemsize // self.shards

    def reference_bytes(self, work: Work) -> int:
        """Bytes of the original model's hidden states that a correction's gradient compares with,
        in a process."""
        if not work.correct:
            return 0
        itemsize = self.targets[0].dtype.itemsize
        return round(work.correct_positions * self.head[1] * itemsize / self.shards)

    def input_bytes(self, group: Sequence[Target]) -> int:
        """Bytes of the targets' inputs that are kept until their gradients are computed.

        These are the inputs of all targets; if blocks run again, those of one block.
        """
        numbers: Counter[int] = Counter()
        for target in {target.tensor_of: target for target in group}.values():
            block = target.block if self.cost.recompute else 0
            numbers[block] += self.cost.rows[target.tensor_of] * target.shape[1]
        return max(numbers.values()) * group[0].dtype.itemsize

    def share(self, target: Target) -> float:
        """Share of the positions that a target reads: less than 1 for an expert."""
        return self.cost.rows[target.tensor_of] / self.cost.positions

    def head_bytes(self, stage: str) -> int:
        """Peak bytes at the head, which handles a chunk of positions at a time."""
        return head_bytes(stage, self.cost.positions, self.head[0], self.size, self.device)


def head_bytes(stage: str, positions: int, vocabulary: int, size: int, device: torch.device) -> int:
    """Peak bytes at the head of a stage, for logits of ``size`` bytes each."""
    chunk = min(chunk_positions(vocabulary, size, device), positions)
    return HEAD_COPIES[stage] * chunk * vocabulary * size


def model_bytes(model: Any, shards: int = 1) -> int:
    """Bytes of a model's parameters and buffers in one process; tied ones count once.

    If the weights of the blocks are sharded over processes (``distributed.shard``), a process holds
    its shards, two complete blocks (the current and the next one), and all other weights. Experts
    are gathered through one more copy, since FSDP puts together parts of every matrix.
    """
    all_bytes = _bytes_of(model)
    if shards == 1:
        return all_bytes
    _, blocks = decoder_blocks(model)
    sizes = [_bytes_of(block) for block in blocks]
    copies = [sum(_bytes_of(module) for module in expert_modules(block)) for block in blocks]
    return all_bytes - sum(sizes) + sum(sizes) // shards + 2 * max(sizes) + max(copies)


def _bytes_of(module: nn.Module) -> int:
    tensors = {memory_of(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def examine(
    model: Any,
    targets: Sequence[Target],
    work: Work,
    shards: int = 1,
    device: torch.device | None = None,
) -> Workload:
    """Trace a pass of a model, whose tensors are real or fake.

    Args:
        shards: number of processes over which the weights of the blocks will be sharded; ``model``
            itself is not sharded yet.
        device: device of the run. None: that of the targets, which is the CPU for a skeleton.

    Raises:
        InputError: the operations of a pass depend on values, or sequences are too long.
    """
    with on_shapes(model):
        check_length(model, work.length)
        cost = trace_pass(model, targets, work.shape, recompute=work.recompute)
    vocabulary, width = model.get_output_embeddings().weight.shape
    device = device or targets[0].device
    return Workload(targets, cost, model_bytes(model, shards), (vocabulary, width), device, shards)


@contextlib.contextmanager
def on_shapes(model: Any) -> Iterator[None]:
    """Within the ``with``, passes on fake tensors give all experts of a layer equally many rows.

    Raises:
        InputError: an operation needs values, not shapes alone.
    """
    try:
        with routed(ExpertLayer(module) for module in expert_modules(model)):
            yield
    except RuntimeError as error:  # experts of another kind: rows depend on values
        raise InputError(
            f"{type(model).__name__} cannot be planned: its passes depend on its weights "
            f"({str(error).splitlines()[0]}): fit it without --memory"
        ) from error


def overhead(subject: Workload, passes: Sequence[str]) -> int:
    """Peak bytes of passes ("covariance", "lambda", "gradient") without the sums that they make."""
    most = max((_pass_bytes(subject, name, subject.targets) for name in passes), default=0)
    return RUNTIME_BYTES + subject.model_bytes + most


def peaks(
    subject: Workload,
    groups: Sequence[Sequence[Target]],
    work: Work,
    *,
    gradient_groups: Sequence[Sequence[Target]] | None = None,
) -> dict[str, int]:
    """Peak bytes of each stage.

    A fit holds one group of layers at a time; if the model is sharded, the largest share of the
    group, and of each vector a part. Finished curvature is on disk and is read one layer at a
    time. The gradient stays in memory until the direction is known, the direction until the step is
    taken. The search for the step's size adds the weights that are replaced. Refinement adds five
    vectors and the best direction so far; its solves add one more. With ``offload`` all of these
    are elsewhere, and a pass for the gradient holds one of ``gradient_groups``. After the first
    step there is the update, too, and the weights that it replaces.

    A correction begins with the update. The first gradient becomes a direction r; with r and the
    hidden states of the original model the second is computed, and becomes a direction d. Update, r
    and d are there while the gradient of held-out data is computed, and in the search for the
    length; then the new update is beside the old one.
    """
    estimator, refine = work.estimator, work.refine > 0
    fixed = RUNTIME_BYTES + subject.model_bytes
    found = {"load": fixed}
    for group in groups:
        share = largest_share(group, estimator.peak_bytes, subject.shards)
        for stage, curvature in estimator.fit_bytes(share).items():
            passing = 0 if stage == "eigh" else _pass_bytes(subject, stage, group)
            found[stage] = max(found.get(stage, 0), fixed + passing + curvature)
    targets, cost = subject.targets, subject.cost
    vector = 0 if work.offload else subject.vector_bytes
    largest = subject.largest_bytes
    read = max(estimator.stored_bytes([target]) for target in targets)
    summed = max(
        _pass_bytes(subject, "gradient", group)
        + sum_bytes(largest_share(group, sum_bytes, subject.shards))
        for group in gradient_groups or [targets]
    )
    replaced = 0 if work.offload else subject.replaced_bytes
    before = vector + replaced if work.steps > 1 else 0
    second = vector if work.chooses_at_prompts else 0
    found["gradient"] = fixed + max(before, second) + summed + largest
    solve = read + 2 * vector + 4 * largest
    exact = vector + 2 * cost.forward_bytes + subject.head_bytes("step") + 2 * largest
    # While a damping is chosen, before the first step, the gradient is there too.
    found["step"] = fixed + max(max(before, second) + solve, max(before, vector + second) + exact)
    held = 0
    if refine:
        held = 6 * vector
        product = summed + 2 * cost.forward_bytes + 5 * vector
        found["refine"] = fixed + before + max(product + largest, read + 7 * vector + 4 * largest)
    trial = cost.forward_bytes + subject.head_bytes("check")
    searching = vector + held + replaced + 3 * largest + trial
    found["check"] = fixed + searching + (vector if work.steps > 1 else 0)
    if work.correct:
        kept = 0 if work.offload else subject.reference_bytes(work)
        own = summed + 2 * vector + replaced + kept + largest
        held_out = summed + 3 * vector + replaced + largest
        lengths = 3 * vector + replaced + 3 * largest + max(trial, exact - vector - 2 * largest)
        found["correct"] = fixed + max(own, held_out, read + 4 * vector + 4 * largest, lengths)
    return found


def _pass_bytes(subject: Workload, stage: str, group: Sequence[Target]) -> int:
    """Peak bytes of a pass without the model and the sums. The peak is at the head or after it.

    Passes that need products of inputs and gradients keep the inputs of all layers until the
    backward pass. If blocks run again, they keep those of one block, after the head has run.
    """
    inputs = 0 if stage == "covariance" else subject.input_bytes(group)
    head = subject.head_bytes("gradient" if stage == "gradient" else "fit")
    cost = subject.cost
    if cost.recompute:
        most = max(cost.surplus_bytes + inputs, head)
    else:
        most = max(cost.surplus_bytes, head) + inputs
    return cost.held_bytes[group[0].tensor_of] + most
