"""A forgetting objective of your own, beside the two that kfade has.

python examples/own_objective.py MODEL forget.jsonl retain.jsonl
"""

import math
import sys

from torch import Tensor

import kfade


def below_chance(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """min(−log p_y, log V): no gradient once p_y is below 1/V."""
    loss_N = kfade.cross_entropy(logits_NV, target_N)
    return loss_N.clamp(max=math.log(logits_NV.shape[1]))


def main(name: str, forget_file: str, retain_file: str) -> dict[str, float]:
    """The forget loss after a step of equal KL, by objective."""
    model, tokenizer = kfade.load_model(name)
    forget = kfade.encode(kfade.load_examples(forget_file), tokenizer, pack=False)
    retain = kfade.encode(kfade.load_examples(retain_file), tokenizer, pack=False)
    found = {}
    for objective in (kfade.margin, kfade.cross_entropy, below_chance):
        update = kfade.unlearn(
            model,
            forget=forget,
            retain=retain[4:],
            held_out=retain[:4],
            direction=kfade.Direction(objective=objective, bound=0),
            size=kfade.StepSize(kl=0.01),
        )
        found[objective.__name__] = update.provenance["steps"][-1]["forget_loss_after"]
        print(f"{objective.__name__}: forget loss {found[objective.__name__]:.3f} nats per token")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
