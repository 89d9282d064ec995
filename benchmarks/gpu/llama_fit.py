"""EK-FAC on a Llama of 8 billion random weights: seconds and bytes by stage, and those planned.

The model has the shape of Llama-3-8B and is made on the device; tokens are drawn by Zipf's law.
Time and memory do not depend on the values. Measurements, in this order:

- ``speed``: matrix products and memory bandwidth of the device.
- ``unlearn blocks 3-6``: one step of ``kfade.unlearn`` with a fit on a part of the tokens: its
  stages, its measured KL, and the plan for the same work.
- ``covariance`` and ``lambda`` of the same blocks on all tokens, and of groups of all blocks that
  fit the device, on a part: the deepest group and the shallowest one. Eigenbases are not computed
  for it: the pass of Λ takes identities, which cost the same.
- ``dtypes, block 3``: the step of a bfloat16 fit against that of a float32 fit: cosine in the
  float32 fit's G-norm, and the forget loss at equal measured KL.

The *limit* of a covariance pass is its flops by ``planning/cost.py`` at the measured rate of matrix
products.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import kfade
from benchmarks.experiments.lab.pieces import Piece
from benchmarks.experiments.lab.records import Record, number, table
from benchmarks.gpu.measure import clocked, measure
from kfade.curvature.curvature import Curvature
from kfade.curvature.draws import square_root_draw
from kfade.curvature.fit import COVARIANCE_STREAM, EIGENVALUE_STREAM, pseudo_gradients
from kfade.curvature.groups import group_targets
from kfade.curvature.owners import Owners
from kfade.curvature.passes import run_pass
from kfade.curvature.sums import Covariances, Eigenvalues
from kfade.curvature.vectors import Vector
from kfade.data.batches import Batch, make_batches
from kfade.data.sequences import TokenSequence
from kfade.method.gauge import Gauge, parameter_changes
from kfade.method.gradient import forget_gradient
from kfade.method.size import choose_alpha
from kfade.method.step import gauss_newton_step
from kfade.models.targets import Target
from kfade.planning import cost
from kfade.planning.memory import Work, examine, overhead, peaks
from kfade.runtime.stages import Clock, stage, timing

LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ESTIMATOR = kfade.EKFAC()
ZIPF_SHIFT = 2.7  # the r-th most frequent token has a probability ∝ 1 / (r + 2.7)
USABLE = 0.9  # of the device's memory, for the groups: some of it is lost to fragments
KLS = (0.01, 0.04, 0.16)  # the first one that bfloat16 can measure is taken
STAGES = ("covariance", "eigh", "lambda", "gradient", "step", "check")


@dataclass(frozen=True)
class Sizes:
    """What is fitted. A sequence has ``length`` tokens."""

    config: dict[str, Any] = field(default_factory=lambda: dict(LLAMA))
    band: str = "3-6"
    block: str = "3"
    length: int = 512
    sequences: int = 1000
    part: int = 128
    """Sequences of the fit of ``unlearn``, and of the passes for a group of all blocks."""
    few: int = 32
    """Sequences of the fits that compare dtypes, in batches of a quarter of the positions."""
    forget: int = 32
    held_out: int = 32
    batch_tokens: int = 4096


SMALL = Sizes(
    config=dict(TINY), length=17, sequences=12, part=6, few=6, forget=4, held_out=3, batch_tokens=64
)


def main(given: argparse.Namespace) -> str:
    return shown(measure(pieces(LlamaFit(SMALL if given.tiny else Sizes(), given.device)), given))


def pieces(lab: LlamaFit) -> Iterator[Piece]:
    sizes = lab.sizes
    yield "speed", lab.speed
    yield f"unlearn blocks {sizes.band}", lab.unlearn
    for name in ("covariance", "lambda"):
        one_pass = partial(lab.one_pass, name, sizes.band, sizes.sequences)
        yield f"{name}, blocks {sizes.band}, all tokens", one_pass
    for name in ("covariance", "lambda"):
        for place in ("deepest", "shallowest"):
            yield f"{name}, {place} group of all", partial(lab.group_pass, name, place)
    yield f"dtypes, block {sizes.block}", lab.compare_dtypes


class LlamaFit:
    """The model and its tokens, made when first asked for."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device

    @cached_property
    def model(self) -> Any:
        return random_model(self.sizes.config, torch.bfloat16, self.device)

    @cached_property
    def tokens(self) -> dict[str, list[TokenSequence]]:
        """``retain``, ``forget`` and ``held_out``."""
        sizes = self.sizes
        counts = {"retain": sizes.sequences, "forget": sizes.forget, "held_out": sizes.held_out}
        rows = zipf_rows(sum(counts.values()), sizes.length, sizes.config["vocab_size"])
        found, start = {}, 0
        for name, count in counts.items():
            found[name] = [whole_sequence(row) for row in rows[start : start + count]]
            start += count
        return found

    def targets(self, layers: str | None = None) -> list[Target]:
        return kfade.find_targets(self.model, layers=layers)

    def batches(self, name: str, count: int | None = None, share: int = 1) -> list[Batch]:
        """Batches of ``batch_tokens`` / ``share`` positions."""
        budget, own = self.sizes.batch_tokens // share, self.tokens[name][:count]
        return make_batches(own, budget=budget, device=self.device)

    @cached_property
    def rates(self) -> cost.Speed:
        return cost.measure_speed(torch.device(self.device), torch.bfloat16)

    def speed(self) -> Record:
        """FLOP/s of matrix products in bfloat16 and float32, and bytes/s of memory."""
        rates = self.rates
        return {
            "bfloat16": rates.products,
            "float32": rates.float32,
            "bandwidth": rates.bandwidth,
        }

    def unlearn(self) -> Record:
        """One step on ``band``, with the first of ``KLS`` that can be measured."""
        sizes, targets = self.sizes, self.targets(self.sizes.band)
        data = {**self.tokens, "retain": self.tokens["retain"][: sizes.part]}
        for kl in KLS:
            clock = Clock()
            try:
                with timing(clock):
                    update = kfade.unlearn(
                        self.model,
                        **data,
                        fit=ESTIMATOR,
                        size=kfade.StepSize(kl=kl),
                        run=kfade.Run(
                            targets=targets,
                            steps=1,
                            correction=kfade.Correction(count=0),
                            batch_tokens=sizes.batch_tokens,
                        ),
                    )
            except kfade.InputError as error:
                if kl == KLS[-1]:
                    raise
                print(f"KL {kl:g}: {error}", flush=True)
                continue
            step = update.provenance["steps"][-1]
            keys = ("measured_kl", "predicted_kl", "exact_kl", "forget_loss_before")
            told = {key: step[key] for key in (*keys, "forget_loss_after")}
            return {**clocked(clock), **self.planned(targets, sizes.part), **told, "kl": kl}
        raise AssertionError("no KL to try")

    def one_pass(self, name: str, layers: str, count: int) -> Record:
        """A pass over ``count`` sequences for the targets in some blocks."""
        return self._pass(name, self.targets(layers), count)

    def group_pass(self, name: str, place: str) -> Record:
        """A pass for the first or last of the groups of all layers that fit the device."""
        groups = self.groups
        group = groups[0] if place == "deepest" else groups[-1]
        blocks = {"groups": len(groups), "targets": len(group)}
        return {**blocks, **self._pass(name, group, self.sizes.part)}

    @cached_property
    def groups(self) -> list[list[Target]]:
        """All layers in groups whose curvature fits the device beside the model and a pass."""
        targets = self.targets()
        if not self.device.startswith("cuda"):
            return group_targets(targets, ESTIMATOR.peak_bytes, ESTIMATOR.peak_bytes(targets) // 2)
        total = torch.cuda.get_device_properties(self.device).total_memory
        usable = round(USABLE * total)
        subject = examine(self.model, targets, self._work(self.sizes.part))
        budget = usable - overhead(subject, ESTIMATOR.passes)
        return group_targets(targets, ESTIMATOR.peak_bytes, budget)

    def _pass(self, name: str, targets: Sequence[Target], count: int) -> Record:
        owners = Owners(targets, ESTIMATOR.peak_bytes, spread=False)
        sums: Covariances | Eigenvalues
        if name == "covariance":
            sums, stream = Covariances(owners), COVARIANCE_STREAM
        else:
            sums, stream = Eigenvalues(owners, identities(targets)), EIGENVALUE_STREAM
        pseudo, clock = pseudo_gradients(square_root_draw, 0, stream), Clock()
        batches = self.batches("retain", count)
        run_pass(self.model, batches[:1], targets, sums, pseudo, f"{name}, warm-up")
        with timing(clock), stage(name):
            run_pass(self.model, batches, targets, sums, pseudo, name)
        return {**clocked(clock), **self.planned(targets, count)}

    def _work(self, count: int) -> Work:
        sizes = self.sizes
        return Work(
            estimator=ESTIMATOR,
            retain_tokens=count * sizes.length,
            forget_tokens=sizes.forget * sizes.length,
            sequence_length=sizes.length,
            batch_tokens=sizes.batch_tokens,
        )

    def planned(self, targets: Sequence[Target], count: int) -> Record:
        """Seconds, peak bytes and limit of a covariance pass that kfade plans for this device."""
        work = self._work(count)
        subject = examine(self.model, targets, work)
        flops = cost.flops(subject, [targets], work)
        return {
            "tokens": round(work.positions(work.retain_tokens)),
            "planned_seconds": cost.seconds(subject, [targets], work, self.rates),
            "planned_bytes": peaks(subject, [targets], work),
            "flops": {name: sum(flops[name].values()) for name in ("covariance", "lambda")},
            "limit": sum(flops["covariance"].values()) / self.rates.products,
        }

    def compare_dtypes(self) -> Record:
        """The step of a fit in bfloat16 against that in float32, of the same weights and labels.

        The model is in float32 afterwards; its weights are those of bfloat16.
        """
        fits, few = {}, self.sizes.few
        for dtype in (torch.bfloat16, torch.float32):
            self.model.to(dtype)
            targets, batches = self.targets(self.sizes.block), self.batches("retain", few, 4)
            fits[dtype] = ESTIMATOR.fit(self.model, batches, targets)
        forget = self.batches("forget", share=4)
        gradient = forget_gradient(self.model, forget, targets, kfade.margin)
        gauge = Gauge(self.model, self.batches("held_out", share=4), forget)
        exact, steps, told = fits[torch.float32], {}, {}
        for dtype, curvature in fits.items():
            step = gauss_newton_step(curvature, gradient, kfade.Damping())
            steps[dtype] = step.direction
            changes = parameter_changes(targets, step.direction)
            told[str(dtype).removeprefix("torch.")] = self._at_kl(gauge, changes)
        of_32, of_16 = steps[torch.float32], steps[torch.bfloat16]
        lengths = inner(exact, of_32, of_32) * inner(exact, of_16, of_16)
        self.__dict__.pop("model")
        gc.collect()
        return {"cosine": inner(exact, of_32, of_16) / lengths**0.5, **told}

    def _at_kl(self, gauge: Gauge, changes: Vector) -> Record:
        """KL and forget loss where the measured KL is the first of ``KLS``."""
        base = gauge.measure(kfade.Update({}), kfade.margin)
        found = choose_alpha(
            lambda a: gauge.measure(kfade.Update({}).plus(changes, a), kfade.margin, a),
            kfade.StepSize(kl=KLS[0]),
            share=1.0,
            start=base,
            guess=0.1,
        )[-1]
        return {"kl": found.retain_kl, "forget_loss": found.forget_loss, "before": base.forget_loss}


def random_model(config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    """A Llama with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=dtype)
    return made.eval()


def zipf_rows(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Token rows drawn by Zipf's law, the most frequent token first."""
    weights_V = 1 / (torch.arange(vocabulary, dtype=torch.float64) + 1 + ZIPF_SHIFT)
    cumulative_V = weights_V.cumsum(0) / weights_V.sum()
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, length, generator=generator, dtype=torch.float64)
    rows: list[list[int]] = torch.searchsorted(cumulative_V, uniform).tolist()
    return rows


def whole_sequence(row: list[int]) -> TokenSequence:
    """A sequence in which every token but the first is scored."""
    return TokenSequence(tuple(row), (False,) + (True,) * (len(row) - 1))


def identities(targets: Sequence[Target]) -> dict[str, tuple[Tensor, Tensor]]:
    """Bases that cost what eigenbases cost: one for each input, one for each layer's outputs."""
    inputs: dict[str, Tensor] = {}
    found = {}
    for target in targets:
        outputs, width = target.shape
        eye = partial(torch.eye, dtype=torch.float32, device=target.weight.device)
        if target.input_of not in inputs:
            inputs[target.input_of] = eye(width)
        found[target.name] = (eye(outputs), inputs[target.input_of])
    return found


def inner(curvature: Curvature, first: Vector, second: Vector) -> float:
    """xᵀ G̃ y over all layers."""
    product = curvature.matvec(second)
    return sum((first[name] * product[name]).sum().item() for name in product)


def shown(results: dict[str, Record]) -> str:
    """One row for each stage of each measurement: measured beside planned."""
    rows = []
    for name, told in results.items():
        for stage_name in STAGES:
            if stage_name in told.get("seconds", {}):
                seconds, planned = told["seconds"][stage_name], told["planned_seconds"][stage_name]
                ratio = number(seconds / told["limit"]) if stage_name == "covariance" else ""
                cells = [number(seconds), number(planned)]
                cells += [
                    number(told[key][stage_name] / 1e9) for key in ("peak_bytes", "planned_bytes")
                ]
                per_token = number(1e6 * seconds / told["tokens"])
                rows.append([name, stage_name, *cells, per_token, ratio])
    heads = "measurement | stage | s | planned, s | peak, GB | planned, GB | µs/token | / limit"
    told = [f"{name}: {record}" for name, record in results.items() if "seconds" not in record]
    return "\n\n".join([table(heads, rows), *told])
