"""kfade and a baseline on the same data, each measured by the same code.

python examples/compare_methods.py MODEL forget.jsonl retain.jsonl prompts.jsonl OUT

The KL is measured on what the original model answers to the prompts: rows such as {"prompt"} or
{"instruction"} that have nothing to do with what is forgotten.
"""

import sys
from pathlib import Path

from kfade import runs


def main(name: str, forget: str, retain: str, prompts: str, out: str) -> Path:
    """Two updates, their KL on prompts, and one page with both; returns the page."""
    folder, model = Path(out), runs.ModelConfig(name)
    data = runs.DataConfig(forget=forget, retain=retain)
    ours = runs.RunConfig(model, data=data, size=runs.SizeConfig(kl=0.01))
    runs.unlearn(ours, folder / "kfade")
    npo = runs.BaselineRequest("npo", model, data=data, training=runs.TrainingConfig(lr=1e-4))
    runs.baseline(npo, folder / "npo")
    for method in ("kfade", "npo"):
        judged = runs.Subject(model, update=folder / method)
        request = runs.KlRequest(subject=judged, prompts=prompts, max_new_tokens=8)
        kl = runs.evaluate_kl(request, folder / f"{method}-kl")["kl_per_token"]
        print(f"{method}: KL {kl['value']:.2e} nats per token")
    runs.report([folder], folder / "report.html")
    return folder / "report.html"


if __name__ == "__main__":
    main(*sys.argv[1:])
