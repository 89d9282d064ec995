"""Unlearn in ten lines, look at what happened, and undo it.

    python examples/quickstart.py MODEL forget.jsonl retain.jsonl

MODEL is a hub id, a folder or a GGUF file. The data are JSON lines of the forms in docs/data.md.
The same code runs on a large model on a GPU.
"""

import sys

import kfade


def main(name: str, forget_file: str, retain_file: str) -> kfade.Update:
    """Forget the texts of one file, keep those of the other; returns the update."""
    model, tokenizer = kfade.load_model(name)
    forget = kfade.encode(kfade.load_examples(forget_file), tokenizer, pack=False)
    retain = kfade.encode(kfade.load_examples(retain_file), tokenizer, pack=False)
    held_out, fitted = retain[:4], retain[4:]
    update = kfade.unlearn(
        model,
        forget=forget,
        retain=fitted,
        held_out=held_out,
        size=kfade.StepSize(kl=0.01),  # nats per token on the held-out texts
    )
    step = update.provenance["steps"][-1]
    print(f"forget loss {step['forget_loss_before']:.2f} -> {step['forget_loss_after']:.2f}")
    print(f"retain KL {step['retain_kl']:.4f} nats per token")

    with update.applied_to(model) as edited:  # only inside the block
        beginning = tokenizer.decode(forget[0].tokens[:8])
        prompt = tokenizer(beginning, return_tensors="pt")
        answer = edited.generate(**prompt.to(edited.device), max_new_tokens=8, do_sample=False)
        print("edited model:", tokenizer.decode(answer[0]))
    return update


if __name__ == "__main__":
    main(*sys.argv[1:])
