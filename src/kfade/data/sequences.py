"""Turn examples into token sequences with loss masks.

One rule for all that is scored, here and in the evaluations: the text is tokenised as a whole, as
the model would read it, and scored are the tokens that hold a character of what is to be scored. A
token that straddles the border between prompt and answer belongs to the answer. What a tokenizer
adds of its own, such as BOS, is never scored.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kfade.data.chat import ChatTemplate, Span
from kfade.data.examples import Example
from kfade.errors import InputError

DEFAULT_LENGTH = 512
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSequence:
    """Tokens and, for each, whether it is scored (the first never is).

    A sequence of n + 1 tokens has n positions: position t is scored on token t + 1.

    Raises:
        InputError: not one mark for each token, none that is scored, or the first is.
    """

    tokens: tuple[int, ...]
    scored: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.scored):
            raise InputError(
                f"a sequence of {len(self.tokens)} tokens with {len(self.scored)} marks of what is "
                "scored: give one for each token"
            )
        if not any(self.scored):
            raise InputError("a sequence without a scored token: leave it out")
        if self.scored[0]:
            raise InputError(
                "a sequence whose first token is scored: nothing before it predicts it; mark it "
                "False"
            )

    @property
    def live(self) -> int:
        """Live positions: up to the one whose next token is the last scored one."""
        return max(t for t, scored in enumerate(self.scored) if scored)

    @property
    def loss_tokens(self) -> int:
        """Number of scored tokens."""
        return sum(self.scored)


def packed_length(given: int | None, window: int | None) -> int:
    """Tokens of a packed sequence: as ``given``; else 512, or the model's window if it is shorter.

    Raises:
        InputError: what was given is over the window.
    """
    if given is None:
        return min(DEFAULT_LENGTH, window or DEFAULT_LENGTH)
    if window and given > window:
        raise InputError(
            f"--sequence-length {given} is over the model's window of {window} tokens: lower it"
        )
    return given


def check_sequences(given: Sequence[Any], name: str) -> None:
    """Raises InputError where ``given``, called ``name``, holds something else, such as texts."""
    wrong = next((item for item in given if not isinstance(item, TokenSequence)), None)
    if wrong is not None:
        raise InputError(
            f"{name}: holds {type(wrong).__name__}, not token sequences; make them with "
            "kfade.encode(kfade.load_examples(path), tokenizer)"
        )


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    length: int | None = None,
    window: int | None = None,
    chat: bool | None = None,
    template: ChatTemplate | None = None,
    pack: bool = True,
    truncate: bool = False,
    score_end: bool = False,
) -> list[TokenSequence]:
    """Sequences of ``examples``, in their order, packed texts after the exchanges.

    Args:
        length: tokens of a packed sequence; texts are joined end to end, each closed by EOS
            unless its example says that it does not close. None: 512, or a shorter window.
        window: the model's longest input; longer exchanges are an error, or cut if ``truncate``.
        chat: use a chat template for exchanges; None: if there is one.
        template: how; the tokenizer's own template, told the present date, when None.
        pack: False keeps one text a sequence.
        score_end: score the EOS that closes a text, too. Forgetting would then unlearn to stop.
            The mark that ends an answer is scored always: an answer is what goes up to there.

    Raises:
        InputError: not examples; a sequence, or ``length``, is longer than the window; the chat
            template is missing or unusable; nothing is left to score.
    """
    template = template or ChatTemplate()
    chat = template.used_by(tokenizer, chat)
    limit = packed_length(length, window) if pack else DEFAULT_LENGTH
    sequences: list[TokenSequence] = []
    stream: list[tuple[int, bool]] = []
    cut: list[str | None] = []
    for example in examples:
        if not isinstance(example, Example):
            raise InputError(
                f"examples: hold {type(example).__name__}, not examples; read them with "
                "kfade.load_examples(path)"
            )
        if example.text is not None:
            closes = example.closes and (pack or score_end)
            tokens, scored = _text_tokens(example.text, tokenizer, closes, score_end)
            if pack:
                stream.extend(zip(tokens, scored, strict=True))
                continue
        elif chat:
            tokens, scored = _chat_tokens(example, tokenizer, template, cut)
        else:
            tokens, scored = _plain_tokens(example, tokenizer)
        sequences.append(_whole(example.where, tokens, scored, window, truncate))
    if any(cut):
        logger.warning(
            "in %d of %d answers the chat template drops some of what was written (first: %s): "
            "that part is not scored",
            len(cut) - cut.count(None),
            len(cut),
            next(filter(None, cut)),
        )
    for start in range(0, len(stream), limit):
        tokens, scored = (list(part) for part in zip(*stream[start : start + limit], strict=True))
        if any(scored[1:]):
            sequences.append(TokenSequence(tuple(tokens), (False, *scored[1:])))
    if examples and not sequences:
        raise InputError(
            f"{examples[0].where} and what follows: no token to score; the first token of a "
            "sequence is read and never scored: give longer texts"
        )
    return sequences


def encode_prompt(
    example: Example,
    tokenizer: Any,
    *,
    chat: bool | None = None,
    template: ChatTemplate | None = None,
) -> tuple[int, ...]:
    """Tokens of ``example``'s turns, all of them, up to where the next answer begins.

    Rendered as :func:`encode` renders the turns before an answer.

    Raises:
        InputError: the chat template is missing or refuses the turns, or nothing is left of them.
    """
    template = template or ChatTemplate()
    if template.used_by(tokenizer, chat):
        text = template.render(_messages(example), tokenizer, example.where, prompt=True)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
    else:
        tokens, _ = _plain_tokens(example, tokenizer)
    if not tokens:
        raise InputError(f"{example.where}: an empty prompt; remove the line or fill it")
    return tuple(tokens)


def continuation(
    tokenizer: Any, start: str, text: str, *, closed: bool = False, window: int | None = None
) -> TokenSequence:
    """``start`` and ``text`` tokenised as one, scored on ``text``; with EOS if ``closed``.

    The last ``window`` + 1 tokens are kept: the last is only scored, not read.
    """
    whole = start + text
    tokens, scored = _tokenised(whole, [(len(start), len(whole))], tokenizer)
    if closed and tokenizer.eos_token_id is not None:
        tokens, scored = [*tokens, tokenizer.eos_token_id], [*scored, True]
    if window is not None:
        tokens, scored = tokens[-window - 1 :], scored[-window - 1 :]
    return TokenSequence(tuple(tokens), (False, *scored[1:]))


def open_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on: with what the tokenizer puts before it, not behind it."""
    return _tokenised(text, [], tokenizer)[0]


def digest_sequences(sequences: Sequence[TokenSequence]) -> str:
    """SHA-256 over tokens and masks: says which data a fit or an update has seen."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(repr((sequence.tokens, sequence.scored)).encode())
    return digest.hexdigest()


def _whole(
    where: str, tokens: list[int], scored: list[bool], window: int | None, truncate: bool
) -> TokenSequence:
    """One example as a sequence of its own, within the window."""
    if window and len(tokens) > window:
        if not truncate:
            raise InputError(
                f"{where}: {len(tokens)} tokens, over the model's window of {window}; shorten it "
                "or pass --truncate"
            )
        tokens, scored = tokens[:window], scored[:window]
    if not any(scored[1:]):
        reason = " within the model's window" if window and len(tokens) == window else ""
        raise InputError(
            f"{where}: no token to score{reason}; the first token of a sequence is read and never "
            "scored"
        )
    return TokenSequence(tuple(tokens), (False, *scored[1:]))


def _tokenised(
    text: str, answers: Sequence[Span], tokenizer: Any, *, special: bool = True
) -> tuple[list[int], list[bool]]:
    """(tokens, scored) of a text that goes on; those with a character of ``answers`` are scored.

    ``special``: with what the tokenizer itself puts before a text. What it puts at the end is left
    out.
    """
    if not getattr(tokenizer, "is_fast", False):
        return _by_prefixes(text, answers, tokenizer, special)
    made = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    spans: list[Span | None] = []
    done = 0
    offsets, marks = made["offset_mapping"], made["special_tokens_mask"]
    for (start, end), marked in zip(offsets, marks, strict=True):
        if start == end and marked:
            spans.append(None)  # of no character: the tokenizer's own
            continue
        # Some tokenizers leave white space out of a token's offsets, to which one of nothing else
        # then has none: it reaches back to the token before it.
        spans.append((start if start < end else min(done, end), end))
        done = max(done, end)
    tokens = list(made["input_ids"])
    while len(spans) > 1 and spans[-1] is None:
        tokens.pop()
        spans.pop()
    own = [span is not None and _meets(span, answers) for span in spans]
    return tokens, own


def _meets(span: Span, answers: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in answers)


def _by_prefixes(
    text: str, answers: Sequence[Span], tokenizer: Any, special: bool
) -> tuple[list[int], list[bool]]:
    """:func:`_tokenised` for a tokenizer that cannot tell which characters a token holds.

    An answer begins at the first token that the text before it, tokenised alone, does not begin
    with, and ends with the last that the text up to its end shares with the whole, and the next if
    that holds some of it.
    """

    def tokens_of(part: str) -> list[int]:
        made = list(tokenizer(part, add_special_tokens=special).input_ids)
        closes = len(made) > 1 and made[-1] == tokenizer.eos_token_id
        return made[:-1] if special and closes else made

    def shared(part: str) -> tuple[int, bool]:
        alone = tokens_of(part)
        pairs = zip(alone, tokens, strict=False)
        count = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(tokens)))
        return count, count < len(alone)

    tokens = tokens_of(text)
    scored = [False] * len(tokens)
    for start, end in answers:
        first, _ = shared(text[:start])
        last, straddles = shared(text[:end])
        for t in range(first, min(last + straddles, len(tokens))):
            scored[t] = True
    return tokens, scored


def _close(tokens: list[int], scored: list[bool], tokenizer: Any, *, score: bool) -> None:
    """Exactly one EOS at the end, where the tokenizer has one; it is scored if ``score``."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return
    if tokens[-1:] != [eos]:
        tokens.append(eos)
        scored.append(score)
    scored[-1] = score


def _text_tokens(
    text: str, tokenizer: Any, closes: bool, score_end: bool
) -> tuple[list[int], list[bool]]:
    """A text, all of it scored but what the tokenizer adds, and the EOS that ``closes`` it."""
    tokens, scored = _tokenised(text, [(0, len(text))], tokenizer)
    bos = tokenizer.bos_token_id  # also where it was written into the text
    scored = [own and token != bos for token, own in zip(tokens, scored, strict=True)]
    if closes:
        _close(tokens, scored, tokenizer, score=score_end)
    return tokens, scored


def _plain_tokens(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Prompt and completion end to end as they are written; EOS closes an answer.

    A bare completion gets no EOS: a cloze such as "The capital of France is" | " Paris" need not
    be the end of a text, and forgetting would then unlearn to stop. The space that the plain form
    puts before an answer belongs to it, as tokenizers join a space to the word after it.
    """
    user_prefix, lead = example.plain_prefix
    tokens: list[int] = []
    scored: list[bool] = []
    text = ""
    answers: list[Span] = []

    def flush() -> None:
        nonlocal text, answers
        if text:
            made = _tokenised(text, answers, tokenizer, special=not tokens)
            tokens.extend(made[0])
            scored.extend(made[1])
        text, answers = "", []

    for number, (role, content) in enumerate(example.turns):
        if role == "user":
            text += user_prefix + content + lead.rstrip(" ")
        elif role != "assistant":
            text += content + "\n"
        else:
            start = len(text)
            text += lead[len(lead.rstrip(" ")) :] + content
            own = example.scores(number)
            answers += [(start, len(text))] if own else []
            if example.closes:
                flush()
                _close(tokens, scored, tokenizer, score=own)
    flush()
    return tokens, scored


def _chat_tokens(
    example: Example, tokenizer: Any, template: ChatTemplate, cut: list[str | None]
) -> tuple[list[int], list[bool]]:
    """Tokens of the rendered chat; scored is each answer as it was written, and its end.

    A last answer that the template closes by no mark of its own gets an EOS. ``cut`` gains an entry
    an answer: where it is, if the template leaves out some of it.
    """
    messages = _messages(example)
    while messages[-1]["role"] != "assistant":  # nobody answers it
        messages.pop()
    made = template.answers(messages, tokenizer, example.where, example.unscored)
    cut += [example.where if some else None for some in made.cut]
    tokens, scored = _tokenised(made.text, made.spans, tokenizer, special=False)
    if not made.closed:
        _close(tokens, scored, tokenizer, score=True)
    return tokens, scored


def _messages(example: Example) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in example.turns]
