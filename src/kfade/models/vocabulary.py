"""Whether a tokenizer has a vocabulary, and one that the model has embeddings for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from typing import Any

from kfade.errors import InputError
from kfade.models.faults import listed, no_tokenizer


def fit_vocabulary(name: str, tokenizer: Any, rows: int, *, converted: bool = False) -> None:
    """Make sure that no text is encoded to a token that has no row in the embedding.

    Such tokens are removed if the tokenizer's class, or transformers' conversion of a GGUF file
    (``converted``), added them: the model does not know them. Marks of other modalities, which a
    processor puts in the place of an image or a sound, stay: texts do not contain them.

    Raises:
        InputError: there is another such token, and its own text is encoded to it.
    """
    added = _defaults(type(tokenizer))
    if converted:
        added |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    _remove_tokens(tokenizer, {t for t, i in tokenizer.get_vocab().items() if i >= rows} & added)
    marks = _modality_marks(tokenizer)
    beyond = {
        token: number
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= rows and token not in marks and _produced(tokenizer, token, number)
    }
    if not beyond:
        return
    some = [f"{token!r} is {number}" for token, number in beyond.items()]
    verb = "tokens lie" if len(beyond) > 1 else "token lies"
    raise InputError(
        f"{name}: the embedding has {rows} rows, but {len(beyond)} {verb} beyond it "
        f"({listed(some)}); give the model's own tokenizer with --tokenizer, or enlarge the "
        "model's embedding"
    )


def _remove_tokens(tokenizer: Any, tokens: Collection[str]) -> None:
    """Remove added tokens from a tokenizer of the package tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokens or backend is None:
        return
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in tokens]
    tokenizer._tokenizer = type(backend).from_str(json.dumps(state))
    for key, token in dict(tokenizer.special_tokens_map).items():
        if token in tokens:
            setattr(tokenizer, key, None)


def _produced(tokenizer: Any, token: str, number: int) -> bool:
    """Whether a token's own text is encoded to it."""
    texts = (token, tokenizer.convert_tokens_to_string([token]))
    return any(number in tokenizer.encode(text, add_special_tokens=False) for text in texts)


def _modality_marks(tokenizer: Any) -> set[str]:
    """Special tokens that stand for an image, a sound or a video."""
    named = {**getattr(tokenizer, "special_tokens_map", {})}
    named.update(getattr(tokenizer, "model_specific_special_tokens", None) or {})
    kinds = ("image", "audio", "video")
    of_kinds = [token for key, token in named.items() if any(kind in key for kind in kinds)]
    return {token for token in of_kinds if isinstance(token, str)}


def _defaults(kind: type) -> set[str]:
    """Special tokens that a tokenizer's class adds where no file names any."""
    parameters = inspect.signature(kind).parameters.values()
    return {str(p.default) for p in parameters if p.name.endswith("_token")}


def check_has_vocabulary(name: str, tokenizer: Any) -> None:
    """Raises InputError where a tokenizer has special tokens only: it was made without a file."""
    vocabulary = set(tokenizer.get_vocab())
    if vocabulary <= set(tokenizer.all_special_tokens):
        raise InputError(f"{name}: {no_tokenizer()}")
