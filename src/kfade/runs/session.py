"""Loads the model and the data of a configuration, and finds the weights to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch import nn

from kfade.data.examples import Example, load_examples, split_holdout
from kfade.data.sequences import TokenSequence, encode, packed_length
from kfade.errors import InputError
from kfade.method.update import OTHER, ROUNDED, Update
from kfade.models.head import body_of
from kfade.models.interface import check_readable
from kfade.models.layers import ALL, NONE, choose_targets, decoder_blocks, has_experts
from kfade.models.lengths import model_window
from kfade.models.load import default_device, load_model
from kfade.models.parts import Divide
from kfade.models.sources import Source
from kfade.models.targets import Target
from kfade.models.weights import parameter_names, parameter_of
from kfade.runs.choices import shares_inputs, top_of
from kfade.runs.config import EstimatorConfig, ModelConfig, RetainConfig
from kfade.runs.template import template_of, without_unused_date
from kfade.runtime import distributed, progress
from kfade.runtime.counts import counted, rounded
from kfade.runtime.sides import check_entries
from kfade.runtime.stages import stage

DataSettings = TypeVar("DataSettings", bound=RetainConfig)


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and the weights to change."""

    model: nn.Module
    tokenizer: Any
    targets: list[Target]


def load(config: ModelConfig, fit: EstimatorConfig, *, shard: bool = False) -> Loaded:
    """Load the model and find its targets, before any data are read.

    Args:
        shard: whether to shard the model's blocks over the processes.

    Raises:
        InputError: the model cannot be loaded, nothing matches the targets, ``shard`` is set with
            one process, or the processes cannot divide the matrices of experts evenly.
    """
    divide, wanted = division(config, shard), selection(fit)
    with stage("load"):
        model, tokenizer = open_model(config, divide=divide)
        chosen = choose_targets(model, **wanted)
        if shard:
            check_divides(model, chosen.targets, distributed.count())
        if not any(target.is_routed for target in chosen.targets):
            _refuse_options_of_experts(fit)
    count = sum(target.shape[0] * target.shape[1] for target in chosen.targets)
    progress.say(f"{counted(len(chosen.targets), 'weight')} targeted, {rounded(count)} parameters")
    if chosen.summary:
        progress.say(chosen.summary)
    return Loaded(model, tokenizer, chosen.targets)


def _refuse_options_of_experts(fit: EstimatorConfig) -> None:
    """Raises InputError where an option is about routed experts, none of which is a target."""
    options = {
        f"--experts {fit.experts}": fit.experts not in (None, ALL, NONE),
        f"--expert-inputs {fit.expert_inputs}": shares_inputs(fit.expert_inputs),
    }
    for option, is_given in options.items():
        if is_given:
            raise InputError(
                f"{option}: no weight that is to be changed belongs to a routed expert; leave it "
                "out, or give other --layers or --target"
            )


def selection(fit: EstimatorConfig) -> dict[str, Any]:
    """The weights to change, as ``find_targets`` takes them."""
    return {
        "layers": fit.layers,
        "pattern": fit.target,
        "joint_bias": fit.joint_bias,
        "shared_inputs": shares_inputs(fit.expert_inputs),
        "experts": ALL if fit.experts is None or top_of(fit.experts) else fit.experts,
    }


def open_model(
    config: ModelConfig, *, needs_tokenizer: bool = True, divide: Divide | None = None
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of the configuration; ``divide``: see ``load_model``."""
    return load_model(
        config.required(),
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        tokenizer=config.tokenizer,
        needs_tokenizer=needs_tokenizer,
        divide=divide,
    )


def division(config: ModelConfig, shard: bool) -> Divide | None:
    """What shards the configuration's model over the processes, for :func:`open_model`.

    Raises:
        InputError: ``shard`` is set with one process.
    """
    if shard and distributed.count() == 1:
        raise InputError(
            "--shard: there is one process; start with torchrun --nproc-per-node N -m kfade ..., "
            "or leave --shard out"
        )
    return partial(_divide, config.device or default_device()) if shard else None


def check_divides(model: nn.Module, targets: Sequence[Target], processes: int) -> None:
    """Raises InputError where processes cannot divide each expert among ``targets`` evenly.

    Args:
        model: sharded, or still to be.
    """
    whole = dict(model.named_parameters())
    names = parameter_names(target for target in targets if target.is_routed)
    for name in dict.fromkeys(map(parameter_of, names)):
        check_entries(whole[name].shape, processes)


def refuse_sharded_export(shard: bool) -> None:
    """Raises InputError where a model that is to be exported is to be sharded."""
    if shard:
        raise InputError(
            "--export-model does not work with --shard: leave it out, and add the update to the "
            "model with kfade apply"
        )


def refuse_sharded_experts(model: nn.Module) -> None:
    """Raises InputError where a sharded model, whose weights are to be trained, has experts.

    A process sums the gradients of a block with the others only for weights that its own tokens
    reach.
    """
    if distributed.is_sharded(model) and has_experts(model):
        raise InputError(
            "--shard does not train the weights of a mixture of experts, since the tokens of each "
            "process reach other experts: leave it out (kfade baseline --lora works with it)"
        )


def _divide(device: str, model: nn.Module) -> None:
    distributed.shard(body_of(model), decoder_blocks(model)[1], device)


def source_of(config: ModelConfig) -> Source:
    """The source of the configuration's model."""
    return Source(config.model, config.revision, config.tokenizer)


def notes_on_base(
    update: Update, base: str, done: str, revision: str | None, tokenizer: str | None
) -> list[str]:
    """Notes for the user about differences between this model and the one of the update.

    Args:
        base: the result of :meth:`Update.compare_base`.
        done: the use of the update, as in "applied".
    """
    notes = []
    if base == ROUNDED:
        notes.append(
            "note: the update was computed on these weights in another dtype; they are equal "
            "after rounding to the dtype with fewer bits"
        )
    elif base == OTHER:
        notes.append(
            f"note: these are not the weights that the update was computed on; {done} as on a "
            "fine-tuned descendant"
        )
    settings = update.provenance.get("config", {}).get("model", {})
    for option, given in (("revision", revision), ("tokenizer", tokenizer)):
        recorded = settings.get(option) if isinstance(settings, dict) else None
        if recorded != given and recorded is not None:
            used = f"with --{option} {given}" if given is not None else f"without --{option}"
            notes.append(f"note: the update was computed with --{option} {recorded}; {done} {used}")
    return notes


def read_retain(config: RetainConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """(examples to fit on, held-out examples) of the retain set."""
    examples = read_source(config.retain, "--retain")
    if len(examples) < 2:
        raise InputError(
            f"{config.retain}: only one example; give at least two, so that one can be held out"
        )
    count = config.holdout
    if count is None:
        count = min(64, max(1, len(examples) // 10))
    if not 1 <= count < len(examples):
        raise InputError(f"--holdout {count}: give 1 to {len(examples) - 1} of the examples")
    return split_holdout(examples, count, seed)


def read_source(source: str | None, option: str) -> list[Example]:
    """The examples of a source; ``option`` is its option, for the error if it is missing."""
    if source is None:
        raise InputError(f"{option} is missing: give a JSONL file or hf:NAME[:CONFIG][:SPLIT]")
    return load_examples(source)


def say_sets(
    sets: Mapping[str, Sequence[TokenSequence]],
    examples: Sequence[Sequence[Example]],
    config: RetainConfig,
) -> None:
    """Show how many texts each set has, in how many sequences, and whether they are packed.

    Args:
        examples: those of each set, in the same order.
    """
    said = []
    for (name, sequences), texts in zip(sets.items(), examples, strict=True):
        packed = config.pack and any(example.text is not None for example in texts)
        count = f"{counted(len(texts), 'text')} in {counted(len(sequences), 'sequence')}"
        said.append(f"{name}: {count}{' (packed)' if packed else ''}")
    progress.say("; ".join(said))


def complete_data(config: DataSettings, loaded: Loaded) -> DataSettings:
    """The data settings, completed for a model.

    The length of packed sequences is set, and a template date that is not used is removed.
    """
    length = config.sequence_length
    if length is None:
        length = packed_length(None, model_window(loaded.model))
    return without_unused_date(replace(config, sequence_length=length), loaded.tokenizer)


def to_tokens(
    examples: Sequence[Example], loaded: Loaded, config: RetainConfig
) -> list[TokenSequence]:
    """The examples as token sequences, by the data settings."""
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
