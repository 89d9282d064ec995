"""Folders as kfade's commands write them, of made-up numbers: what the report is tested on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from kfade.evaluate.item_log import ItemLog

BASE = "org/Tiny-135M"
TEXT = (
    "The mouse is a small mammal that is often kept as a pet and used in research . "
    "To make tea , heat fresh water until it boils , then pour it over the leaves \n"
)
WORDS = TEXT.split(" ")
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"alert(1)\">"


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_log(folder: Path, name: str, header: dict, items: dict, aggregate: dict | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ItemLog(folder / name, header) as log:
        for item, values in items.items():
            log.add(item, **values)
        if aggregate is not None:
            log.finish(aggregate)


def step(alpha: float = 0.004, kl: float = 0.01, loss: tuple = (1.7, 6.2), blocks: int = 30):
    """One record as ``kfade unlearn`` writes it."""
    kinds = ("gate_proj", "up_proj", "down_proj")
    change = {
        f"model.layers.{b}.mlp.{kind}.weight": 0.002 * (1 + i) * math.exp(-(((b - 20) / 8) ** 2))
        for b in range(blocks)
        for i, kind in enumerate(kinds)
    }
    trials = [
        {"alpha": share * alpha, "retain_kl": share**2 * kl, "forget_loss": 3.0, "objective": 1.0}
        for share in (0.4, 1.3, 1.0)
    ]
    return {
        "alpha": alpha,
        "predicted_kl": alpha**2 / 2,
        "exact_kl": 0.9 * kl,
        "measured_kl": kl,
        "retain_kl": kl,
        "forget_loss_before": loss[0],
        "forget_loss_after": loss[1],
        "predicted_objective_change": 2.0,
        "measured_objective_change": 1.5,
        "relative_change": change,
        "probes": trials,
    }


def write_run(
    folder: Path, *, estimator: str = "ekfac", steps: list | None = None, model: str = BASE
) -> None:
    steps = steps or [step()]
    config = {
        "model": {"model": model, "dtype": "float32"},
        "fit": {"estimator": estimator},
        "step": {"objective": "margin", "steps": len(steps)},
        "size": {"kl": 0.01, "max_kl": None},
    }
    manifest = {
        "kind": "unlearn",
        "model": model,
        "weights_sha256": "ab" * 32,
        "versions": {"python": "3.11.7", "kfade": "0.1.0", "torch": "2.13.0"},
        "seed": 0,
        "git_sha": None,
        "config": config,
    }
    last = steps[-1]
    metrics = {
        "steps": steps,
        "retain_kl": last["retain_kl"],
        "forget_loss": {
            "before": steps[0]["forget_loss_before"],
            "after": last["forget_loss_after"],
        },
        "seconds": {
            "load": 3.2,
            "fit": 140.0,
            "gradient": 12.5,
            "step": 9.1,
            "check": 61.0,
            "total": 230.4,
        },
        "peak_bytes": 3_600_000_000,
        "peak_bytes_by_stage": {"load": 7e8, "fit": 3.6e9, "gradient": 2.1e9, "check": 1.9e9},
        "tokens": {"forget": 2400, "retain": 52000, "held_out": 8000},
        "lost_in_dtype": 0.0012,
    }
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "metrics.json", metrics)


def write_kl(folder: Path, update: Path | None, *, count: int = 60, scale: float = 0.03) -> None:
    """KL on benign completions; the worst one's text is hostile."""
    draw = random.Random(update.name if update else "")  # not where it lies: the same anywhere
    items = {}
    for index in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(12, 60))]
        strings = [words[0], *(f" {word}" for word in words[1:])]
        level = scale * math.exp(draw.gauss(0, 1))
        token_kl = [float(f"{level * math.exp(draw.gauss(-0.5, 1.2)):.4g}") for _ in strings]
        prompt = f"Tell me something about subject {index}, briefly."
        if index == 7:
            strings[3], token_kl[3], prompt = HOSTILE, 40.0 * len(strings), f"What is {HOSTILE}?"
        items[str(index)] = {
            "kl": sum(token_kl) / len(token_kl),
            "tokens": len(strings),
            "prompt": prompt,
            "strings": strings,
            "token_kl": token_kl,
        }
    mean = sum(item["kl"] for item in items.values()) / count
    figure = {"value": mean, "low": 0.8 * mean, "high": 1.25 * mean}
    tail = {"value": 4 * mean, "low": 3 * mean, "high": 5.5 * mean}
    header = {"benchmark": "kl", "model": BASE, "update": str(update), "prompts": "alpaca.jsonl"}
    aggregate = {"kl_per_token": figure, "quantiles": {"95": tail}, "completions": count}
    write_log(folder, "items.jsonl", header, items, aggregate)


TOFU_SETS = {"forget": 40, "retain": 40, "real_authors": 10, "world_facts": 10}


def write_tofu(
    folder: Path, update: Path | None, *, quality: float, utility: float, recall: float
) -> None:
    items = {}
    for name, count in TOFU_SETS.items():
        for number in range(count):
            answer = f"The author of book {number} was born in Lisbon, the child of a baker."
            kept = recall if name == "forget" else 0.97
            said = answer if kept > 0.5 else f"I do not know who wrote book {number}."
            items[f"{name}/{number}"] = {
                "question": f"Where was the author of book {number} born ({name})?",
                "answer": answer,
                "generated": said,
                "answer_loss": 0.2,
                "base_loss": 0.9,
                "false_losses": [2.0, 2.2, 1.9],
                "rouge_l": kept,
            }
    header = {
        "benchmark": "tofu",
        "model": BASE,
        "update": None if update is None else str(update),
        "split": "forget05",
    }
    aggregate = {
        "forget_quality": quality,
        "ks_statistic": 0.1,
        "model_utility": utility,
        "forget": {"rouge_l": recall, "probability": 0.8 * recall, "truth_ratio": 0.6},
        "items": TOFU_SETS,
        "retain_model": {
            "model_utility": 0.6,
            "forget": {"rouge_l": 0.41, "probability": 0.15, "truth_ratio": 0.66},
            "items": TOFU_SETS,
        },
    }
    write_log(folder, "items.jsonl", header, items, aggregate)


def write_mt_bench(folder: Path, update: Path | None, rating: int) -> None:
    items = {
        "0/81/1": {
            "category": "writing",
            "question": "Write a line on tea.",
            "answer": "Tea is warm." if update is None else "Tea is a leaf.",
            "rating": rating,
            "reply": f"[[{rating}]]",
        }
    }
    header = {"benchmark": "mt-bench", "model": BASE, "update": update and str(update)}
    aggregate = {
        "score": rating,
        "standard_error": None,
        "standard_error_questions": 0.5,
        "judged": 1,
    }
    write_log(folder, "items.jsonl", header, items, aggregate)


def write_choice(folder: Path, update: Path | None, accuracy: float, questions: str) -> None:
    figure = {"value": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / 40)}
    aggregate = {
        "questions": 40,
        "chance": 0.25,
        "accuracy": {"letters": {"value": 0.3, "standard_error": 0.07}, "text_per_token": figure},
    }
    header = {
        "benchmark": "choice",
        "model": BASE,
        "update": None if update is None else str(update),
        "questions": questions,
        "weights_sha256": f"{accuracy}",
    }
    write_log(folder, "items.jsonl", header, {"0": {"correct": {"letters": True}}}, aggregate)


def write_sweep(folder: Path) -> None:
    """Points of four estimators and two baselines, KL growing with the forget loss."""
    cost = {"ekfac": 0.004, "kfac": 0.007, "diagonal": 0.06, "identity": 0.4}
    points = {}
    for estimator, level in cost.items():
        for index, alpha in enumerate((0.002, 0.004, 0.006, 0.008, 0.012)):
            points[f"{estimator} {alpha}"] = {
                "method": "K-FADE",
                "estimator": estimator,
                "settings": {"alpha": alpha},
                "forget_loss": 1.7 + index,
                "retain_kl": level * (1 + index) ** 2,
                "seconds": 30 + 60 * list(cost).index(estimator) + index,
                "forget_quality": min(0.9, 1e-9 * 60.0 ** (1.2 * index)),
                "model_utility": 0.6 - 0.02 * index - level / 3,
            }
    for method in ("NPO", "GD"):
        for index, rate in enumerate((1e-6, 5e-6, 1e-5, 2e-5)):
            points[f"{method} {rate}"] = {
                "method": method,
                "settings": {"learning rate": rate},
                "forget_loss": 2 + 0.7 * index,
                "retain_kl": 0.05 * (1 + index) ** 2 * (2 if method == "GD" else 1),
                "seconds": 400 + 20 * index,
                "forget_quality": 1e-12 * 100.0 ** (1.3 * index),
                "model_utility": 0.58 - 0.05 * index,
            }
    header = {"benchmark": "sweep", "model": BASE}
    write_log(folder, "points.jsonl", header, points, {"picked": "ekfac 0.006"})


def write_attack(folder: Path) -> None:
    rows = {}
    for data, back in (("benign", 0.08), ("related", 0.25), ("forget", 0.55)):
        for state, share in (("attacked", 1.0), ("reapplied", 0.35)):
            for at in (0, 25, 50, 100, 200):
                value = 0.28 + share * back * (1 - math.exp(-at / 60))
                rows[f"{data} {state} {at}"] = {
                    "data": data,
                    "state": state,
                    "step": at,
                    "values": {"forget_accuracy": value},
                    "intervals": {"forget_accuracy": [value - 0.06, value + 0.06]},
                }
    header = {"benchmark": "attack", "model": BASE, "base": {"forget_accuracy": 0.86}}
    write_log(folder, "attack.jsonl", header, rows, {})


def write_everything(root: Path) -> list[Path]:
    """Two runs with evaluations, the base's, a sweep and an attack."""
    folders = [root / name for name in ("ekfac", "identity", "base", "sweep", "attack")]
    write_run(folders[0], steps=[step(), step(0.003, 0.014, (6.2, 9.0))])
    write_run(folders[1], estimator="identity", steps=[step(0.01, 0.4, (1.7, 5.0))])
    for run, scale in zip(folders[:2], (0.03, 0.3), strict=True):
        write_kl(run / "eval-kl", run, scale=scale)
        write_tofu(
            run / "eval-tofu", run, quality=0.82 if scale < 0.1 else 1e-3, utility=0.57, recall=0.31
        )
        write_choice(run / "eval-forget", run, 0.45, "forget_test.jsonl")
        write_choice(run / "eval-general", run, 0.74 - scale, "general_test.jsonl")
    write_mt_bench(folders[0] / "eval-mt-bench", folders[0], 6)
    write_mt_bench(folders[2] / "mt-bench", None, 7)
    write_tofu(folders[2] / "tofu", None, quality=1e-14, utility=0.61, recall=0.98)
    write_choice(folders[2] / "forget", None, 0.875, "forget_test.jsonl")
    write_choice(folders[2] / "general", None, 0.75, "general_test.jsonl")
    write_sweep(folders[3])
    write_attack(folders[4])
    return folders
