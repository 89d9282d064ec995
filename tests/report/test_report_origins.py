"""Results that were not made with the same model and data: what the report says and draws."""

import json
from pathlib import Path

import pytest
import report_data as data

from kfade.report.before import headline_columns
from kfade.report.data import MeasuredModel, read_json, read_results
from kfade.report.figures import all_charts, kl_forgetting, kl_seconds
from kfade.report.origins import compare, compare_results, origin_of
from kfade.report.tables import cards, run_tables
from kfade.report.values import Value, headline


def write_run(folder: Path, model: str = "zoo/tiny-a", **changes) -> None:
    """A run whose manifest has digests; ``changes`` are entries of the manifest or of its data."""
    data.write_run(folder, model=model)
    manifest = read_json(folder / "manifest.json")
    own = {"forget": "in/forget.jsonl", "retain": "in/retain.jsonl", "pack": True}
    manifest["config"]["data"] = {**own, "sequence_length": 128, **changes.pop("data", {})}
    digests = {"model_sha256": "a" * 64, "forget_sha256": "b" * 64, "held_out_sha256": "c" * 64}
    data.write_json(folder / "manifest.json", {**manifest, **digests, **changes})


def note_of(root: Path) -> tuple[str, ...]:
    return compare_results(read_results([root]).runs).note


def test_the_same_model_and_data_need_no_note(tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", model="elsewhere/copy-of-a")  # of the same weights
    assert note_of(tmp_path) == ()
    charts, _ = all_charts(read_results([tmp_path]))
    assert [chart.note for chart in charts] == [()] * len(charts)
    assert len(kl_seconds(read_results([tmp_path]).runs, []).series) == 1


def test_a_copy_in_another_dtype_is_the_same_model(tmp_path):
    write_run(tmp_path / "one", model_bfloat16_sha256="d" * 64)
    write_run(tmp_path / "two", model_sha256="d" * 64, model_bfloat16_sha256="d" * 64)
    assert note_of(tmp_path) == ()


def test_what_is_not_shared_is_said_with_the_rows(tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two")
    write_run(
        tmp_path / "three", model="zoo/tiny-b", model_sha256="e" * 64, forget_sha256="f" * 64,
        data={"forget": "in/other.jsonl"},
    )  # fmt: skip
    assert note_of(tmp_path) == (
        "Not all of these results have the same model and forget set. Compare only those that are "
        "listed on one line:",
        "model tiny-a, forget set forget.jsonl: one, two",
        "model tiny-b, forget set other.jsonl: three",
    )


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        (
            {"forget_sha256": "f" * 64, "data": {"pack": False}},
            ["forget set forget.jsonl, packed to 128", "forget set forget.jsonl, not packed"],
        ),
        (
            {"held_out_sha256": "f" * 64, "seed": 1},
            [f"held-out set retain.jsonl, packed to 128, seed {seed}" for seed in (0, 1)],
        ),
        (
            {"forget_sha256": "f" * 64},
            [f"forget set forget.jsonl, packed to 128, {8 * x}" for x in "bf"],
        ),
        ({"model_sha256": "f" * 64}, [f"model tiny-a, {8 * x}" for x in "af"]),
    ],
)
def test_what_has_one_name_is_told_apart(tmp_path, changes, labels):
    write_run(tmp_path / "a-run")
    write_run(tmp_path / "b-run", **changes)
    lines = note_of(tmp_path)[1:]
    assert lines == (f"{labels[0]}: a-run", f"{labels[1]}: b-run")


def test_a_digest_that_is_not_recorded_is_no_difference():
    with_digest = {"model": "m", "forget_sha256": "b"}
    origins = [origin_of(run_of(about)) for about in (with_digest, {"model": "m"})]
    assert compare({"one": origins[0], "two": origins[1]}).note == ()
    third = origin_of(run_of({"model": "m", "forget_sha256": "f"}))
    note = compare({"one": origins[0], "two": origins[1], "three": third}).note
    assert note[2] == "forget set not recorded: two"


def run_of(manifest: dict) -> MeasuredModel:
    return MeasuredModel("run", "run", manifest=manifest)


def test_points_of_two_models_are_two_series(tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", model="zoo/tiny-b", model_sha256="e" * 64)
    runs = read_results([tmp_path]).runs
    chart = kl_forgetting(runs, [])
    assert [series.name for series in chart.series] == [
        "K-FADE, ekfac, margin, model tiny-a", "K-FADE, ekfac, margin, model tiny-b",
    ]  # fmt: skip
    assert {series.form for series in chart.series} == {"marks"}  # no line joins them
    assert chart.note[1:] == ("model tiny-a: one", "model tiny-b: two")
    charts, _ = all_charts(read_results([tmp_path]))
    assert [c.note for c in charts] == [chart.note] * len(charts)
    assert [t["note"] for t in run_tables(read_results([tmp_path]))] == [chart.note] * 2


def test_a_sweep_is_compared_by_its_header(tmp_path):
    write_run(tmp_path / "one")
    header = {"benchmark": "sweep", "model": "zoo/tiny-a", "forget_sha256": "f" * 64}
    points = {"p": {"method": "K-FADE", "retain_kl": 0.1, "forget_loss": 3.0}}
    data.write_log(tmp_path / "sweep", "points.jsonl", header, points, {})
    results = read_results([tmp_path])
    assert kl_forgetting(results.runs, results.sweeps).note[1:] == (
        "forget set forget.jsonl: one", "forget set ffffffff: sweep",
    )  # fmt: skip


def test_completions_are_compared_by_their_digest(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name)
        data.write_kl(tmp_path / name / "eval-kl", tmp_path / name, count=3)
    log = tmp_path / "two" / "eval-kl" / "items.jsonl"
    for folder, digest in (("one", "1" * 64), ("two", "2" * 64)):
        log = tmp_path / folder / "eval-kl" / "items.jsonl"
        head, rest = log.read_text().split("\n", 1)
        log.write_text(json.dumps({**json.loads(head), "completions_sha256": digest}) + "\n" + rest)
    chart = next(c for c in all_charts(read_results([tmp_path]))[0] if c.key == "kl-quantiles")
    assert chart.note[1:] == (
        "completions alpaca.jsonl, 11111111: one", "completions alpaca.jsonl, 22222222: two",
    )  # fmt: skip


def test_sweeps_of_one_name_are_told_apart(tmp_path):
    for place in ("a", "b"):
        data.write_sweep(tmp_path / place / "sweep")
    write_run(tmp_path / "b" / "sweep")
    results = read_results([tmp_path])
    assert [sweep.name for sweep in results.sweeps] == ["a/sweep", "b/sweep"]
    assert results.runs[0].name == "b/sweep"


# Values before


def table_of(results) -> dict[str, list]:
    """By metric, its row of the headline table."""
    columns = headline_columns(results)
    return {r.metric.name: [r.values.get(key) for key in columns] for r in headline(results)}


def heads_of(results) -> list[tuple[str, str]]:
    return [(column.name, column.role) for column in headline_columns(results).values()]


def test_values_before_come_from_the_run(tmp_path):
    write_run(tmp_path / "run")
    results = read_results([tmp_path])
    assert heads_of(results) == [("before", ""), ("run", "")]
    rows = table_of(results)
    assert rows["loss on the forget set"] == [Value(1.7), Value(6.2, count=2400)]
    assert rows["KL on held-out retain data"] == [Value(0.0), Value(0.01, count=8000)]
    assert [before for _, _, before in cards(headline(results), results)] == [
        Value(1.7), Value(0.0),
    ]  # fmt: skip


def test_no_column_before_where_no_run_recorded_it(tmp_path):
    data.write_kl(tmp_path / "kl", tmp_path / "gone", count=3)
    assert heads_of(read_results([tmp_path])) == [("gone", "")]


def test_a_measured_base_is_the_column_before(tmp_path):
    results = read_results(data.write_everything(tmp_path))
    assert heads_of(results)[0] == ("Tiny-135M", "base, before unlearning")
    assert len(heads_of(results)) == len(results.subjects)


def test_each_forget_set_has_its_values_before(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", forget_sha256="f" * 64, data={"forget": "in/other.jsonl"})
    data.write_json(tmp_path / "b" / "metrics.json", {"forget_loss": {"before": 3.0, "after": 4.0}})
    data.write_choice(tmp_path / "base", None, 0.75, "general.jsonl")
    for model in (False, True):  # without the base's evaluations, then with them
        places = [tmp_path / name for name in ("a", "b", *(["base"] if model else []))]
        for folder in places[:2]:
            manifest = read_json(folder / "manifest.json")
            data.write_json(folder / "manifest.json", {**manifest, "model": data.BASE})
        results = read_results(places)
        base = [("Tiny-135M", "base, before unlearning")] if model else []
        assert heads_of(results) == [
            *base,
            ("before", "forget set forget.jsonl"), ("a", ""),
            ("before", "forget set other.jsonl"), ("b", ""),
        ]  # fmt: skip
        losses = table_of(results)["loss on the forget set"][len(base) :]
        assert [value.value for value in losses] == [1.7, 6.2, 3.0, 4.0]


def test_columns_without_values_are_left_out(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name)
        data.write_json(tmp_path / name / "metrics.json", {"retain_kl": 0.1})
    (table,) = run_tables(read_results([tmp_path]))
    assert [c.name for c in table["columns"]] == ["run", "made by", "size asked", "retain KL"]
    assert [cell["text"] for cell in table["rows"][0]][-1] == "0.1"
