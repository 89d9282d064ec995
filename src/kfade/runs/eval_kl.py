"""Evaluation of specificity: KL(base ‖ edited) on the base model's own benign completions."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from kfade.data.batches import Batch
from kfade.data.sequences import digest_sequences
from kfade.errors import InputError
from kfade.evaluate.completions import (
    Prompt,
    complete,
    completed,
    encode_prompts,
    read_prompts,
)
from kfade.evaluate.divergence import (
    GROUP_TOKENS,
    Outputs,
    divergences,
    grouped,
    outputs,
    rounded,
    summarise_divergence,
    token_strings,
)
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.log import digest, read_log
from kfade.models.lengths import batches_for, model_window
from kfade.models.load import load_skeleton, load_tokenizer
from kfade.models.weights import digest_weights
from kfade.runs import options as o
from kfade.runs.config import ModelConfig, TemplateConfig
from kfade.runs.evaluation import (
    EvaluatedModel,
    Evaluation,
    EvaluationRequest,
    Subject,
    evaluation,
    load_evaluated,
    settings_of,
)
from kfade.runs.template import rendering_of
from kfade.runtime import distributed
from kfade.runtime.files import writing
from kfade.runtime.stages import stage

COMPLETIONS = "completions.jsonl"
MAX_NEW_TOKENS = 256


@o.settings(o.DATA)
@dataclass(frozen=True, kw_only=True)
class KlRequest(EvaluationRequest):
    """The base model, and the edited one: by an update, by rounding, or another model."""

    prompts: str
    """Benign instructions: JSONL of {instruction, input}, {prompt}, {question} or {messages}, or
    hf:NAME[:CONFIG][:SPLIT]."""
    edited: Annotated[str | None, Parameter(group=o.EVALUATED)] = None
    """Compare this model with MODEL, instead of --update."""
    completions: Path | None = None
    """Folder in which MODEL's completions are kept for further runs; it is created if necessary.
    Unset: they are kept in --out only."""
    max_new_tokens: Annotated[int, o.at_least(1)] = MAX_NEW_TOKENS
    """Maximum length of a completion, in tokens."""
    rendering: TemplateConfig = field(default_factory=TemplateConfig)
    """How conversations are rendered."""
    seed: Annotated[int, Parameter(group=o.RUN)] = 0
    """Random seed of the bootstrap intervals."""


def evaluate_kl(request: KlRequest, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Mean KL(base ‖ edited) on the base model's completions of instructions, in nats per token.

    If the edited model is another one, the two are in memory one after the other.

    Raises:
        InputError: no edited model is given, or a setting or a file is wrong.
    """
    subject, edited = request.subject, request.edited
    if (subject.update is None) == (edited is None) and not (subject.quantise and edited is None):
        raise InputError(
            "the edited model is missing or given twice: give --update, --edited, or --quantise "
            "alone"
        )
    settings = settings_of(request)
    how: dict[str, Any] = {
        "template": rendering_of(request.rendering, settings, out, resume=resume),
        "max_new_tokens": request.max_new_tokens,
    }
    examples = read_prompts(request.prompts, request.limit)
    with evaluation("kl", out, resume, settings) as run:
        own = replace(subject, quantise=None) if edited else subject
        base = run.load(own, shard=request.shard)
        if edited:
            _check_vocabularies(base, replace(subject.model, model=edited))
        window = model_window(base.model)
        prompts = encode_prompts(examples, base.tokenizer, window=window, **how)
        digests = {"base_sha256": digest_weights(base.model)}
        folder = request.completions or run.folder.state
        answers = _completions(base, prompts, folder, digests["base_sha256"], request)
        texts = [completed(p, a["tokens"]) for p, a in zip(prompts, answers, strict=True)]
        batches = batches_for(base.model, texts, request.batch_tokens)
        groups = grouped(batches, GROUP_TOKENS * distributed.count())
        digests["completions_sha256"] = digest_sequences(texts)
        evaluated, tokenizer = base, base.tokenizer
        if not edited:
            reference = _in_memory(base, groups)
        else:
            key = f"{digest(list(digests.values()))[:16]}-{request.batch_tokens}"
            reference = _streamed(base, groups, run, key)
            del base, evaluated
            _free_memory()
            other = replace(subject.model, model=edited, revision=None)
            other_subject = Subject(other, quantise=subject.quantise)
            evaluated = load_evaluated(other_subject, shard=request.shard)
        with evaluated.edited() as changed:
            digests["edited_sha256"] = digest_weights(changed)
        with run.items(**digests) as log:
            _measure(log, evaluated, groups, reference, prompts, answers, tokenizer)
            if request.completions is None:
                run.folder.publish(COMPLETIONS)
            figures = summarise_divergence(log.items, seed=request.seed)
            run.finish(log, {**figures, "max_new_tokens": request.max_new_tokens}, **digests)
    return run.result


def _completions(
    base: EvaluatedModel,
    prompts: Sequence[Prompt],
    folder: Path,
    weights: str,
    request: KlRequest,
) -> list[dict[str, Any]]:
    """Completions of all prompts: read from ``folder`` if there, else generated and kept there."""
    header = {
        "benchmark": "completions",
        "weights_sha256": weights,
        "prompts_sha256": digest([prompt.tokens for prompt in prompts]),
        "max_new_tokens": request.max_new_tokens,
        "decoding": "greedy",
    }
    path = folder / COMPLETIONS
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        found = read_log(path, partial=True)
        if found.header != {"format": found.header["format"], **header}:
            raise InputError(
                f"{path}: completions of another model, of other prompts or of another length; "
                "give another --completions, or remove the file"
            )
        if found.aggregate is not None:
            return [found.items[str(i)] for i in range(len(prompts))]
    with stage("completions"), ItemLog(path, header) as log:
        decoding = Decoding(request.max_new_tokens, request.batch_tokens)
        complete(base.model, base.tokenizer, prompts, log, decoding)
        log.finish({"completions": len(prompts)})
        return [log.items[str(i)] for i in range(len(prompts))]


def _in_memory(base: EvaluatedModel, groups: Sequence[Sequence[Batch]]) -> Callable[[int], Outputs]:
    """A function that computes the base model's outputs on a group of batches.

    The outputs use a copy of the head, since an update may change the head itself.
    """
    head = copy.deepcopy(outputs(base.model, [], "base model").head)
    return lambda number: replace(outputs(base.model, groups[number], "base model"), head=head)


def _streamed(
    base: EvaluatedModel, groups: Sequence[Sequence[Batch]], run: Evaluation, key: str
) -> Callable[[int], Outputs]:
    """Write the base model's outputs to disk; returns a function that reads those on a group.

    Only the head stays in memory. Of several processes each writes the outputs on its own batches.
    Outputs that an interrupted run has written are used again if their ``key`` is the same, which
    stands for the model, the texts and the batches, and the number of processes is the same.
    """
    state = run.folder.state
    several = distributed.count() > 1
    own = f"-{distributed.rank()}-of-{distributed.count()}" if several else ""

    def name(number: int) -> str:
        return f"base-{key}-{number:05}{own}.safetensors"

    head = outputs(base.model, [], "base model").head
    with stage("base"):
        for number, batches in enumerate(groups):
            if distributed.any_of(not (state / name(number)).is_file()):
                computed = outputs(base.model, batches, "base model")
                run.folder.keep(name(number), computed.save, in_each=True)
    return lambda number: Outputs.load(state / name(number), head, groups[number])


def _check_vocabularies(base: EvaluatedModel, edited: ModelConfig) -> None:
    """Raises InputError if tokenizers or numbers of logits of the two models differ."""
    trusted = edited.trust_remote_code
    tokenizer = load_tokenizer(edited.model, trust_remote_code=trusted, tokenizer=edited.tokenizer)
    _check_vocabulary(edited.model, base.tokenizer.get_vocab(), tokenizer.get_vocab())
    skeleton = load_skeleton(edited.model, trust_remote_code=trusted)
    _check_vocabulary(edited.model, _outputs_of(base.model), _outputs_of(skeleton))


def _check_vocabulary(name: str, base: object, edited: object) -> None:
    if base != edited:
        raise InputError(
            f"--edited {name}: its vocabulary differs from MODEL's, so that their outputs cannot "
            "be compared token by token; give a model with the same tokenizer"
        )


def _outputs_of(model: Any) -> int:
    """Number of logits: the size of the vocabulary, with padding."""
    return model.get_output_embeddings().weight.shape[0]


def _measure(
    log: ItemLog,
    evaluated: EvaluatedModel,
    groups: Sequence[Sequence[Batch]],
    reference: Callable[[int], Outputs],
    prompts: Sequence[Prompt],
    answers: Sequence[Mapping[str, Any]],
    tokenizer: Any,
) -> None:
    with stage("kl"):
        done = {int(item) for item in log.items}
        for index, kl in divergences(groups, reference, evaluated.edited, done=done):
            tokens = answers[index]["tokens"]
            log.add(
                str(index),
                kl=kl.mean().item(),
                tokens=len(tokens),
                prompt=prompts[index].text,
                strings=token_strings(tokenizer, prompts[index].tokens[-1], tokens),
                token_kl=rounded(kl),
            )


def _free_memory() -> None:
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
