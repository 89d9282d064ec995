"""Refined directions: conjugate gradients beside a textbook's on the dense matrix, and what a run
makes of them.

As in test_theory.py, each test also shows the wrong version failing.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from helpers import (
    Snapshot,
    flat,
    measured_kl,
    random_sequences,
    relative_error,
    same_bits,
    tiny_llama,
)
from numpy.typing import NDArray
from oracles.dense import flatten, gauss_newton_matrix, unflatten
from safetensors.torch import load_file
from zoo.rows import FORGET, RETAIN

import kfade
from kfade import EKFAC, Curvature, Damping, InputError, Update, find_targets, make_batches, margin
from kfade.cli import main
from kfade.curvature.estimators import Identity
from kfade.curvature.product import gauss_newton_product
from kfade.method.gradient import forget_gradient
from kfade.method.record import Best, StepRecord
from kfade.method.refine import Directions
from kfade.method.size import NoRiseError
from kfade.method.step import gauss_newton_step
from kfade.method.trial import Trial

UNLEARN = sys.modules["kfade.method.unlearn"]  # kfade.unlearn itself is the function
DAMPINGS = [Damping(0.1), Damping(3e-3, relative=False)]


class System:
    """A tiny model's (G + D) r = g, dense, and what kfade needs for it."""

    def __init__(self) -> None:
        self.model = tiny_llama()
        self.targets = find_targets(self.model)
        self.batches = make_batches(random_sequences(8), budget=20)
        self.curvature = EKFAC().fit(self.model, self.batches, self.targets)
        forget = make_batches(random_sequences(3, seed=7))
        self.gradient = forget_gradient(self.model, forget, self.targets, margin)
        self.g = flatten(self.gradient, self.targets).numpy()
        self.G = gauss_newton_matrix(self.model, self.batches, self.targets).numpy()

    def ridge(self, damping: Damping) -> NDArray:
        """The diagonal of D, with each layer's λ from its own eigenvalues."""
        parts = []
        for target in self.targets:
            grid = self.curvature.blocks[target.name].eigenvalues
            own = damping.value * grid.mean().item() if damping.relative else damping.value
            parts.append(np.full(grid.numel(), own))
        return np.concatenate(parts)

    def fitted(self) -> NDArray:
        """G̃, dense: Q diag(Λ) Qᵀ of each layer on the diagonal."""
        dense = np.zeros_like(self.G)
        start = 0
        for target in self.targets:
            block = self.curvature.blocks[target.name]
            basis = torch.kron(block.q_out, block.q_in).numpy()
            size = len(basis)
            own = basis @ np.diag(block.eigenvalues.reshape(-1).numpy()) @ basis.T
            dense[start : start + size, start : start + size] = own
            start += size
        return dense

    def product(self, x: kfade.curvature.vectors.Vector):
        return unflatten(torch.from_numpy(self.G) @ flatten(x, self.targets), self.targets)

    def steps(self, iterations: int, product=None, curvature: Curvature | None = None, **options):
        chosen = curvature or self.curvature
        found = Directions(
            chosen, self.gradient, product or self.product, iterations=iterations, **options
        )
        return list(iter(found.next, None))

    def vector(self, step) -> NDArray:
        return flatten(step.direction, self.targets).numpy()


@pytest.fixture(scope="module")
def system() -> System:
    return System()


def textbook(A: NDArray, M: NDArray, g: NDArray) -> Iterator[NDArray]:
    """Iterates 1, 2, ... of preconditioned conjugate gradients (Saad, Algorithm 9.1)."""
    x, r = np.zeros_like(g), g.copy()
    z = np.linalg.solve(M, r)
    p, rho = z.copy(), r @ z
    while True:
        w = A @ p
        x, r = x + rho / (p @ w) * p, r - rho / (p @ w) * w
        yield x
        z = np.linalg.solve(M, r)
        rho, before = r @ z, rho
        p = z + rho / before * p


def off(ours: NDArray, theirs: NDArray) -> float:
    """Relative error of a direction, whatever the lengths."""
    ours, theirs = ours / np.linalg.norm(ours), theirs / np.linalg.norm(theirs)
    return float(np.linalg.norm(ours - theirs))


# --- The solver ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", DAMPINGS, ids=["relative", "absolute"])
def test_iterates_are_the_textbooks(system, damping):
    """By kfade's own products; the textbook has the matrix from reverse-mode Jacobians."""
    product = partial(gauss_newton_product, system.model, system.batches, system.targets)
    D, fitted = np.diag(system.ridge(damping)), system.fitted()
    theirs = textbook(system.G + D, fitted + D, system.g)
    steps = system.steps(5, product, damping=damping)
    assert len(steps) == 6
    before = None
    for step, x in zip(steps, theirs, strict=False):
        ours = system.vector(step)
        # Rounding grows by the condition of the system with each iteration; 1e-12 at first.
        assert off(ours, x) < 1e-7
        assert ours @ fitted @ ours == pytest.approx(1.0)
        assert step.square == pytest.approx(1.0)
        assert step.slope == pytest.approx(system.g @ ours)
        assert before is None or off(ours, before) > 1e-3
        before = ours


def test_the_first_is_the_k_fade_step(system):
    known = gauss_newton_step(system.curvature, system.gradient, DAMPINGS[0])

    def refused(x):
        raise AssertionError("no product is needed")

    [alone] = system.steps(0, refused, damping=DAMPINGS[0])
    first, second = system.steps(1, damping=DAMPINGS[0])
    for step in (alone, first):
        assert (step.slope, step.square) == (known.slope, known.square)
        assert all(same_bits(step.direction[n], m) for n, m in known.direction.items())
    assert off(system.vector(first), system.vector(second)) > 0.1


@pytest.mark.parametrize("damping", DAMPINGS, ids=["relative", "absolute"])
def test_enough_iterations_solve_the_exact_system(system, damping):
    """... with each layer's own damping, and stop by themselves."""
    ridge = system.ridge(damping)
    exact = np.linalg.solve(system.G + np.diag(ridge), system.g)
    steps = system.steps(10_000, damping=damping)
    assert len(steps) < 2000
    last = system.vector(steps[-1])
    assert off(last, exact) < 1e-8
    assert off(system.vector(steps[0]), exact) > 0.1
    wrong = ridge[::-1] if damping.relative else 1.5 * ridge  # another layer's; more of it
    assert off(last, np.linalg.solve(system.G + np.diag(wrong), system.g)) > 1e-3


def test_the_quadratic_falls_and_falls_faster_with_the_fit(system):
    """½rᵀ(G + D)r − gᵀr, least along each direction; its least of all is −½gᵀ(G + D)⁻¹g."""
    A = system.G + np.diag(system.ridge(DAMPINGS[0]))
    least = -0.5 * system.g @ np.linalg.solve(A, system.g)

    def value(x: NDArray) -> float:
        return -0.5 * (system.g @ x) ** 2 / (x @ A @ x) / -least

    ours = [value(system.vector(step)) for step in system.steps(7, damping=DAMPINGS[0])]
    assert all(-1 < later < earlier for earlier, later in pairwise(ours))
    plain = textbook(A, np.eye(len(A)), system.g)
    without = [value(next(plain)) for _ in ours]
    assert all(later > 0.9 * earlier for earlier, later in zip(ours, without, strict=True))
    assert without[5] > ours[3]  # what the fit reaches with 4 takes 7
    assert without[6] < ours[3]


def test_an_exact_fit_leaves_nothing_to_refine(system):
    """G = G̃: the K-FADE direction is the solution, and there is no second."""
    damping = Damping(0.5, relative=False)
    identity = Identity().fit(system.model, system.batches, system.targets)
    assert len(system.steps(3, lambda x: dict(x), identity, damping=damping)) == 1
    assert len(system.steps(3, system.product, identity, damping=damping)) == 4


def test_nothing_given_is_written_to(system):
    kept = {name: matrix.clone() for name, matrix in system.gradient.items()}
    steps = Directions(
        system.curvature, system.gradient, system.product, iterations=2, damping=DAMPINGS[0]
    )
    first = steps.next()
    direction = {name: matrix.clone() for name, matrix in first.direction.items()}
    assert list(iter(steps.next, None))
    for name, matrix in kept.items():
        assert same_bits(system.gradient[name], matrix)
        assert same_bits(first.direction[name], direction[name])


# --- Which one is taken -------------------------------------------------------------------------


def record(refined: int, kl: float, loss: float) -> StepRecord:
    return StepRecord(1.0, 0.5, kl, kl, kl, 1.0, loss, 0.5, 0.1, 0.0, 0.0, refined=refined)


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ([(0.010, 2.0), (0.010, 2.2), (0.010, 2.1)], 1),  # equal KL: the highest loss
        ([(0.010, 2.0), (0.009, 2.0), (0.011, 2.0)], 1),  # equal loss: the lowest KL
        ([(0.010, 2.0), (0.011, 2.02)], 0),  # more loss, but for a tenth more KL
        ([(0.010, 2.0), (0.0091, 1.99)], 1),
        ([(0.010, 2.0), (0.010, 2.0)], 0),  # equals: the cheaper
        ([(0.010, 2.0), (0.000, 2.0)], 1),
        ([(0.010, 0.9), (0.010, 0.8)], 0),  # the loss fell
    ],
)
def test_the_best_is_the_greatest_rise_for_its_kl(measured, best):
    records = [record(k, *pair) for k, pair in enumerate(measured)]
    best_so_far = Best(1.0)
    for one in records:
        best_so_far.add(one, {"w": torch.tensor(one.refined)})
    chosen, changes = best_so_far.result
    assert chosen.refined == best == changes["w"]
    assert [r["refined"] for r in chosen.refinements] == list(range(len(records)))
    assert replace(chosen, refinements=[]) == records[best]


def test_of_steps_to_a_kl_one_that_ended_early_is_compared_by_its_loss():
    """By its ratio it would win whenever it is short."""
    for kl, loss, best in ((0.001, 1.9, 0), (0.001, 2.1, 1), (0.0091, 1.99, 1)):
        chosen = {}
        for to_a_kl in (True, False):
            candidates = Best(1.0, to_a_kl=to_a_kl)
            candidates.add(record(0, 0.010, 2.0), {})
            candidates.add(record(1, kl, loss), {})
            chosen[to_a_kl] = candidates.result[0].refined
        assert chosen == {True: best, False: 1}


def test_of_steps_that_ended_at_their_rise_the_ratio_decides():
    """Both rise by 1 nat, which is all they may, one of them for a tenth of the KL."""
    for enough, best in ((1.95, 0), (2.05, 1)):
        candidates = Best(1.0, to_a_kl=True, enough=enough)
        candidates.add(record(0, 0.001, 1.98), {})
        candidates.add(record(1, 0.010, 2.0), {})
        assert candidates.result[0].refined == best


def test_what_is_alone_is_taken_and_not_listed():
    alone = Best(1.0)
    alone.add(record(3, 0.01, 2.0), {})
    chosen, _ = alone.result
    assert chosen.refined == 3
    assert chosen.refinements == []


# --- Runs ---------------------------------------------------------------------------------------


def run(model, **changes) -> Update:
    data = {
        "forget": random_sequences(4, seed=7),
        "retain": random_sequences(12, seed=8),
        "held_out": random_sequences(6, seed=9),
    }
    return kfade.unlearn(model, **flat(**{**data, "kl": 0.01, "batch_tokens": 20, **changes}))


def only_step(update: Update) -> dict:
    [step] = update.provenance["steps"]
    return step


def same_update(one: Update, other: Update) -> bool:
    return all(same_bits(delta, other.deltas[name]) for name, delta in one.deltas.items())


SIZES = [{"kl": 0.01}, {"kl": None, "until": 3.6}, {"kl": 0.02, "max_kl": 0.008}]


@pytest.mark.parametrize("size", SIZES, ids=["kl", "until", "cap"])
def test_a_run_takes_the_best_direction_on_held_out_data(model, size):
    before = Snapshot.of(model)
    plain, refined = (only_step(run(model, refine=n, **size)) for n in (0, 3))
    assert before.differences(model) == []
    tried = refined["refinements"]
    assert [t["refined"] for t in tried] == [0, 1, 2, 3]
    assert (plain["refined"], plain["refinements"]) == (0, [])
    # The first is the run without refinement, to the bit.
    assert tried[0] == {name: plain[name] for name in tried[0]}
    chosen = tried[refined["refined"]]
    assert chosen == {name: refined[name] for name in chosen}
    # Each meets what was asked for, so they can be compared; the taken one beats the first.
    start = plain["forget_loss_before"]
    for one in tried:
        if "until" in size:
            assert one["forget_loss_after"] - start == pytest.approx(3.6 - start, rel=0.03)
        else:
            assert one["retain_kl"] == pytest.approx(
                0.01 if "max_kl" not in size else 0.0076, rel=0.1
            )
            assert one["retain_kl"] <= size.get("max_kl", 1.0)
    merits = [(t["forget_loss_after"] - start) / t["retain_kl"] ** 0.5 for t in tried]
    assert merits.index(max(merits)) == refined["refined"] > 0
    assert max(merits) > 1.02 * merits[0]
    assert refined["probes"][-1]["alpha"] == refined["alpha"]


def test_what_was_measured_is_the_taken_direction_not_the_last_tried(model, monkeypatch):
    """... also where they are not the same."""
    update = run(model, refine=2)
    monkeypatch.setattr(StepRecord, "beats", lambda self, *_, **__: self.refined == 1)
    step = only_step(other := run(model, refine=2))
    assert step["refined"] == 1
    tried = only_step(update)["refinements"][1]
    assert tried == {name: step[name] for name in tried}
    assert step["measured_kl"] == pytest.approx(step["retain_kl"])  # one step: the same figure
    held_out = make_batches(random_sequences(6, seed=9))
    assert measured_kl(model, held_out, other) == pytest.approx(step["retain_kl"])


def failing(monkeypatch, *which: int) -> None:
    """Lets these of the directions tried, counted over a run, forget no more at any length."""
    along, calls = Trial._along, itertools.count()

    def tried(self, step, exact, refined):
        found = along(self, step, exact, refined)
        if next(calls) in which:
            raise NoRiseError("no")
        return found

    monkeypatch.setattr(Trial, "_along", tried)


@pytest.mark.parametrize("which", [0, 1])
def test_a_direction_that_forgets_no_more_is_left_out(model, monkeypatch, which):
    """A run that is resumed after such a step knows no more of it than its end."""
    options = {"refine": 1, "steps": 2, "refit": False}
    plain = run(model, **options)
    failing(monkeypatch, which)
    whole = run(model, on_step=(kept := []).append, **options)
    first, second = whole.provenance["steps"]
    assert (first["refined"], first["refinements"]) == (1 - which, [])
    assert first["measured_kl"] == pytest.approx(first["retain_kl"])  # from the start
    monkeypatch.undo()
    resumed = run(model, start=kept[0], **options)
    assert same_update(whole, resumed)
    assert resumed.provenance == whole.provenance
    assert second["measured_kl"] < 0.5 * second["retain_kl"]  # since the first step
    assert len(plain.provenance["steps"][0]["refinements"]) == 2
    failing(monkeypatch, 0, 1)
    with pytest.raises(NoRiseError, match="no"):
        run(model, **options)


def test_a_direction_that_forgets_no_more_is_freed(model, monkeypatch):
    """An error with its traceback would keep it: here what was made for the first of two."""
    made, alive = [], []
    measured = Trial._measured

    def noted(self, step):
        alive.append([one() is not None for one in made])
        step, exact = measured(self, step)
        made.append(weakref.ref(step))
        return step, exact

    monkeypatch.setattr(Trial, "_measured", noted)
    failing(monkeypatch, 0)
    gc.disable()
    try:
        run(model, refine=2)
    finally:
        gc.enable()
    assert alive == [[], [False], [False, False]]


@pytest.mark.parametrize("hoard", [False, True])
def test_of_the_directions_tried_only_the_best_is_there_at_the_next_product(
    model, monkeypatch, hoard
):
    """The control keeps them all."""
    tried, alive, kept = [], [], []
    along = Trial._along

    def noted(self, step, exact, refined):
        record, changes = along(self, step, exact, refined)
        tried.append(weakref.ref(changes))
        if hoard:
            kept.append(changes)
        return record, changes

    def product(*arguments, **options):
        alive.append(sum(one() is not None for one in tried))
        return gauss_newton_product(*arguments, **options)

    monkeypatch.setattr(Trial, "_along", noted)
    monkeypatch.setattr(UNLEARN, "gauss_newton_product", product)
    run(model, refine=3)
    assert len(tried) == len(alive) == 4
    assert alive == ([1, 1, 2, 3] if hoard else [1, 1, 1, 1])


def test_a_norm_takes_the_last_direction(model, targets):
    """α compares nothing, so nothing is chosen; ½α² stays what the fit predicts."""
    retain = make_batches(random_sequences(12, seed=8), budget=20)
    curvature = EKFAC().fit(model, retain, targets)
    update = run(model, kl=None, alpha=0.1, refine=2, curvature=curvature)
    step = only_step(update)
    assert (step["alpha"], step["refined"], step["refinements"]) == (0.1, 2, [])
    assert step["predicted_kl"] == pytest.approx(0.005)
    assert len(step["probes"]) == 1
    forget = make_batches(random_sequences(4, seed=7), budget=20)
    gradient = forget_gradient(model, forget, targets, margin)
    product = partial(gauss_newton_product, model, retain, targets)
    last = Directions(curvature, gradient, product, iterations=2, damping=Damping()).last()
    for name, delta in update.deltas.items():
        assert relative_error(delta, 0.1 * last.direction[name]) < 1e-9
    with_norm = only_step(
        run(model, kl=None, alpha=0.1, refine=2, curvature=curvature, exact_norm=True)
    )
    assert with_norm["exact_kl"] == pytest.approx(0.005)
    assert with_norm["predicted_kl"] != pytest.approx(0.005, rel=0.1)


def test_products_run_on_the_sequences_that_are_drawn(model, monkeypatch):
    seen: list[list[tuple[int, ...]]] = []

    def noted(model, batches, targets, delta, **options):
        rows = [tuple(row[live].tolist()) for b in batches
                for row, live in zip(b.input_BT, b.live_BT, strict=True)]  # fmt: skip
        seen.append(sorted(rows))
        return gauss_newton_product(model, batches, targets, delta, **options)

    monkeypatch.setattr(UNLEARN, "gauss_newton_product", noted)
    run(model, refine=1, refine_sequences=5, steps=2)
    assert len(seen) == 4  # two products a step
    assert [len(rows) for rows in seen] == [5] * 4
    assert seen[0] == seen[1] != seen[2] == seen[3]  # of 12, so the second five are others
    assert not set(seen[0]) & set(seen[2])
    seen.clear()
    run(model, refine=1, refine_sequences=5, steps=2, seed=1)
    assert seen[0] != seen[2]
    seen.clear()
    run(model, refine=1, refine_sequences=100)
    assert [len(rows) for rows in seen] == [12] * 2
    seen.clear()
    run(model, refine=0)
    assert seen == []


def test_products_are_at_the_weights_of_the_step(model, targets, monkeypatch):
    """The second step's G is that of the once edited model, whether or not it is fitted anew."""
    weights = []

    def noted(model, batches, targets, delta, **options):
        weights.append(targets[0].weight.detach().clone())
        return gauss_newton_product(model, batches, targets, delta, **options)

    monkeypatch.setattr(UNLEARN, "gauss_newton_product", noted)
    after = []
    run(model, refine=1, steps=2, refit=False, on_step=after.append)
    base, first = targets[0].weight.detach(), after[0].deltas[targets[0].name]
    for seen, expected in zip(weights, [base, base, base + first, base + first], strict=True):
        assert same_bits(seen, expected)


@pytest.mark.parametrize("size", [{"kl": 0.01}, {"kl": None, "alpha": 0.1}], ids=["kl", "alpha"])
def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path, size):
    options = {"steps": 2, "forget_batch": 2, "refine": 2, "refine_sequences": 5, **size}
    saved = []

    def save(update):
        saved.append(tmp_path / f"{len(saved)}.safetensors")
        update.save(saved[-1])

    whole = run(model, on_step=save, **options)
    resumed = run(model, start=Update.load(saved[0]), **options)
    assert same_update(whole, resumed)
    assert resumed.provenance == whole.provenance
    assert not same_update(whole, run(model, **{**options, "refine": 0}))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"refine": -1}, "--refine -1: give 0"), ({"refine_sequences": 0}, "sequences 0: give 1")],
)
def test_impossible_refinements_are_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        run(model, **options)


# --- The command line ---------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path) -> list[str]:
    folder = tmp_path / "model"
    zoo.save(folder)
    arguments = ["unlearn", str(folder), "--sequence-length", "8"]
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments += [f"--{name}", str(path)]
    return arguments


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "update.safetensors")


def test_a_refined_run_is_told_and_replayed(command, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--kl", "0.01", "--refine", "2", "--refine-sequences", "6", "--quality", "fast"]
    assert main([*command, *more, "--out", str(out), "--json"]) == 0
    output = capsys.readouterr()
    metrics = json.loads(output.out)
    [step] = metrics["steps"]
    assert [r["refined"] for r in step["refinements"]] == [0, 1, 2]
    assert metrics["seconds"]["refine"] > 0
    assert ("refined" in output.err) == (step["refined"] > 0)
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["refinements"] for row in logged if "refinements" in row] == [step["refinements"]]
    again, plain = tmp_path / "again", tmp_path / "plain"
    config = ["--config", str(out / "config.yaml")]
    assert main([*command, *config, "--out", str(again)]) == 0
    assert all(torch.equal(d, deltas(again)[name]) for name, d in deltas(out).items())
    assert main([*command, *config, "--refine", "0", "--out", str(plain), "--json"]) == 0
    [step] = json.loads(capsys.readouterr().out)["steps"]
    assert step["refinements"] == []
    assert "refine" not in json.loads((plain / "metrics.json").read_text())["seconds"]


def test_a_killed_refined_run_resumes_to_the_same_update(command, tmp_path, monkeypatch):
    more = ["--kl", "0.01", "--steps", "2", "--refine", "1", "--refine-sequences", "4"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*command, *more, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("kfade.runs.unlearning.step_line", lambda *line: (_ for _ in ()).throw(
            KeyboardInterrupt))  # fmt: skip
        assert main([*command, *more, "--out", str(out)]) == 130
    assert main([*command, *more, "--out", str(out), "--refine", "2", "--resume"]) == 2
    assert main([*command, *more, "--out", str(out), "--resume"]) == 0
    assert all(torch.equal(d, deltas(out)[name]) for name, d in deltas(whole).items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--refine", "-1"), "--refine -1: give 0 or more"),
        (("--refine-sequences", "0"), "--refine-sequences 0: give 1 or more"),
    ],
)
def test_bad_options(command, tmp_path, capsys, more, message):
    assert main([*command, *more, "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kfade: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.glob("out*"))
