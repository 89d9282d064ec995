"""kfade: make a language model unlearn with a few Gauss-Newton steps.

model, tokenizer = kfade.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
forget = kfade.encode(kfade.load_examples("forget.jsonl"), tokenizer, pack=False)
retain = kfade.encode(kfade.load_examples("retain.jsonl"), tokenizer, pack=False)
update = kfade.unlearn(model, forget=forget, retain=retain[8:], held_out=retain[:8],
                       size=kfade.StepSize(kl=0.02))
update.apply(model)
"""

from kfade.curvature.curvature import Curvature
from kfade.curvature.damping import Damping
from kfade.curvature.draws import sampled_labels, square_root_draw
from kfade.curvature.estimators import EKFAC, KFAC, Diagonal, Identity, fit_kfac
from kfade.data.batches import make_batches
from kfade.data.examples import load_examples
from kfade.data.sequences import encode
from kfade.errors import InputError
from kfade.method.objectives import cross_entropy, margin
from kfade.method.settings import Correction, Direction, Run
from kfade.method.size import StepSize
from kfade.method.unlearn import unlearn
from kfade.method.update import Update
from kfade.models.layers import find_targets
from kfade.models.lengths import length_class
from kfade.models.load import load_model

__all__ = [
    # data and models
    "load_model", "load_examples", "encode", "make_batches", "length_class",
    "find_targets",
    # curvature
    "EKFAC", "KFAC", "Diagonal", "Identity", "fit_kfac", "Curvature",
    "sampled_labels", "square_root_draw",
    # unlearning
    "unlearn", "Direction", "Damping", "StepSize", "Run", "Correction", "margin", "cross_entropy",
    "Update", "InputError",
]  # fmt: skip
