"""Converts the options of ``kfade baseline`` to a method, trained weights and training settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from kfade.baselines import methods
from kfade.baselines.elm import Guidance
from kfade.baselines.methods import Defaults, Method
from kfade.baselines.settings import Settings, steps_per_epoch
from kfade.baselines.weights import Dense, LowRank, Trainable
from kfade.data.sequences import continuation, open_tokens
from kfade.errors import InputError
from kfade.models.layers import find_targets
from kfade.models.lengths import model_window
from kfade.models.targets import Target
from kfade.runs.session import Loaded

METHODS = "ga, gd, kl-min, npo, npo-sam, simnpo, wga, satimp, undial, rmu, repselect, elm or soul"
LORA_ALPHA, LORA_DROPOUT = 16.0, 0.05


def builder_of(word: str, given: Mapping[str, Any]) -> Callable[[Loaded, int], Method]:
    """A function of (model, seed) that builds the method ``word`` with the loss options ``given``.

    Raises:
        InputError: there is no such method, or the method does not have an option.
    """

    def only(*names: str) -> dict[str, Any]:
        """The options, which must be among ``names``."""
        other = [name for name in given if name not in names]
        if other:
            raise InputError(
                f"--{other[0].replace('_', '-')} is not an option of {word}: leave it out"
            )
        return dict(given)

    def plain(method: Callable[..., Method]) -> Callable[[Loaded, int], Method]:
        """Of a method that needs no model; its arguments are its options."""
        own = only(*signature(method).parameters)
        return lambda loaded, seed: method(**own)

    match word:
        case "ga":
            return plain(methods.gradient_ascent)
        case "gd":
            return plain(methods.gradient_difference)
        case "kl-min":
            return plain(methods.kl_minimisation)
        case "npo":
            return plain(methods.npo)
        case "npo-sam":
            return plain(methods.npo_sam)
        case "simnpo":
            return plain(methods.simnpo)
        case "wga":
            return plain(methods.wga)
        case "satimp":
            return plain(methods.satimp)
        case "undial":
            return plain(methods.undial)
        case "soul":
            return plain(methods.soul)
        case "rmu":
            own = only("layer", "coefficient", "retain_weight")
            return lambda loaded, seed: methods.rmu(loaded.model, seed=seed, **own)
        case "repselect":
            own = only("components", "adapter_lr")
            return lambda loaded, seed: methods.repselect(loaded.model, **own)
        case "elm":
            own = only("concept", "eta", "retain_weight")
            if "concept" not in own:
                raise InputError(
                    "--concept is missing: describe what elm is to erase, as in 'Greek mythology'"
                )
            concept, eta = own.pop("concept"), own.pop("eta", Guidance.eta)
            return lambda loaded, seed: methods.elm(guidance(loaded, concept, eta, seed), **own)
    raise InputError(f"METHOD {word}: give {METHODS}")


def guidance(loaded: Loaded, concept: str, eta: float, seed: int) -> Guidance:
    """The prompts with which ELM guides the model, about ``concept``, as tokens."""
    tokenizer, window = loaded.tokenizer, model_window(loaded.model)
    longest = Guidance.fluent_tokens
    # Tokenized after a full stop, since it follows a text.
    turn = "\nBut enough of that; let us turn to something else altogether."
    bridge = continuation(tokenizer, ".", turn)

    def before(text: str) -> tuple[int, ...]:
        return tuple(open_tokens(tokenizer, text))

    return Guidance(
        expert=before(f"What follows was written by an expert on {concept}:\n"),
        novice=before(f"What follows was written by somebody who never heard of {concept}:\n"),
        bridge=tuple(itertools.compress(bridge.tokens, bridge.scored)),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        window=window,
        eta=eta,
        fluent_tokens=min(longest, window // 4) if window else longest,
        seed=seed,
    )


def trainable_of(method: Method, loaded: Loaded, given: Mapping[str, Any], seed: int) -> Trainable:
    """The weights to train: those in the options ``given``, else those of the method.

    Raises:
        InputError: nothing matches, a rank or dropout is out of range, or the method does not run a
            block.
    """
    model, pattern = loaded.model, given.get("target")
    rank, dropout = given.get("lora", method.defaults.lora), given.get("lora_dropout", LORA_DROPOUT)
    if rank < 0 or not 0 <= dropout < 1:
        raise InputError("--lora must be 0 or more, --lora-dropout 0 or more and below 1")
    if rank and method.defaults.selection:
        raise InputError(
            "--lora does not work with repselect, which changes the weights: leave it out"
        )
    layers = given.get("layers", None if pattern else method.defaults.layers)
    names = method.trains
    if layers or pattern:
        # Attention is included for low-rank changes and for a method's own layers. With --layers
        # alone, dense changes are those of kfade unlearn: feed-forward weights.
        wide = pattern is None and (rank > 0 or "layers" not in given)
        found = (
            methods.block_targets(model, layers)
            if wide
            else find_targets(model, layers=layers, pattern=pattern)
        )
        _refuse_unreached(method, found)
        names = tuple(target.name for target in found)
    if rank == 0:
        return Dense(model, names or [name for name, _ in model.named_parameters()])
    targets = methods.block_targets(model, None)
    own = [target for target in targets if names is None or target.name in names]
    alpha = given.get("lora_alpha", LORA_ALPHA)
    return LowRank(model, own, rank=rank, alpha=alpha, dropout=dropout, seed=seed)


def _refuse_unreached(method: Method, targets: Sequence[Target]) -> None:
    """Raises InputError for a target above the last block that the method runs."""
    for target in targets:
        if method.last_block is not None and target.block > method.last_block:
            raise InputError(
                f"{target.name} lies above block {method.last_block}, where rmu stops: give "
                "--layers up to that block"
            )


def settings_of(defaults: Defaults, given: Mapping[str, Any], sequences: int) -> Settings:
    """The training settings: the options ``given``, else those of the method's reference code.

    Raises:
        InputError: both steps and epochs are given, or a number is out of range.
    """
    batch = given.get("batch", defaults.batch)
    accumulate = given.get("accumulate", defaults.accumulate)
    if "steps" in given and "epochs" in given:
        raise InputError("give --steps or --epochs, not both")
    if min(batch, accumulate, given.get("epochs", 1)) <= 0:
        raise InputError("--batch, --accumulate and --epochs must be above 0")
    epoch = steps_per_epoch(sequences, batch, accumulate)
    steps = given.get("steps", None if "epochs" in given else defaults.steps)
    if steps is None:
        epochs = given.get("epochs", defaults.epochs)
        # A set smaller than a batch is one batch.
        steps = max(1, int(epochs * sequences) // (min(batch, sequences) * accumulate))
    warm_up = {"epoch": epoch, "tenth": max(1, steps // 10), "none": 0}[defaults.warm_up]
    return Settings(
        lr=given.get("lr", defaults.lr),
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        warm_up=given.get("warm_up", warm_up),
        decay=given.get("decay", defaults.decay),
        weight_decay=given.get("weight_decay", defaults.weight_decay),
        clip=given.get("clip", defaults.clip) or None,
        optimizer=defaults.optimizer,
        selection=defaults.selection,
        evaluate_every=given.get("evaluate_every", max(1, steps // 10)),
        max_kl=given.get("max_kl"),
    )
