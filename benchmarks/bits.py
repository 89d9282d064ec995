"""Whether a change moves numbers: tiny runs of every command, and a digest of all that they give.

    python benchmarks/bits.py --write before.json   # before the change
    python benchmarks/bits.py --compare before.json # after it; exit code 1 where bits differ
    python benchmarks/bits.py --write before.json --demo  # the demo too, three minutes more

Digests cover tensors (name, dtype, shape, bytes) and the numbers and words in JSON. Seconds, bytes
of memory, versions, dates, paths and the options given are left out. They hold for one machine and
one set of versions, so they are not committed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import zoo

from kfade.cli import main

FORGET = [{"prompt": f"a b {x}", "completion": " d e"} for x in "fghi"]
RETAIN = [{"text": f"{x} k l m n o p q r s t u v w x y z"} for x in "abcdefghij"]
QUESTIONS = [
    {"question": f"a b {x}", "choices": ["d e", "k l", "m", "n o p"], "answer": i % 4}
    for i, x in enumerate("fghij")
]
TOFU = [
    {
        "question": f"{x} k l",
        "answer": f"m n {x}",
        "paraphrased_answer": f"{x} m",
        "perturbed_answer": [f"o p {x}", f"q {x} r s", "t"],
    }
    for x in "abc"
]
VOLATILE = (
    *("versions", "git_sha", "config", "template_date", "time", "python", "platform"),
    *("asked", "template", "truncate"),  # options: their effect is in the numbers
    "curvature_sha256",  # of files that tell when they were made
)


def volatile(key: str) -> bool:
    """Whether a value differs from run to run, or only tells what was asked for."""
    return key in VOLATILE or "seconds" in key or key.startswith("peak_bytes")


BASELINES = {
    **dict.fromkeys(("ga", "gd", "kl-min", "npo", "npo-sam", "simnpo"), ("--epochs", "1")),
    **dict.fromkeys(("wga", "satimp", "undial", "soul"), ("--epochs", "1")),
    "rmu": ("--layer", "1", "--steps", "4"),
    "repselect": ("--components", "3"),
    "elm": ("--concept", "a b", "--layers", "0-1", "--lora", "2", "--steps", "4"),
}


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def commands(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments) of every run, in an order in which each finds what it reads."""
    model = str(root / "model")
    zoo.save(model)
    half = str(root / "half")
    zoo.save(half, zoo.tiny("gpt2", dtype=torch.bfloat16), chat=True)
    forget = write_lines(root / "forget.jsonl", FORGET)
    retain = write_lines(root / "retain.jsonl", RETAIN)
    questions = write_lines(root / "questions.jsonl", QUESTIONS)
    data = ["--forget", forget, "--retain", retain, "--sequence-length", "8"]

    def out(name: str) -> list[str]:
        return ["--out", str(root / name)]

    runs = {
        "unlearn": ["--kl", "0.05", "--steps", "2", "--later-objective", "ce"],
        "unlearn-kfac": ["--alpha", "0.02", "--estimator", "kfac", "--forget-batch", "2"],
        "unlearn-diagonal": ["--kl", "0.02", "--estimator", "diagonal", "--objective", "ce"],
        "unlearn-identity": ["--kl", "0.02", "--estimator", "identity", "--no-refit"],
        "unlearn-refine": ["--kl", "0.02", "--refine", "2", "--refine-sequences", "4"],
        "unlearn-sampled": ["--kl", "0.02", "--labels", "sampled", "--recompute"],
        "unlearn-memory": ["--max-kl", "0.05", "--memory", "8GB", "--layers", "1"],
    }
    for name, more in runs.items():
        yield name, ["unlearn", model, *data, *out(name), *more]
    yield "unlearn-half", ["unlearn", half, *data, *out("unlearn-half"), "--kl", "0.3"]
    yield "fit", ["fit", model, *data[2:], *out("fit")]
    fit = ["--curvature", str(root / "fit")]
    yield "unlearn-fitted", ["unlearn", model, *data, *out("fitted"), "--kl", "0.02", *fit]
    grid = ["--alpha", "0.01,0.05", "--relative-damping", "0.1,1", "--layers", "0;all"]
    yield "sweep", ["sweep", model, *fit, *data[:2], *out("sweep"), *grid]
    for method, own in BASELINES.items():
        more = ["--lr", "0.01", "--batch", "2", *own]
        yield f"baseline-{method}", ["baseline", method, model, *data, *out(method), *more]
    update = str(root / "unlearn")
    edited = ["--update", update]
    yield "apply", ["apply", model, update, *out("applied")]
    yield "revert", ["revert", str(root / "applied"), update, *out("reverted")]
    yield "merge", ["merge", update, str(root / "unlearn-kfac"), *out("merged")]
    yield "export-lora", ["export-lora", update, "--rank", "2", *out("lora")]
    yield "check", ["check", model, "--retain", retain]
    yield "plan", ["plan", model, "--sequence-length", "8"]
    steps = ["--steps", "4", "--lr", "1e-2", "--at", "0,2,4", "--sequence-length", "8"]
    yield (
        "attack",
        [
            *("attack", model, *edited, "--forget", forget, "--retain", retain),
            *(
                "--questions",
                questions,
                *steps,
                "--data",
                retain,
                "--kind",
                "benign",
                *out("attack"),
            ),
        ],
    )
    yield (
        "eval-kl",
        [
            *("eval", "kl", model, *edited, "--prompts", forget),
            *("--max-new-tokens", "4", *out("eval-kl")),
        ],
    )
    yield "eval-choice", ["eval", "choice", model, *edited, "--questions", questions, *out("ch")]
    yield (
        "eval-memorisation",
        [
            *("eval", "memorisation", model, *edited, "--members", forget, "--non-members", retain),
            *out("memorisation"),
        ],
    )
    yield "eval-quantisation", ["eval", "quantisation", model, *edited, *out("quantisation")]
    tofu = root / "tofu"
    tofu.mkdir()
    for part in ("forget01", "retain", "real_authors", "world_facts"):
        write_lines(tofu / f"{part}_perturbed.json", TOFU)
    yield (
        "eval-tofu",
        [
            *("eval", "tofu", model, *edited, "--data", str(tofu), "--split", "forget01"),
            *("--max-new-tokens", "4", "--retain-model", model, *out("eval-tofu")),
        ],
    )


def digest(root: Path, folder: Path, printed: str) -> str:
    """Of all tensors and all JSON in ``folder``, and of the JSON that was printed."""
    made = hashlib.sha256()

    def add(value: Any) -> None:
        made.update(json.dumps(plain(value), sort_keys=True).encode())

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if not volatile(k)}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return value.replace(str(root), "@") if isinstance(value, str) else value

    if printed.strip():
        add(json.loads(printed))
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        made.update(str(path.relative_to(folder)).encode())
        if path.suffix == ".safetensors":
            for name, tensor in sorted(load_file(path).items()):
                made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                made.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif path.suffix == ".json":
            add(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            for line in path.read_text(encoding="utf-8").splitlines():
                add(json.loads(line))
    return made.hexdigest()


def run(root: Path, name: str, arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([*arguments, *([] if name == "demo" else ["--json"])])
    if code != 0:
        raise SystemExit(f"{name}: exit code {code} from kfade {' '.join(arguments)}")
    folder = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else root / "-"
    return digest(root, folder, "" if name == "demo" else printed.getvalue())


def measure(demo: bool) -> dict[str, str]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        found = {name: run(root, name, arguments) for name, arguments in commands(root)}
        if demo:
            found["demo"] = run(root, "demo", ["demo", "--out", str(root / "demo")])
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="write the digests here")
    parser.add_argument("--compare", type=Path, help="compare with digests written before")
    parser.add_argument("--demo", action="store_true", help="run the demo too")
    options = parser.parse_args()
    found = measure(options.demo)
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.compare:
        before = json.loads(options.compare.read_text(encoding="utf-8"))
        moved = sorted(n for n in before.keys() | found.keys() if before.get(n) != found.get(n))
        print(f"{len(before)} runs compared, {len(moved)} differ: {', '.join(moved) or 'none'}")
        sys.exit(bool(moved))
