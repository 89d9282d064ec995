"""Sweeps: the grid, the front and the rule by hand; each point is the step that unlearn takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import zoo
from helpers import Snapshot, command_line, flat, random_sequences
from safetensors.torch import load_file
from zoo.rows import FORGET, RETAIN

from kfade import Damping
from kfade.cli import main
from kfade.curvature.estimators import EKFAC
from kfade.curvature.product import gauss_newton_product
from kfade.data.batches import draw_without_replacement, make_batches
from kfade.errors import InputError
from kfade.evaluate.log import read_log
from kfade.method.gauge import Gauge
from kfade.method.gradient import forget_gradient
from kfade.method.grid import Outcome, Point, grid, pareto, pick
from kfade.method.objectives import cross_entropy, margin
from kfade.method.size import StepSize
from kfade.method.sweep import Shared, cut, sweep, targets_within
from kfade.method.unlearn import unlearn
from kfade.method.update import Update
from kfade.models.head import hidden_states
from kfade.runs.config import read_config

OBJECTIVES = {"margin": margin, "ce": cross_entropy}


def outcome(kl: float | None, loss: float | None, name: str = "1") -> Outcome:
    """A point of that KL and loss, or one that failed."""
    point = Point("margin", name, Damping(0.1), StepSize(alpha=1.0))
    if kl is None:
        return Outcome(point, 1.0, failure="outputs not finite")
    return Outcome(point, 1.0, 1.0, 0.5, kl, loss, 0.1)


def test_front_by_hand():
    """KL 1..5 with losses 2, 5, 4, 5, 7: what costs more and forgets no more is beaten."""
    points = [outcome(k, v) for k, v in [(3, 4.0), (1, 2.0), (5, 7.0), (2, 5.0), (4, 5.0)]]
    assert [(o.retain_kl, o.forget_loss) for o in pareto(points)] == [(1, 2.0), (2, 5.0), (5, 7.0)]


def test_front_of_equals_and_failures():
    equal = [outcome(1, 2.0, "0"), outcome(1, 2.0, "1"), outcome(1, 1.9), outcome(None, None)]
    assert pareto(equal) == equal[:2]  # same KL with a lower loss is beaten; equals are not
    assert pareto([outcome(None, None)]) == []


def test_rule_by_hand():
    points = [outcome(0.01, 2.0), outcome(0.02, 3.0), outcome(0.021, 9.0), outcome(None, None)]
    assert pick(points, 0.02) is points[1]  # the budget itself is within
    assert pick(points, 0.0199) is points[0]
    assert pick(points, 0.001) is None
    assert pick(points, 1.0) is points[2]
    cheap = [outcome(0.02, 3.0, "0"), outcome(0.01, 3.0, "1")]
    assert pick(cheap, 1.0) is cheap[1]  # of equal ones, the cheaper


def dampings(*values: float) -> list[Damping]:
    """Multiples of the mean eigenvalue."""
    return [Damping(value) for value in values]


def test_grid():
    sizes = [StepSize(kl=0.01), StepSize(kl=0.03)]
    points = grid(["margin", "ce"], ["all", "0"], dampings(0.1, 1.0), sizes)
    assert len(points) == len({p.id for p in points}) == 16
    assert points[0].id == "margin, layers all, relative_damping 0.1, kl 0.01"
    # One gradient at a time, then one direction at a time.
    assert [p.objective for p in points] == ["margin"] * 8 + ["ce"] * 8
    assert [p.direction for p in points[::2]] == [
        ("all", Damping(0.1)), ("all", Damping(1.0)), ("0", Damping(0.1)), ("0", Damping(1.0))
    ] * 2  # fmt: skip


@pytest.mark.parametrize(
    ("objectives", "values", "message"),
    [
        ([], [0.1], "no objective"),
        (["margin"], [], "no damping"),
        (["margin"], [0.1, 0.1], "damping twice"),
        (["margin"], [-1.0], "--relative-damping -1.0: give a finite"),
        (["margin"], [math.nan], "--relative-damping nan: give a finite"),
    ],
)
def test_grids_that_are_none(objectives, values, message):
    with pytest.raises(InputError, match=message):
        grid(objectives, ["all"], dampings(*values), [StepSize(kl=0.01)])


@pytest.fixture
def sets():
    return {
        "forget": random_sequences(6, seed=1),
        "held_out": random_sequences(4, seed=2),
        "retain": random_sequences(8, seed=0),
    }


@pytest.fixture
def curvature(model, targets, sets):
    return EKFAC().fit(model, make_batches(sets["retain"]), targets, seed=0)


def run(model, points, sets, targets, curvature, *, done=None, on_point=None, **more):
    shared = Shared(curvature, targets, OBJECTIVES, **more)
    return sweep(model, points, shared, **sets, done=done, on_point=on_point)


def slow_answers(model, sequences) -> tuple[float, float]:
    """(loss per token, mean probability per token of an answer), one sequence at a time."""
    losses, tokens, probabilities = 0.0, 0, []
    for sequence in sequences:
        with torch.no_grad():
            hidden = hidden_states(model, torch.tensor([sequence.tokens[:-1]]))
            log_p = model.lm_head(hidden)[0].log_softmax(-1)
        own = [-log_p[t - 1, sequence.tokens[t]] for t, s in enumerate(sequence.scored) if s]
        losses, tokens = losses + sum(own).item(), tokens + len(own)
        probabilities.append(math.exp(-sum(own).item() / len(own)))
    return losses / tokens, sum(probabilities) / len(probabilities)


def test_a_point_to_a_kl_raises_the_forget_loss_no_more_than_it_may(
    model, targets, sets, curvature
):
    sizes = [StepSize(kl=0.5), StepSize(kl=0.5, max_rise=0.2)]
    points = grid(["margin"], ["all"], dampings(0.03), sizes)
    free, capped = run(model, points, sets, targets, curvature)
    start, _ = slow_answers(model, sets["forget"])
    assert capped.forget_loss - start == pytest.approx(0.2, rel=0.03)
    assert capped.retain_kl < 0.1 < free.retain_kl
    assert free.forget_loss - start > 0.4


def test_points_are_the_steps_of_unlearn(model, targets, sets, curvature, monkeypatch):
    measured: list[Update] = []
    real = Gauge.measure

    def noted(self, update, objective, alpha=0.0):
        measured.append(update)
        return real(self, update, objective, alpha)

    monkeypatch.setattr(Gauge, "measure", noted)
    sizes = [StepSize(alpha=0.01), StepSize(alpha=0.1)]
    points = grid(["margin", "ce"], ["all", "1"], dampings(0.03, 1.0), sizes)
    before = Snapshot.of(model)
    outcomes = run(model, points, sets, targets, curvature)
    assert before.differences(model) == []
    assert [o.point for o in outcomes] == points
    edits = measured[:]
    assert len(edits) == len(points)  # an α costs one measurement, and the base none
    for found, edit in list(zip(outcomes, edits, strict=True))[::3]:
        point = found.point
        own = targets_within(targets, point.layers)
        assert len(own) == (3 if point.layers == "1" else 6)
        update = unlearn(
            model,
            **sets,
            **flat(
                targets=own,
                curvature=cut(curvature, own),
                objective=OBJECTIVES[point.objective],
                damping=point.damping,
                alpha=point.size.alpha,
            ),
        )
        assert update.deltas.keys() == edit.deltas.keys()
        for name, delta in update.deltas.items():
            assert torch.allclose(edit.deltas[name], delta, rtol=1e-12, atol=0)
        step = update.provenance["steps"][0]
        assert found.alpha == step["alpha"] == point.size.alpha
        assert found.retain_kl == pytest.approx(step["retain_kl"], rel=1e-9)
        assert found.forget_loss == pytest.approx(step["forget_loss_after"], rel=1e-9)
        assert found.predicted_kl == pytest.approx(step["predicted_kl"], rel=1e-9)
        with update.applied_to(model):
            loss, probability = slow_answers(model, sets["forget"])
        assert found.forget_loss == pytest.approx(loss, rel=1e-9)
        assert found.forget_probability == pytest.approx(probability, rel=1e-9)
    # The probability is not the exponential of the mean: longer answers count more in the latter.
    last = outcomes[-1]
    assert abs(last.forget_probability - math.exp(-last.forget_loss)) > 1e-3


def test_refined_points_are_the_steps_of_unlearn(model, targets, sets, curvature, monkeypatch):
    """... and go on from one another: the products of the most refined serve all."""
    import kfade.method.sweep

    products = []

    def counted(*arguments, **options):
        products.append(arguments)
        return gauss_newton_product(*arguments, **options)

    monkeypatch.setattr(kfade.method.sweep, "gauss_newton_product", counted)
    sizes = [StepSize(alpha=0.01), StepSize(alpha=0.1)]
    points = grid(["margin"], ["all", "1"], dampings(0.1), sizes, refine=[3, 0, 1])
    assert [p.refine for p in points] == 2 * [0, 0, 1, 1, 3, 3]
    assert points[2].id == "margin, layers all, relative_damping 0.1, refine 1, alpha 0.01"
    told = []
    outcomes = run(
        model, points, sets, targets, curvature, on_point=told.append, refine_sequences=3, seed=5
    )
    assert told == outcomes
    assert len(products) == 2 * 4
    assert all(sum(len(b.input_BT) for b in batches) == 3 for _, batches, _, _ in products)
    for found in outcomes[1::2]:
        own = targets_within(targets, found.point.layers)
        update = unlearn(
            model,
            **sets,
            **flat(
                targets=own,
                curvature=cut(curvature, own),
                damping=Damping(0.1),
                seed=5,
                alpha=found.point.size.alpha,
                refine=found.point.refine,
                refine_sequences=3,
            ),
        )
        step = update.provenance["steps"][0]
        assert step["refined"] == found.point.refine
        assert found.retain_kl == pytest.approx(step["retain_kl"], rel=1e-9)
        assert found.forget_loss == pytest.approx(step["forget_loss_after"], rel=1e-9)
        assert found.predicted_kl == pytest.approx(step["predicted_kl"], rel=1e-9)
    kls = [o.retain_kl for o in outcomes[:6:2]]
    assert len({round(kl, 12) for kl in kls}) == 3
    # What is known is not measured again, but refined again where more is wanted of it.
    products.clear()
    again = run(
        model, points, sets, targets, curvature, refine_sequences=3, seed=5,
        done={o.point: o for o in outcomes if o.point != points[3]},
    )  # fmt: skip
    assert len(products) == 2
    assert again[3].retain_kl == outcomes[3].retain_kl


def test_refined_points_want_retain_data_and_a_count(model, targets, sets, curvature):
    with pytest.raises(InputError, match="--refine -1: give 0 or more"):
        grid(["margin"], ["all"], dampings(0.1), [StepSize(kl=0.01)], refine=[0, -1])
    points = grid(["margin"], ["all"], dampings(0.1), [StepSize(kl=0.01)], refine=[1])
    with pytest.raises(InputError, match="the retain set is empty"):
        run(model, points, {**sets, "retain": []}, targets, curvature)


def test_measured_kls_are_met(model, targets, sets, curvature):
    sizes = [StepSize(kl=0.001), StepSize(kl=0.01), StepSize(kl=0.1)]
    outcomes = run(model, grid(["margin"], ["all"], dampings(0.1), sizes), sets, targets, curvature)
    for found, size in zip(outcomes, sizes, strict=True):
        assert found.retain_kl == pytest.approx(size.kl, rel=0.1)
    assert outcomes[0].forget_loss < outcomes[1].forget_loss < outcomes[2].forget_loss


def test_gradients_and_directions_are_shared(model, targets, sets, curvature, monkeypatch):
    import kfade.method.refine

    solves, gradients = [], []
    real = kfade.method.refine.gauss_newton_step

    def counted_step(curvature, gradient, damping, storage, **options):
        solves.append(damping)
        return real(curvature, gradient, damping, storage, **options)

    def counted_gradient(model, batches, targets, objective, **options):
        gradients.append(objective)
        return forget_gradient(model, batches, targets, objective, **options)

    monkeypatch.setattr(kfade.method.refine, "gauss_newton_step", counted_step)
    sizes = [StepSize(alpha=a) for a in (0.01, 0.02, 0.03)]
    points = grid(["margin", "ce"], ["all"], dampings(0.1, 1.0), sizes)
    outcomes = run(model, points, sets, targets, curvature, gradient=counted_gradient)
    assert len(outcomes) == 12
    assert solves == dampings(0.1, 1.0, 0.1, 1.0)
    assert gradients == [margin, cross_entropy]
    # What is known already is neither measured nor told again.
    done, told = {o.point: o for o in outcomes[:9]}, []
    again = run(
        model, points, sets, targets, curvature, done=done, on_point=told.append,
        gradient=counted_gradient, seconds=1200.0,
    )  # fmt: skip
    assert gradients[2:] == [cross_entropy]
    assert solves[4:] == dampings(1.0)
    assert [o.point for o in told] == points[9:]
    assert again[:9] == outcomes[:9]
    for first, second in zip(outcomes[9:], again[9:], strict=True):
        assert second.retain_kl == first.retain_kl
        assert second.forget_loss == first.forget_loss
        assert 100 < second.seconds < 110  # an equal share of 1200


def test_a_forget_batch_is_the_one_that_unlearn_draws(model, targets, sets, curvature):
    seen = []

    def gradient(model, batches, targets, objective, **options):
        seen.extend(sorted(tuple(b.input_BT[0].tolist()) for b in batches))
        return forget_gradient(model, batches, targets, objective, **options)

    points = grid(["margin"], ["all"], dampings(0.1), [StepSize(alpha=0.01)])
    run(
        model, points, sets, targets, curvature, forget_batch=2, seed=3, gradient=gradient,
        batch_tokens=1,
    )  # fmt: skip
    drawn = draw_without_replacement(6, 2, 0, 3)
    wanted = make_batches([sets["forget"][i] for i in drawn], budget=1)
    assert seen == sorted(tuple(b.input_BT[0].tolist()) for b in wanted)


def test_points_that_cannot_be_measured_do_not_stop_the_sweep(model, targets, sets, curvature):
    sizes = [StepSize(kl=0.01), StepSize(kl=1e6)]  # no KL is that large
    points = grid(["margin"], ["all"], dampings(0.1), sizes)
    good, bad = run(model, points, sets, targets, curvature)
    assert good.failure is None
    assert "cannot be reached" in bad.failure
    assert set(bad.values) == {"objective", "settings", "seconds", "failure"}
    assert pareto([good, bad]) == [good]
    with pytest.raises(InputError, match=r"no point of the sweep could be measured.*reached"):
        run(model, points[1:], sets, targets, curvature)


def test_blocks_that_the_curvature_lacks(targets):
    assert [t.block for t in targets_within(targets, "1")] == [1, 1, 1]
    with pytest.raises(InputError, match="--layers 1-2: the curvature does not cover block 2"):
        targets_within(targets, "1-2")


# The command line


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def fitted(tmp_path) -> dict[str, str]:
    """A model, its data and its curvature in files."""
    model = str(tmp_path / "model")
    zoo.save(model)
    forget = write_lines(tmp_path / "forget.jsonl", FORGET)
    retain = write_lines(tmp_path / "retain.jsonl", RETAIN)
    fit = str(tmp_path / "fit")
    assert main(["fit", model, "--retain", retain, "--out", fit, "--sequence-length", "8"]) == 0
    return {"model": model, "forget": forget, "retain": retain, "fit": fit}


def command(fitted: dict[str, str], out: Path, *more: str) -> list[str]:
    given = [
        *("sweep", fitted["model"], "--curvature", fitted["fit"], "--forget", fitted["forget"]),
        *("--out", str(out)),
    ]
    return command_line(given, more)


GRID = ("--alpha", "0.01,0.05", "--relative-damping", "0.1,1", "--layers", "0;all")


def test_a_sweep_writes_points_and_the_picked_run(fitted, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert main(command(fitted, out, *GRID, "--max-kl", "10", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    names = {path.name for path in out.iterdir()}
    files = ("update.safetensors", "manifest.json", "metrics.json", "config.yaml", "points.jsonl")
    assert names == {*files}
    log = read_log(out / "points.jsonl")
    assert log.header["benchmark"] == "sweep"
    assert len(log.items) == 8
    item = log.items["margin, layers 0, relative_damping 0.1, alpha 0.05"]
    assert (item["method"], item["estimator"], item["objective"]) == ("K-FADE", "kfac", "margin")
    assert item["settings"] == {"layers": "0", "relative_damping": 0.1, "alpha": 0.05}
    told = {"forget_loss", "retain_kl", "forget_probability", "seconds", "alpha", "predicted_kl"}
    assert told < set(item)
    best = max(log.items, key=lambda name: log.items[name]["forget_loss"])
    assert log.aggregate["picked"] == printed["sweep"]["picked"] == best
    assert best in log.aggregate["pareto"]
    assert log.aggregate["max_kl"] == 10

    # The picked update is what kfade unlearn makes with the configuration that lies beside it.
    again = tmp_path / "again"
    replay = ["unlearn", fitted["model"], "--config", str(out / "config.yaml")]
    assert main([*replay, "--curvature", fitted["fit"], "--out", str(again)]) == 0
    first, second = (load_file(d / "update.safetensors") for d in (out, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    metrics = [json.loads((d / "metrics.json").read_text()) for d in (out, again)]
    for key in ("retain_kl", "forget_loss", "tokens", "steps"):
        assert metrics[0][key] == metrics[1][key]
    assert metrics[0]["retain_kl"] == pytest.approx(log.items[best]["retain_kl"], rel=1e-6)
    after = metrics[0]["forget_loss"]["after"]
    assert after == pytest.approx(log.items[best]["forget_loss"], rel=1e-6)
    manifests = [json.loads((d / "manifest.json").read_text()) for d in (out, again)]
    assert set(manifests[1]) <= set(manifests[0])
    assert manifests[0]["kind"] == "unlearn"
    assert main(["apply", fitted["model"], str(out), "--out", str(tmp_path / "edited")]) == 0
    assert "fine-tuned descendant" not in capsys.readouterr().err


def test_a_refined_point_is_replayed_by_unlearn(fitted, tmp_path, capsys):
    out, again = tmp_path / "sweep", tmp_path / "again"
    refine = ("--alpha", "0.05", "--refine", "2", "--refine-sequences", "4", "--max-kl", "10")
    assert main(command(fitted, out, *refine, "--recompute")) == 0
    replay = ["unlearn", fitted["model"], "--config", str(out / "config.yaml"), "--no-recompute"]
    assert read_config(out / "config.yaml").fit.recompute
    assert main([*replay, "--curvature", fitted["fit"], "--out", str(again)]) == 0
    first, second = (load_file(d / "update.safetensors") for d in (out, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((out / "metrics.json").read_text())["steps"][0]["refined"] == 2
    for value, message in (("1,x", "give whole numbers"), ("0,0", "a refinement twice")):
        assert main(command(fitted, tmp_path / "no", "--refine", value)) == 2
        assert message in capsys.readouterr().err


def test_a_sweep_out_of_budget_writes_no_update(fitted, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert main(command(fitted, out, "--alpha", "0.05", "--max-kl", "1e-12")) == 0
    assert "no point is within the KL budget" in capsys.readouterr().err
    assert not (out / "update.safetensors").exists()
    assert json.loads((out / "manifest.json").read_text())["kind"] == "sweep"
    assert read_log(out / "points.jsonl").aggregate["picked"] is None


@pytest.mark.parametrize(("trial", "gradients"), [(3, 1), (6, 2)])
def test_an_interrupted_sweep_goes_on_to_the_same_end(
    fitted, tmp_path, monkeypatch, capsys, trial, gradients
):
    import kfade.runs.sweeping as sweep_run

    grid = ("--kl", "0.001,0.01,0.1", "--objective", "margin,ce")
    assert main(command(fitted, tmp_path / "whole", *grid)) == 0
    whole = read_log(tmp_path / "whole" / "points.jsonl")
    before = json.loads(json.dumps(whole.items))

    real, calls = Gauge.measure, []

    def tripped(self, update, objective, alpha=0.0):
        calls.append(alpha)
        if len(calls) == trial:
            raise KeyboardInterrupt
        return real(self, update, objective, alpha)

    out = tmp_path / "cut"
    monkeypatch.setattr(Gauge, "measure", tripped)
    assert main(command(fitted, out, *grid)) == 130
    assert not out.exists()
    state = tmp_path / "cut.part" / "state"
    kept = read_log(state / "points.jsonl", partial=True).items
    assert 0 < len(kept) < 6
    assert len(list(state.glob("gradient-*"))) == gradients
    monkeypatch.setattr(Gauge, "measure", real)
    # Gradients that are there are not computed again.
    computed = []

    def counted(*arguments, **options):
        computed.append(arguments[-1])
        return forget_gradient(*arguments, **options)

    monkeypatch.setattr(sweep_run, "forget_gradient", counted)
    assert main(command(fitted, out, *grid)) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert main(command(fitted, out, *grid, "--resume")) == 0
    assert len(computed) == 2 - gradients
    resumed = read_log(out / "points.jsonl")
    for items in (before, resumed.items):
        for values in items.values():
            del values["seconds"]
    assert list(resumed.items) == list(before)
    assert resumed.items == before
    assert resumed.aggregate == whole.aggregate
    first, second = (load_file(d / "update.safetensors") for d in (tmp_path / "whole", out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_curvature_of_another_model_is_refused(fitted, tmp_path, capsys):
    other = str(tmp_path / "other")
    zoo.save(other, zoo.tiny("llama", dtype=torch.float32, seed=1))
    assert main(command({**fitted, "model": other}, tmp_path / "out", *GRID)) == 2
    assert "--curvature was fitted on another model" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_other_retain_texts_are_said(fitted, tmp_path, capsys):
    other = write_lines(tmp_path / "other.jsonl", RETAIN[2:])
    more = ("--alpha", "0.01")
    assert main(command(fitted, tmp_path / "a", *more)) == 0
    assert "was not fitted on the retain texts" not in capsys.readouterr().err.replace("\n", " ")
    assert main(command(fitted, tmp_path / "b", *more, "--retain", other)) == 0
    assert "was not fitted on the retain texts" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--alpha", "1,x"), "--alpha 1,x: give numbers separated by commas"),
        (("--alpha", "0.1", "--kl", "0.1"), "give --alpha or --kl, not both"),
        (("--damping", "1", "--relative-damping", "1"), "not both"),
        (("--kl", "-1"), "--kl -1.0: give a positive"),
        (("--kl", "0.1,0.1"), "step size twice"),
        (("--objective", "loss"), "--objective loss: give margin"),
        (("--layers", "0-7"), "--layers 0-7: the curvature does not cover block 2"),
        (("--max-kl", "0"), "--max-kl 0.0: give a positive number"),
        (("--forget", "missing.jsonl"), "missing.jsonl: no such file"),
        (("--curvature", "missing"), "no such configuration file"),
    ],
)
def test_bad_options(fitted, tmp_path, capsys, more, message):
    assert main(command(fitted, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.glob("out*"))


def test_the_update_of_a_sweep_can_be_loaded(fitted, tmp_path):
    assert main(command(fitted, tmp_path / "out", "--kl", "0.01")) == 0
    update = Update.load(tmp_path / "out")
    assert update.provenance["model"] == fitted["model"]
    assert update.provenance["steps"][0]["retain_kl"] == pytest.approx(0.01, rel=0.1)
