"""One measurement of one library in a process of its own: prints one line of JSON.

    python benchmarks/peers/worker.py --peer kronfluence --job ekfac --dtype float32 \
        --sequences 16 --length 512 --batch 1 --model FOLDER --tokens FILE.safetensors --threads 2

FILE holds ``tokens`` [S, T] int64, of which the first ``--sequences`` rows, cut to ``--length``,
are used. Before the clock starts, A and S of one batch are computed and dropped.

``seconds`` and ``peak_bytes`` are by stage; ``total`` is the whole job. Peak is the largest
resident size of the process within the stage (all of it: model, libraries and results), beside
``rss_after_load``; on a GPU it is the largest size of PyTorch's tensors there. kfade's covariance
job runs its K-FAC fit: look at the stage.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peer import Settings
from peers import JOBS, PEERS
from safetensors.torch import load_file

from kfade.models.load import DTYPES
from kfade.runtime.provenance import version_of
from kfade.runtime.stages import Clock, stage, timing

PACKAGES = {"curvlinops": "curvlinops-for-pytorch"}


def main() -> None:
    arguments = parse()
    with contextlib.redirect_stdout(sys.stderr):  # the libraries' own talk
        report = measured(arguments)
    print(json.dumps(report))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is printed: the measurement, or ``cannot`` with the reason."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    settings = Settings(
        dtype=arguments.dtype,
        batch=arguments.batch,
        eigh=arguments.eigh,
        iterative=arguments.iterative,
        low_precision=arguments.low_precision,
        layers=arguments.layers,
        device=arguments.device,
        recompute=arguments.recompute,
    )
    report: dict[str, Any] = {
        "peer": arguments.peer,
        "version": version_of(PACKAGES.get(arguments.peer, arguments.peer)),
        "job": arguments.job,
    }
    peer = PEERS[arguments.peer](arguments.model, settings)
    report["settings"] = {**peer.described(), "threads": arguments.threads}
    reason = peer.cannot(arguments.job)
    if reason is not None:
        return {**report, "cannot": reason}
    tokens_ST = load_file(arguments.tokens)["tokens"][: arguments.sequences, : arguments.length]
    wanted = (arguments.sequences, arguments.length)
    if tokens_ST.shape != wanted:
        raise SystemExit(f"{arguments.tokens}: {tuple(tokens_ST.shape)} tokens, not {wanted}")
    after_load = resident_bytes()
    peer.covariance(tokens_ST[: arguments.batch])
    peer.result = None
    gc.collect()
    clock = Clock()
    with timing(clock), stage("total"):
        getattr(peer, arguments.job)(tokens_ST)
    report["seconds"] = clock.seconds
    report["tokens"] = tokens_ST[:, 1:].numel()
    report["peak_bytes"] = clock.peak_bytes
    report["rss_after_load"] = after_load
    return report


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--peer", choices=PEERS, required=True)
    options.add_argument("--job", choices=JOBS, required=True)
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--tokens", type=Path, required=True)
    options.add_argument("--sequences", type=int, required=True)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--dtype", choices=DTYPES, default="float32")
    options.add_argument("--eigh", choices=("float32", "float64"), default="float32")
    options.add_argument("--iterative", action="store_true")
    options.add_argument("--low-precision", action="store_true")
    options.add_argument("--recompute", action="store_true")
    options.add_argument("--layers")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


def resident_bytes() -> int:
    """Resident size of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
