"""A small mixture of experts and its dense twin, trained from scratch on WikiText and TOFU.

The mixture has experts in all blocks but the first. The dense model has the same shapes; its
feed-forward maps are as wide as the experts that the mixture runs for one token.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lab.forgetting import BUDGET
from lab.records import Record
from tofu_data import MEMORISED, OF_AUTHOR, SAMPLE
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import kfade
from kfade.data.examples import Example, parse_example
from kfade.data.sequences import TokenSequence
from kfade.method.measure import mean_objectives
from kfade.method.objectives import cross_entropy
from kfade.models.lengths import batches_for

END = "<|endoftext|>"
MIXTURE, DENSE = "mixture", "dense"


@dataclass(frozen=True)
class Sizes:
    """What decides the numbers. It is written beside them."""

    vocabulary: int = 4096
    width: int = 256
    blocks: int = 4
    experts: int = 8
    chosen: int = 2  # experts of a token
    inner: int = 256  # inner width of an expert
    balance: float = 0.01  # weight of the load-balancing loss
    text_tokens: int = 250_000  # of WikiText, read once
    text_length: int = 128  # tokens of a sequence of WikiText
    rate: float = 1e-3  # learning rate
    warm_up: int = 50  # steps over which it rises
    batch: int = 8  # sequences
    epochs: int = 18  # over the questions, at most
    unseen: int = 3  # authors that no model is trained on
    forget: int = 5  # authors to forget
    held_out: int = 3  # kept authors that the size of a step is measured on
    report: int = 6  # kept authors of the reported KL
    fit: int = 11  # kept authors that the curvature is fitted on
    seed: int = 0

    @property
    def roles(self) -> dict[str, int]:
        """Number of authors by role, in the order of the data set's last authors."""
        return {name: getattr(self, name) for name in ("unseen", *self.trained)}

    @property
    def trained(self) -> tuple[str, ...]:
        """Roles of the authors that models are trained on."""
        return ("fit", "held_out", "report", "forget")


def questions(folder: Path, sizes: Sizes) -> dict[str, list[Example]]:
    """TOFU's questions by the role of their authors."""
    lines = (folder / "tofu" / "full.json").read_text(encoding="utf-8").splitlines()
    examples = [parse_example(json.loads(line), "TOFU") for line in lines]
    found, first = {}, len(lines) - OF_AUTHOR * sum(sizes.roles.values())
    for role, authors in sizes.roles.items():
        found[role] = examples[first : first + OF_AUTHOR * authors]
        first += OF_AUTHOR * authors
    return found


def paragraphs(folder: Path, name: str) -> list[str]:
    """The long paragraphs of a file of WikiText."""
    lines = (folder / "wikitext" / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if len(line) > 200]


def train_tokenizer(folder: Path, sizes: Sizes) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training data."""
    asked = questions(folder, sizes)
    texts = [text for role in sizes.trained for e in asked[role] for _, text in e.turns]
    texts += paragraphs(folder, "wikitext-103-train-head.tokens.txt")
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, sizes.vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END, pad_token=END)


def new_model(kind: str, sizes: Sizes) -> Any:
    """A model with random weights."""
    active = sizes.chosen * sizes.inner
    shapes = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": sizes.width // 4,
        "intermediate_size": active,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(sizes.seed)
    if kind == DENSE:
        return Qwen3ForCausalLM(Qwen3Config(**shapes))
    routing = {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.chosen,
        "moe_intermediate_size": sizes.inner,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shapes, **routing))


def train(kind: str, data: Path, sizes: Sizes, folder: Path) -> Record:
    """Train a model on WikiText, then on the questions until it knows their answers; save it."""
    tokenizer = train_tokenizer(data, sizes)
    model = new_model(kind, sizes)
    asked = questions(data, sizes)
    text = [
        Example("wikitext", text=paragraph)
        for paragraph in paragraphs(data, "wikitext-103-train-head.tokens.txt")
    ]
    packed = kfade.encode(text, tokenizer, length=sizes.text_length)
    packed = packed[: sizes.text_tokens // sizes.text_length]
    answers = kfade.encode([e for role in sizes.trained for e in asked[role]], tokenizer)
    sample = batches_for(model, answers[::SAMPLE], BUDGET)

    def answer_loss() -> float:
        return mean_objectives(model.eval(), sample, [cross_entropy])[0]

    begun = time.perf_counter()
    [text_loss] = _epochs(model, packed, sizes, 1, lambda mean: False)
    history = _epochs(
        model, answers, sizes, sizes.epochs, lambda mean: mean < 0.5 and answer_loss() <= MEMORISED
    )
    seconds = time.perf_counter() - begun
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": sum(s.loss_tokens for s in packed),
        "text_loss": text_loss,
        "answer_tokens": sum(s.loss_tokens for s in answers),
        "epochs": history,
        "answer_loss": answer_loss(),
        "train_seconds": seconds,
    }


def _epochs(
    model: Any, sequences: Sequence[TokenSequence], sizes: Sizes, most: int, enough: Any
) -> list[float]:
    """Train by AdamW until ``enough`` of an epoch's mean loss is true; the mean of each epoch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=sizes.rate, weight_decay=0.0, fused=True)
    order, step, means = list(range(len(sequences))), 0, []
    draws = random.Random(sizes.seed)
    routing = hasattr(model.config, "num_experts")
    while len(means) < most and not (means and enough(means[-1])):
        model.train().requires_grad_(True)
        draws.shuffle(order)
        total, count = 0.0, 0
        for first in range(0, len(order), sizes.batch):
            drawn = [sequences[i] for i in order[first : first + sizes.batch]]
            [batch] = batches_for(model, drawn, 10**9)
            out = model(
                input_ids=batch.input_BT,
                attention_mask=batch.live_BT.long(),
                use_cache=False,
                **({"output_router_logits": True} if routing else {}),
            )
            target_N = batch.at_loss(batch.target_BT)
            loss = torch.nn.functional.cross_entropy(batch.at_loss(out.logits), target_N)
            total, count = total + loss.item(), count + 1
            if routing:
                loss = loss + sizes.balance * out.aux_loss
            step += 1
            optimiser.param_groups[0]["lr"] = sizes.rate * min(1.0, step / sizes.warm_up)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        means.append(total / count)
        print(f"  epoch {len(means)}: loss {means[-1]:.3f}", flush=True)
    return means
