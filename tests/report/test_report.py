"""The report: what is read, what is computed from it, what is drawn."""

import ast
import json
import math
from pathlib import Path

import pytest
import report_data as data

import kfade.report.data
from kfade.errors import InputError
from kfade.evaluate.log import Evaluation
from kfade.report.charts import GREY, Axis, Chart, Series, drawable
from kfade.report.data import Log, Measured, MeasuredModel, Results, read_results
from kfade.report.figures import (
    all_charts,
    attack_curves,
    kl_forgetting,
    kl_quantiles,
    kl_seconds,
    quality_utility,
    series_name,
)
from kfade.report.inside import (
    change_by_block,
    change_by_expert,
    changes,
    place_of,
    predicted_measured,
)
from kfade.report.interactive import legend, plotly_chart
from kfade.report.names import method_of, set_name, short
from kfade.report.page import script_json
from kfade.report.static import draw
from kfade.report.tables import chart_rows, run_tables
from kfade.report.texts import completions, generations
from kfade.report.ticks import log_limits, log_ticks, power
from kfade.report.values import Value, headline, measured_values, value_of, wilson


def measured(benchmark: str, aggregate: dict, items: dict | None = None, **header) -> Measured:
    log = Evaluation({"benchmark": benchmark, **header}, items or {}, aggregate)
    return Measured(Path("eval-x"), log, {})


def run(name: str = "run", **metrics) -> MeasuredModel:
    return MeasuredModel(name, "run", manifest={"model": data.BASE}, metrics=metrics)


def sweep(**points: dict) -> Log:
    return Log("sweep", Path("sweep"), Evaluation({"benchmark": "sweep"}, points, {}))


@pytest.fixture
def everything(tmp_path) -> list[Path]:
    return data.write_everything(tmp_path)


# What is read


def test_evaluations_go_to_those_whom_they_measured(everything):
    results = read_results(everything)
    assert [(s.name, s.kind) for s in results.subjects] == [
        ("Tiny-135M", "base"),
        ("ekfac", "run"),
        ("identity", "run"),
        ("retain model", "model"),
    ]
    assert [m.benchmark for m in results.subjects[1].measured] == [
        "choice", "choice", "kl", "mt-bench", "tofu",
    ]  # fmt: skip
    assert results.base_of(results.runs[0]) is results.subjects[0]
    assert [len(logs) for logs in (results.sweeps, results.attacks)] == [1, 1]
    assert results.notes == ()


def test_an_evaluation_outside_the_run_finds_it_by_its_update(tmp_path):
    data.write_run(tmp_path / "run")
    data.write_kl(tmp_path / "elsewhere", tmp_path / "run" / "update.safetensors", count=3)
    (subject,) = read_results([tmp_path / "elsewhere", tmp_path / "run"]).subjects
    assert (subject.name, len(subject.measured)) == ("run", 1)


def test_an_evaluation_whose_run_is_not_there_stands_for_it(tmp_path):
    data.write_kl(tmp_path / "kl", tmp_path / "gone", count=3)
    (subject,) = read_results([tmp_path]).subjects
    assert (subject.name, subject.kind, subject.model) == ("gone", "run", data.BASE)


def test_one_folder_given_twice_counts_once(tmp_path):
    data.write_run(tmp_path / "run")
    assert len(read_results([tmp_path, tmp_path / "run"]).subjects) == 1


def test_runs_of_one_name_are_told_apart(tmp_path):
    for place in ("a", "b"):
        data.write_run(tmp_path / place / "run")
    results = read_results([tmp_path])
    assert [subject.name for subject in results.subjects] == ["a/run", "b/run"]


def test_what_was_interrupted_is_left_out_and_said(tmp_path):
    data.write_run(tmp_path / "run")
    header = {"benchmark": "kl", "model": data.BASE}
    data.write_log(tmp_path / "run" / "eval-kl", "items.jsonl", header, {"0": {"kl": 1}}, None)
    (tmp_path / "other.part" / "state").mkdir(parents=True)
    results = read_results([tmp_path])
    assert results.runs[0].measured == []
    assert len(results.notes) == 2
    assert any("other.part: an interrupted run" in note for note in results.notes)
    assert any("items.jsonl: interrupted" in note for note in results.notes)


def test_what_is_not_ours_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_results([tmp_path / "nowhere"])
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="photos: holds no results; a run has"):
        read_results([tmp_path / "photos"])
    data.write_json(tmp_path / "photos" / "manifest.json", {"kind": "holiday"})
    with pytest.raises(InputError, match="holds no results"):
        read_results([tmp_path / "photos"])
    (tmp_path / "photos" / "manifest.json").write_text('{"kind": "unlea')
    with pytest.raises(InputError, match=r"manifest.json: not a JSON object"):
        read_results([tmp_path / "photos"])
    (tmp_path / "photos" / "manifest.json").unlink()
    (tmp_path / "photos" / "items.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="line 1"):
        read_results([tmp_path / "photos"])


def test_report_needs_no_torch():
    folder = Path(kfade.report.data.__file__).parent
    evaluate = ("log", "questions", "uncertainty", "tofu_logs", "tofu_read", "rouge")
    allowed = {
        "kfade.data.conversations",
        "kfade.errors",
        "kfade.data.examples",
        "kfade.data.rows",
        "kfade.runtime.files",
        "kfade.runtime.progress",
        *(f"kfade.evaluate.{name}" for name in evaluate),
    }
    own = [folder.parents[1] / f"{name.replace('.', '/')}.py" for name in allowed]
    assert all(path.is_file() for path in own)
    for path in [*folder.glob("*.py"), *own]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("kfade"):
                assert node.module.startswith("kfade.report") or node.module in allowed, path
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names]
                assert not {"torch", "transformers"} & {n.split(".")[0] for n in names}, path


# Numbers


def test_a_figure_in_each_form():
    assert value_of(0.5, 3) == Value(0.5, None, None, 3)
    assert value_of({"value": 2.0, "low": 1.0, "high": 4.0}) == Value(2.0, 1.0, 4.0)
    by_error = value_of({"value": 0.5, "standard_error": 0.1})
    assert (by_error.low, by_error.high) == (pytest.approx(0.304), pytest.approx(0.696))
    for other in (None, "text", True, {"low": 1.0}, [1.0]):
        assert value_of(other) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0052, "0.0052"), (14.34, "14.3"), (4.6e-7, "4.6e-7"), (12345, "12 345"),
        (1234.5, "1 234"), (0.0, "0"), (2e9, "2e9"), (math.inf, "not finite"), ("x", "x"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_an_interval_of_none_of_a_few_has_a_width():
    low, high = wilson(0.0, 10)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(0.38416 / 1.38416)  # z²/n / (1 + z²/n)


def test_headline_has_base_and_interval(everything):
    rows = {(r.metric.group, r.metric.name): r.values for r in headline(read_results(everything))}
    loss = rows["Forgetting", "loss on the forget set"]
    assert (loss["Tiny-135M"].value, loss["ekfac"].value) == (1.7, 9.0)
    forget = rows["Forgetting", "forget test: accuracy by text"]
    assert forget["Tiny-135M"].value == 0.875
    # Wilson: (0.45 + 0.04802 ± 1.96 √(0.0061875 + 0.0006003)) / 1.09604
    assert forget["ekfac"].low == pytest.approx(0.3071, abs=1e-4)
    assert forget["ekfac"].high == pytest.approx(0.6017, abs=1e-4)
    assert forget["ekfac"].count == 40
    assert rows["Utility", "general test: accuracy by text"]["Tiny-135M"].value == 0.75
    quality = rows["Forgetting", "TOFU forget quality"]
    assert {n: v.value for n, v in quality.items()} == {
        "Tiny-135M": 1e-14, "ekfac": 0.82, "identity": 1e-3, "retain model": 1.0,
    }  # fmt: skip
    kl = rows["Specificity", "KL on benign completions"]["ekfac"]
    assert kl.low == pytest.approx(0.8 * kl.value)
    assert rows["Utility", "MT-Bench"]["ekfac"].low == pytest.approx(6 - 1.96 * 0.5)
    # A model's KL to itself, of which no file needs to tell.
    assert rows["Specificity", "KL on held-out retain data"]["Tiny-135M"] == Value(0.0)


def test_tofu_intervals_come_from_the_items():
    items = {
        f"forget/{i}": {"rouge_l": r, "answer_loss": 0.0, "base_loss": 1.0, "false_losses": [1.0]}
        for i, r in enumerate((0.0, 1.0))
    }
    aggregate = {"forget": {"rouge_l": 0.5, "probability": 1.0, "truth_ratio": 1.0}}
    values = {m.name: v for m, v in measured_values(measured("tofu", aggregate, items))}
    # s = √½, s/√2 = ½
    assert values["TOFU forget set: ROUGE-L recall"].high == pytest.approx(0.5 + 1.96 / 2)
    assert values["TOFU forget set: probability"].high is None  # all alike


def test_known_and_unknown_benchmarks():
    tasks = {"tasks": {"wmdp_bio": {"acc": {"value": 0.3, "standard_error": 0.01}}}}
    ((metric, value),) = measured_values(measured("choice", tasks, quantise="int4"))
    assert (metric.group, metric.name) == ("Forgetting", "wmdp_bio: acc, in int4")
    assert value.value == 0.3
    by_text = {"questions": 40, "accuracy": {"text_per_token": {"value": 0.5}}}
    sets = {"questions": 80, "sets": {"forget one": by_text, "arc easy": by_text}}
    found = list(measured_values(measured("choice", sets, questions=["a", "b"])))
    assert [(m.group, m.name, v.count) for m, v in found] == [
        ("Forgetting", "forget one: accuracy by text", 40),
        ("Utility", "arc easy: accuracy by text", 40),
    ]
    rounding = {"weights": 3, "rounding": {"int8": {"surviving": 0.9, "lost": 0.4}}}
    ((metric, value),) = measured_values(measured("quantisation", rounding))
    assert (metric.name, value.value) == ("update left in int8", 0.9)
    own = {"auc": {"min_k": {"value": 0.6}}, "members": {"texts": 4, "perplexity": 3.0}}
    names = [m.name for m, _ in measured_values(measured("memorisation", own, members="a/b.jsonl"))]
    assert names == ["b: perplexity", "b: membership by Min-K, AUC"]
    other = measured("new", {"a": {"b_c": 2.0, "said": "x"}})
    ((metric, value),) = measured_values(other)
    assert (metric.group, metric.name, value.value) == ("Further", "new, x: a b c", 2.0)


def test_names():
    assert set_name(measured("choice", {}, questions="mmlu/test")) == "mmlu"
    assert set_name(measured("choice", {}, questions="forget_test.jsonl")) == "forget test"
    config = {"fit": {"estimator": "kfac"}, "step": {"objective": "ce"}}
    made = MeasuredModel("r", "run", manifest={"kind": "unlearn", "config": config})
    assert method_of(made) == "K-FADE, kfac, ce"
    config["step"] = {"objective": "margin", "later_objective": "ce"}
    assert method_of(made) == "K-FADE, kfac, margin, then ce"
    config["step"] = {"objective": "margin", "bound": None, "noise": None}  # as by default
    made.manifest.update(bound=2.0, noise=0.25)
    assert method_of(made) == "K-FADE, kfac, margin, bound 2, noise 0.25"
    made.manifest.update(at_prompts=True)
    assert method_of(made) == "K-FADE, kfac, margin, bound 2, noise 0.25, at prompts"
    made.manifest.update(bound=0.0, noise=0.0, at_prompts=False)
    config["step"] = {"objective": "ce", "later_objective": None}
    config["refinement"] = {"refine": 2}
    assert method_of(made) == "K-FADE, kfac, ce, refined 2"
    config["correction"] = {"correct": 1}
    assert method_of(made) == "K-FADE, kfac, ce, refined 2, corrected 1"
    config["correction"] = {"correct": 0}
    config["refinement"] = {"refine": 0}
    assert method_of(made) == "K-FADE, kfac, ce"
    assert (
        method_of(MeasuredModel("r", "run", manifest={"kind": "baseline", "method": "npo"}))
        == "npo"
    )
    point = {"method": "K-FADE", "objective": "ce", "settings": {"refine": 1, "alpha": 0.1}}
    assert series_name(point) == "K-FADE, ce, refined 1"
    assert series_name({**point, "settings": {"alpha": 0.1}}) == "K-FADE, ce"


# Figures


def test_forget_quality_figure():
    base = MeasuredModel(
        "base", "base", measured=[measured("tofu", TOFU | {"forget_quality": 1e-9})]
    )
    one = MeasuredModel("one", "run", measured=[measured("tofu", TOFU)])
    without = MeasuredModel(
        "none", "run", measured=[measured("tofu", TOFU | {"forget_quality": None})]
    )
    point = {"method": "NPO", "settings": {"lr": 1e-5}, "model_utility": 0.5, "forget_quality": 0.1}
    none = {**point, "forget_quality": None}  # null in the log: not measured
    chart = quality_utility([base, one, without], [sweep(a=point, b={"method": "NPO"}, c=none)])
    assert [(s.name, s.x, s.y) for s in chart.series] == [
        ("base", (0.6,), (1e-9,)),
        ("one", (0.6,), (0.8,)),
        ("NPO", (0.5,), (0.1,)),
    ]
    assert chart.series[0].hue == GREY
    assert chart.series[2].labels == ("lr 1e-5",)
    assert chart.y.log
    assert quality_utility([without], []) is None


TOFU = {"forget_quality": 0.8, "model_utility": 0.6}


def test_quantiles_and_their_band():
    subject = run()
    subject.measured.append(measured("kl", {}, {str(i): {"kl": float(i)} for i in range(101)}))
    (series,) = kl_quantiles([subject]).series
    assert series.y[49] == pytest.approx(50)
    # The median of 101 uniform values has a standard error of about 101 / (2 √101) = 5.0.
    assert 50 - 2.6 * 5 < series.low[49] < 50 - 1.4 * 5
    assert 50 + 1.4 * 5 < series.high[49] < 50 + 2.6 * 5
    assert all(a <= y <= b for a, y, b in zip(series.low, series.y, series.high, strict=True))
    assert kl_quantiles([run()]) is None


def test_kl_against_forgetting_and_time():
    record = data.step(alpha=2.0, kl=0.1, loss=(1.0, 4.0))
    one = run(steps=[record], retain_kl=0.1, seconds={"total": 30.0})
    (series,) = kl_forgetting([one], []).series
    # Two trials at a loss of 3, then the step itself.
    assert series.x == (3.0, 3.0, 4.0)
    assert series.y == (pytest.approx(0.016), pytest.approx(0.169), 0.1)
    assert kl_seconds([one], []) is None  # one mark tells nothing
    point = {"method": "GD", "retain_kl": 0.3, "seconds": 90.0}
    assert [s.x for s in kl_seconds([one], [sweep(a=point)]).series] == [(30.0,), (90.0,)]
    assert kl_forgetting([run()], [sweep(a=point)]) is None


def test_a_baselines_training_is_drawn_like_steps():
    curve = [
        {"step": 0, "forget_loss": 1.0, "retain_loss": 2.0, "retain_kl": 0.0},
        {"step": 10, "forget_loss": 3.0, "retain_loss": 2.1, "retain_kl": 0.02, "loss": 0.5},
        {"step": 20, "forget_loss": 5.0, "retain_loss": 2.6, "retain_kl": 0.3, "loss": 0.1},
    ]
    npo = MeasuredModel(
        "npo", "run", manifest={"kind": "baseline", "method": "npo"}, metrics={"curve": curve}
    )
    one = run(steps=[data.step(alpha=2.0, kl=0.1, loss=(1.0, 4.0))])
    ours, theirs = kl_forgetting([one, npo], []).series
    assert theirs.name == "npo"
    # Not the base model, whose KL is 0 and has no place on a logarithmic axis.
    assert (theirs.x, theirs.y) == ((3.0, 5.0), (0.02, 0.3))
    assert theirs.labels == ("npo, step 10", "npo, step 20")
    assert ours.x[-1] == 4.0
    empty = MeasuredModel("npo", "run", metrics={"curve": curve[:1]})
    assert kl_forgetting([empty], []) is None


def test_predictions_of_trials_scale_with_the_square():
    record = data.step(alpha=2.0, kl=0.1)
    fitted, exact, line = predicted_measured([run(steps=[record])]).series
    # Trials at 0.4 and 1.3 of α; the last trial is the step.
    assert fitted.x == pytest.approx((0.16 * 2, 2, 1.69 * 2))
    assert exact.x == pytest.approx((0.16 * 0.09, 0.09, 1.69 * 0.09))
    assert exact.y == pytest.approx((0.016, 0.1, 0.169))
    assert line.x == line.y == pytest.approx((0.16 * 0.09, 1.69 * 2))


def test_where_the_update_lies():
    name = "model.layers.{}.mlp.{}.weight"
    one = {name.format(0, "up_proj"): 0.1, name.format(2, "down_proj"): 0.3}
    two = {name.format(0, "up_proj"): 0.2}
    steps = [{"relative_change": one}, {"relative_change": two}]
    total = {(0, "up_proj", None): pytest.approx(0.3), (2, "down_proj", None): 0.3}
    assert changes(steps) == total
    chart = change_by_block([run(steps=steps)])
    assert [(s.name, s.x, s.y) for s in chart.series] == [
        ("up_proj", (0,), (pytest.approx(30),)),
        ("down_proj", (2,), (30,)),
    ]
    both = {name.format(0, "up_proj"): 0.3, name.format(0, "down_proj"): 0.4}
    other = run("other", steps=[{"relative_change": both}])
    chart = change_by_block([run(steps=steps), other])
    # √((0.3² + 0.4²)/2) = 0.3536
    assert chart.series[1].y == (pytest.approx(35.36, abs=0.01),)
    assert place_of("transformer.h.11.mlp.c_fc.bias") == (11, "c_fc bias", None)
    assert change_by_block([run(steps=[{}])]) is None
    assert change_by_expert([run(steps=steps)]) is None


def test_which_experts_the_update_changes():
    name = "model.layers.{}.mlp.experts.down_proj[{}]"
    one = {name.format(1, 3): 0.3, name.format(1, 0): 0.4, name.format(0, 12): 0.1}
    two = {name.format(0, 12): 0.2, "model.layers.0.self_attn.o_proj.weight": 0.5}
    steps = [{"relative_change": one}, {"relative_change": two}]
    [series] = change_by_expert([run(steps=steps)]).series
    assert (series.name, series.form, series.x) == ("down_proj", "marks", (0, 1, 1))
    assert series.y == pytest.approx((30, 30, 40))
    assert series.labels == ("expert 12", "expert 3", "expert 0")
    blocks = {s.name: s.y for s in change_by_block([run(steps=steps)]).series}
    # √((0.3² + 0.4²)/2) = 0.3536
    assert blocks == {"down_proj": pytest.approx((30, 35.36), abs=0.01), "o_proj": (50,)}


def test_attack_curves(tmp_path):
    data.write_attack(tmp_path)
    (chart,) = attack_curves(read_results([tmp_path]).attacks[0])
    assert [s.name for s in chart.series] == [
        "benign, attacked", "benign, reapplied", "related, attacked", "related, reapplied",
        "forget, attacked", "forget, reapplied", "before unlearning",
    ]  # fmt: skip
    first, again = chart.series[:2]
    assert first.x == (0, 25, 50, 100, 200)
    assert first.low[0] == pytest.approx(0.28 - 0.06)
    assert again.dashed
    assert not first.dashed
    assert first.colour == again.colour
    assert chart.series[-1].y == (0.86, 0.86)


def test_what_the_data_do_not_allow_is_said(everything):
    charts, missing = all_charts(read_results(everything))
    assert [chart.key for chart in charts] == [
        "forget-quality", "kl-quantiles", "kl-forgetting", "kl-seconds", "predicted-measured",
        "update-blocks", "seconds", "memory", "attack-attack-forget-accuracy",
    ]  # fmt: skip
    assert missing == []
    charts, missing = all_charts(Results((MeasuredModel("m", "model"),)))
    assert charts == []
    assert len(missing) == 9
    assert any("kfade attack" in line for line in missing)


def test_points_that_an_axis_cannot_show_are_counted():
    y = (1.0, 0.0, math.nan, 2.0)
    series = Series("s", (1, 2, 3, 4), y, low=(-1.0, 0, 0, 1.5), high=(3.0,) * 4)
    chart, lost = drawable(Chart("k", "t", "c", Axis("x"), Axis("y", log=True), (series,)))
    assert lost == 2
    assert (chart.series[0].x, chart.series[0].y) == ((1, 4), (1.0, 2.0))
    assert chart.series[0].low == (0.1, 1.5)
    chart, lost = drawable(Chart("k", "t", "c", Axis("x"), Axis("y"), (series,)))
    assert (lost, chart.series[0].low) == (1, (-1.0, 0, 1.5))


def test_plotly_gets_the_same_points():
    band = Series("a", (1.0, 2.0), (3.0, 4.0), "line", low=(2.0, 3.0), high=(5.0, 6.0))
    marks = Series("b", (1.0,), (10.0,), low=(8.0,), high=(13.0,), colour=1)
    chart = Chart("k", "t", "c", Axis("x"), Axis("y", log=True), (band, marks))
    drawn = plotly_chart(chart)
    low, high, line, points = drawn["data"]
    assert (low["y"], high["y"], line["y"]) == ([2.0, 3.0], [5.0, 6.0], [3.0, 4.0])
    assert high["fill"] == "tonexty"
    assert points["error_y"]["array"] == [3.0]
    assert points["error_y"]["arrayminus"] == [2.0]
    assert drawn["layout"]["yaxis"]["type"] == "log"
    assert [entry["traces"] for entry in legend(chart)] == ["[0, 1, 2]", "[3]"]
    json.dumps(drawn, allow_nan=False)


def test_logarithmic_ticks():
    assert log_ticks([0.02, 0.3]) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    assert log_ticks([1e-12, 0.5]) == [1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0]
    assert log_ticks([1.1, 3000.0]) == [1, 10, 100, 1000, 10000]
    assert [power(v) for v in (0.02, 1000.0, 1e-6, 2e-5)] == ["0.02", "1000", "10⁻⁶", "2·10⁻⁵"]


def test_logarithmic_ticks_of_less_than_a_decade():
    # Between 142 and 157 lies no 1, 2 or 5 times a power of ten: a step of 5 is the largest of
    # which three multiples fit.
    assert log_ticks([157.0, 142.0]) == [140, 145, 150, 155, 160]
    assert log_ticks([2.1, 9.9]) == [2, 4, 6, 8, 10]
    assert log_ticks([0.00412, 0.00419]) == [0.00412, 0.00414, 0.00416, 0.00418, 0.0042]
    assert [power(v) for v in (14220.0, 0.00412)] == ["1.422·10⁴", "0.00412"]


@pytest.mark.parametrize(
    "values",
    [(150.0,), (1.0, 1.001), (2.1, 4.9), (9.0, 11.0), (1.1, 990.0), (1e-12, 1e9), (0.0, 30, "a")],
)
def test_at_least_three_ticks_are_within_the_limits(values):
    low, high = log_limits(values)
    shown = [tick for tick in log_ticks(values) if low <= tick <= high]
    assert 3 <= len(shown) <= 10
    assert len({power(tick) for tick in shown}) == len(shown)


def test_limits_of_a_logarithmic_axis():
    assert log_limits([100.0, 1.0, 10.0]) == pytest.approx((10**-0.12, 10**2.12))
    assert log_limits([10.0]) == pytest.approx((10**-0.12, 10**2.12))


def test_both_drawings_have_the_same_ticks():
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib").Figure()
    axes = figure.subplots()
    series = Series("s", (142.0, 157.0), (0.2, 0.2), "marks")
    chart = Chart("k", "t", "c", Axis("x", log=True), Axis("y", log=True), (series,))
    draw(axes, chart)
    layout = plotly_chart(chart)["layout"]
    for drawn, own in ((axes.xaxis, layout["xaxis"]), (axes.yaxis, layout["yaxis"])):
        low, high = drawn.get_view_interval()
        assert [math.log10(low), math.log10(high)] == pytest.approx(own["range"])
        labels = dict(zip(drawn.get_majorticklocs(), drawn.get_ticklabels(), strict=True))
        texts = [label.get_text() for label in labels.values()]
        assert ([*labels], texts) == (own["tickvals"], own["ticktext"])
        assert sum(low <= tick <= high for tick in labels) >= 3
        assert not len(drawn.get_minorticklocs())


def test_numbers_below_a_chart():
    series = Series("s", tuple(range(100)), (1.0,) * 100)
    rows, every = chart_rows(Chart("k", "t", "c", Axis("x"), Axis("y"), (series,)))
    assert every == 3
    assert len(rows) == 34
    assert rows[1]["x"] == "3"


def test_run_tables():
    record = data.step(alpha=2.0, kl=0.1, loss=(1.0, 4.0))
    (table,) = run_tables(Results((run(steps=[record]),)))
    (row,) = table["rows"]
    assert [cell["text"] for cell in row][:6] == ["run", "1", "2", "2", "0.09", "0.1"]
    assert row[-1]["sort"] == pytest.approx(1 / 0.9)
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


# Texts


def test_answers_before_and_after(everything):
    made, left = generations(read_results(everything))
    assert left == 0
    first = made[0]
    assert first["part"] == "ekfac: forget"
    assert first["before"] == first["expected"] != first["after"]
    assert first["facts"] == "ROUGE-L recall 0.98 → 0.31"
    assert first["change"] == pytest.approx(0.67)
    (bench,) = [g for g in made if g["part"] == "ekfac: MT-Bench"]
    assert (bench["before"], bench["after"]) == ("Tea is warm.", "Tea is a leaf.")
    assert (bench["facts"], bench["change"]) == ("rated 7 → 6", 1)


def test_an_answer_to_another_question_is_no_answer_before(tmp_path):
    data.write_run(tmp_path / "run")
    data.write_mt_bench(tmp_path / "run" / "bench", tmp_path / "run", 6)
    data.write_mt_bench(tmp_path / "base", None, 7)
    log = tmp_path / "base" / "items.jsonl"
    assert generations(read_results([tmp_path]))[0][0]["before"] == "Tea is warm."
    log.write_text(log.read_text().replace("Write a line on tea.", "Write a line on rain."))
    assert generations(read_results([tmp_path]))[0][0]["before"] is None


def test_answers_without_a_base(everything):
    made, _ = generations(read_results(everything[:1]))
    assert made[0]["part"] == "forget"  # one run needs no name
    assert made[0]["before"] is None


def test_the_worst_completions_come_first(everything):
    made, left = completions(read_results(everything[:1]))
    assert [item["mean"] for item in made] == sorted((i["mean"] for i in made), reverse=True)
    assert (len(made), left) == (60, 0)
    assert all(len(item["tokens"]) == len(item["values"]) for item in made)


# Escaping


def test_text_is_made_harmless():
    packed = script_json({"a": [data.HOSTILE, "\u2028"], "b": (math.nan, 1.0)})
    assert not set("<>&'") & set(packed)
    assert json.loads(packed) == {"a": [data.HOSTILE, "\u2028"], "b": [None, 1.0]}
