"""kfade in a notebook: one fit of the curvature, updates of three sizes."""

# %% [markdown]
# # kfade in a notebook
#
# Cells are marked by `# %%`: Jupyter (with jupytext), VS Code and PyCharm run them one by one.
# Set the model and the two files below. As a script:
# `python examples/notebook.py MODEL forget.jsonl retain.jsonl`.

# %% Model and data
import sys
from pathlib import Path
from tempfile import mkdtemp

import kfade

name, forget_file, retain_file = "MODEL", "forget.jsonl", "retain.jsonl"
if len(sys.argv) == 4 and sys.argv[1] != "-f":  # a script, not a notebook
    name, forget_file, retain_file = sys.argv[1:]
model, tokenizer = kfade.load_model(name)
forget = kfade.encode(kfade.load_examples(forget_file), tokenizer, pack=False)
retain = kfade.encode(kfade.load_examples(retain_file), tokenizer, pack=False)
held_out, fitted = retain[:4], retain[4:]

# %% [markdown]
# The fit of the curvature takes longest. It depends on the retain set alone, so one fit serves many
# runs.

# %% Fit
targets = kfade.find_targets(model)
batches = kfade.make_batches(fitted, device=targets[0].weight.device)
curvature = kfade.EKFAC().fit(model, batches, targets)
print(f"{len(targets)} weights, {sum(target.weight.numel() for target in targets):,} parameters")

# %% [markdown]
# How much is forgotten at how much change? One update for each KL on the held-out texts.

# %% Three sizes
updates = {}
for kl in (0.003, 0.01, 0.03):
    updates[kl] = kfade.unlearn(
        model,
        forget=forget,
        retain=fitted,
        held_out=held_out,
        size=kfade.StepSize(kl=kl),
        run=kfade.Run(targets=targets, curvature=curvature),
    )
    step = updates[kl].provenance["steps"][-1]
    print(
        f"retain KL {step['retain_kl']:.4f}: forget loss {step['forget_loss_before']:.2f} -> "
        f"{step['forget_loss_after']:.2f} nats per token"
    )

# %% [markdown]
# An update changes the model within a `with` block, or for good by `apply`. It can be saved and
# loaded.

# %% Use it
update = updates[0.01]
path = Path(mkdtemp()) / "update.safetensors"
update.save(path)
with kfade.Update.load(path).applied_to(model) as edited:
    beginning = tokenizer.decode(forget[0].tokens[:8])
    prompt = tokenizer(beginning, return_tensors="pt")
    answer = edited.generate(**prompt.to(edited.device), max_new_tokens=8, do_sample=False)
    print("edited model:", tokenizer.decode(answer[0]))
