"""What runs share: the model and the data that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from kfade.data.examples import Example, load_examples, split_holdout
from kfade.data.sequences import TokenSequence, encode, packed_length
from kfade.errors import InputError
from kfade.method.update import OTHER, ROUNDED, Update
from kfade.models.interface import check_readable
from kfade.models.layers import choose_targets, decoder_blocks
from kfade.models.lengths import model_window
from kfade.models.load import default_device, load_model
from kfade.models.sources import Source
from kfade.models.targets import Target
from kfade.runs.config import BatchConfig, EstimatorConfig, FitRequest, ModelConfig, RetainConfig
from kfade.runs.template import template_of
from kfade.runtime import distributed, progress
from kfade.runtime.stages import stage

Batching = TypeVar("Batching", bound=BatchConfig)


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and the weights to change."""

    model: nn.Module
    tokenizer: Any
    targets: list[Target]


def load(config: ModelConfig, fit: EstimatorConfig, *, shard: bool = False) -> Loaded:
    """The model, and its targets, found before any data are read.

    Args:
        shard: the model's blocks are going to be spread over several processes.
    """
    if shard and distributed.count() == 1:
        raise InputError(
            "--shard: there is one process; start with torchrun --nproc-per-node N -m kfade fit or "
            "unlearn, or leave shard out"
        )
    with stage("load"):  # with all that is tried before data are read
        # A model to be spread may be larger than a device.
        model, tokenizer = open_model(replace(config, device="cpu") if shard else config)
        chosen = choose_targets(
            model, layers=fit.layers, pattern=fit.target, joint_bias=fit.joint_bias
        )
    count = sum(target.shape[0] * target.shape[1] for target in chosen.targets)
    progress.say(f"{len(chosen.targets)} weights targeted, {count / 1e6:.1f} M parameters")
    if chosen.summary:
        progress.say(chosen.summary)
    return Loaded(model, tokenizer, chosen.targets)


def open_model(config: ModelConfig, *, needs_tokenizer: bool = True) -> tuple[nn.Module, Any]:
    """(model, tokenizer) that the configuration names."""
    if not config.model:
        raise InputError("no MODEL: give a hub id, a local folder, a GGUF file, or a LoRA adapter")
    return load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        tokenizer=config.tokenizer,
        needs_tokenizer=needs_tokenizer,
    )


def source_of(config: ModelConfig) -> Source:
    """Where the configuration's model lies."""
    return Source(config.model, config.revision, config.tokenizer)


def notes_on_base(
    update: Update, base: str, done: str, revision: str | None, tokenizer: str | None
) -> list[str]:
    """What is to be said where an update is used.

    Args:
        base: what :meth:`Update.compare_base` found.
        done: what is done with the update, as in "applied".
    """
    notes = []
    if base == ROUNDED:
        notes.append(
            "note: the update was computed on these weights in another dtype; they are equal once "
            "rounded to the one of fewer bits"
        )
    elif base == OTHER:
        notes.append(
            f"note: these are not the weights that the update was computed on; {done} as on a "
            "fine-tuned descendant"
        )
    asked = update.provenance.get("config", {}).get("model", {})
    for option, given in (("revision", revision), ("tokenizer", tokenizer)):
        recorded = asked.get(option) if isinstance(asked, dict) else None
        if recorded != given and recorded is not None:
            used = f"with --{option} {given}" if given is not None else f"without --{option}"
            notes.append(f"note: the update was computed with --{option} {recorded}; {done} {used}")
    return notes


def spread(request: FitRequest, model: nn.Module) -> None:
    """Spread a model's blocks over the processes, on their devices, if it is asked for."""
    if not request.shard:
        return
    with stage("load"):
        distributed.shard(decoder_blocks(model)[1])
        model.to(request.model.device or default_device())


def read_retain(config: RetainConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """(fit, held out) retain examples."""
    examples = read_source(config.retain, "--retain")
    if len(examples) < 2:
        raise InputError(
            f"{config.retain}: one example only; give at least two, so that one can be held out"
        )
    count = config.holdout
    if count is None:
        count = min(64, max(1, len(examples) // 10))
    if not 1 <= count < len(examples):
        raise InputError(f"--holdout {count}: give 1 to {len(examples) - 1} of the examples")
    return split_holdout(examples, count, seed)


def read_source(source: str | None, option: str) -> list[Example]:
    """Examples of a source that has to be given."""
    if source is None:
        raise InputError(f"{option} is missing: give a JSONL file or hf:NAME[:CONFIG][:SPLIT]")
    return load_examples(source)


def with_length(config: Batching, loaded: Loaded) -> Batching:
    """The settings with the length of packed sequences in numbers, as this model has it."""
    if config.sequence_length is not None:
        return config
    return replace(config, sequence_length=packed_length(None, model_window(loaded.model)))


def to_tokens(
    examples: Sequence[Example], loaded: Loaded, config: RetainConfig
) -> list[TokenSequence]:
    """Token sequences as the data settings ask for."""
    length = config.sequence_length
    if (length is not None and length < 2) or config.batch_tokens < 1:
        raise InputError("--sequence-length must be 2 or more, --batch-tokens 1 or more")
    sequences = encode(
        examples,
        loaded.tokenizer,
        length=length,
        window=model_window(loaded.model),
        template=template_of(config),
        pack=config.pack,
        truncate=config.truncate,
        score_end=config.score_end,
    )
    check_readable(loaded.model, sequences)
    return sequences
