"""Turn examples into token sequences with loss masks.

Training and evaluations share one rule. The text is tokenised as a whole, as the model would read
it, and each token that holds a character of an answer is scored. So a token that straddles the
border between prompt and answer is scored. Tokens that the tokenizer adds, such as BOS, are not.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kfade.data.chat import ChatTemplate, Span, common_length
from kfade.data.examples import Example
from kfade.errors import InputError

DEFAULT_LENGTH = 512
LEAST_PROMPT = 4  # tokens
Marked = list[tuple[int, bool]]
"""Tokens, each with whether it is scored."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSequence:
    """Tokens and, for each, whether it is scored (the first never is).

    A sequence of n + 1 tokens has n positions: position t is scored on token t + 1.

    Raises:
        InputError: not one mark for each token, no token is scored, or the first one is.
    """

    tokens: tuple[int, ...]
    scored: tuple[bool, ...]
    answer: int | None = None
    """Number of the first token of the answer; that of the first scored one when None."""

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
        """Number of positions up to the one whose next token is the last scored one."""
        return max(t for t, scored in enumerate(self.scored) if scored)

    @property
    def prompt(self) -> int:
        """Number of positions of the prompt: those before the one that predicts the answer's first
        token. 0 where a prompt has fewer than ``LEAST_PROMPT`` tokens, which may be special ones
        that a tokenizer puts before any text."""
        answer = self.scored.index(True) if self.answer is None else self.answer
        return answer - 1 if answer >= LEAST_PROMPT else 0

    @property
    def loss_tokens(self) -> int:
        """Number of scored tokens."""
        return sum(self.scored)


def packed_length(given: int | None, window: int | None) -> int:
    """Tokens of a packed sequence: ``given``, or if None 512, or the model's window if shorter.

    Raises:
        InputError: ``given`` is longer than the window.
    """
    if given is None:
        return min(DEFAULT_LENGTH, window or DEFAULT_LENGTH)
    if window and given > window:
        raise InputError(
            f"--sequence-length {given} is over the model's window of {window} tokens: lower it"
        )
    return given


def check_sequences(given: Sequence[Any], name: str) -> None:
    """Raises InputError where the argument ``name`` holds anything but token sequences."""
    for item in given:
        if not isinstance(item, TokenSequence):
            raise InputError(
                f"{name}: holds {type(item).__name__}, not token sequences; make them with "
                "kfade.encode(kfade.load_examples(path), tokenizer)"
            )


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    length: int | None = None,
    window: int | None = None,
    template: ChatTemplate | None = None,
    pack: bool = True,
    truncate: bool = False,
    score_end: bool = False,
) -> list[TokenSequence]:
    """Token sequences of ``examples`` in their order, packed texts after the exchanges.

    Args:
        length: tokens of a packed sequence. Texts are joined end to end, each closed by EOS unless
            its example says that it does not close. None: 512, or the window if it is shorter.
        window: the model's longest input; longer exchanges are an error, or cut if ``truncate``.
            None: texts of any length; a model then refuses those over its window.
        template: how conversations are rendered; None: by the tokenizer's own template, which is
            told the present date, if there is one.
        pack: False keeps one text a sequence.
        score_end: score the EOS that closes a text, too. Forgetting would then unlearn to stop. The
            end of an answer is always scored: it is part of the answer.

    Raises:
        InputError: not examples; a sequence, or ``length``, is longer than the window; the chat
            template is missing or unusable; nothing is left to score.
    """
    template = template or ChatTemplate()
    chat = template.used_by(tokenizer)
    limit = packed_length(length, window) if pack else DEFAULT_LENGTH
    sequences: list[TokenSequence] = []
    stream: Marked = []
    cut: list[str | None] = []
    for example in examples:
        if not isinstance(example, Example):
            raise InputError(
                f"examples: hold {type(example).__name__}, not examples; read them with "
                "kfade.load_examples(path)"
            )
        if example.text is not None:
            closes = example.closes and (pack or score_end)
            marked = _text_tokens(example.text, tokenizer, closes, score_end)
            if pack:
                stream += marked
                continue
        elif chat:
            marked = _chat_tokens(example, tokenizer, template, cut)
        else:
            marked = _plain_tokens(example, tokenizer)
        sequences.append(_within_window(example.where, marked, window, truncate))
    if any(cut):
        logger.warning(
            "in %d of %d answers the chat template drops some of what was written (first: %s): "
            "that part is not scored",
            len(cut) - cut.count(None),
            len(cut),
            next(filter(None, cut)),
        )
    for start in range(0, len(stream), limit):
        chunk = stream[start : start + limit]
        if any(scored for _, scored in chunk[1:]):
            sequences.append(_sequence(chunk))
    if examples and not sequences:
        raise InputError(
            f"{examples[0].where} and what follows: no token to score; the first token of a "
            "sequence is read and never scored: give longer texts"
        )
    return sequences


def encode_prompt(
    example: Example, tokenizer: Any, *, template: ChatTemplate | None = None
) -> tuple[int, ...]:
    """Tokens of all of ``example``'s turns, up to where the next answer begins.

    They are rendered as :func:`encode` renders the turns before an answer.

    Raises:
        InputError: the chat template is missing or refuses the turns, or there are no tokens.
    """
    template = template or ChatTemplate()
    if template.used_by(tokenizer):
        text = template.render(_messages(example), tokenizer, example.where, prompt=True)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
    else:
        tokens = [token for token, _ in _plain_tokens(example, tokenizer)]
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
    marked = _tokenised(whole, [(len(start), len(whole))], tokenizer)
    if closed and tokenizer.eos_token_id is not None:
        marked.append((tokenizer.eos_token_id, True))
    return _sequence(marked if window is None else marked[-window - 1 :])


def open_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on: without those that the tokenizer puts at the end."""
    return [token for token, _ in _tokenised(text, [], tokenizer)]


def digest_sequences(sequences: Sequence[TokenSequence]) -> str:
    """SHA-256 over tokens and masks: says which data a fit or an update has seen."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(repr((sequence.tokens, sequence.scored)).encode())
    return digest.hexdigest()


def _sequence(marked: Marked) -> TokenSequence:
    """A sequence of these tokens, of which the first is not scored: nothing predicts it."""
    tokens, scored = zip(*marked, strict=True) if marked else ((), ())
    return TokenSequence(tokens, (False, *scored[1:]))


def _within_window(where: str, marked: Marked, window: int | None, truncate: bool) -> TokenSequence:
    """One example as a sequence of its own, within the window."""
    if window and len(marked) > window:
        if not truncate:
            raise InputError(
                f"{where}: {len(marked)} tokens, over the model's window of {window}; shorten it "
                "or pass --truncate"
            )
        marked = marked[:window]
    if not any(scored for _, scored in marked[1:]):
        reason = " within the model's window" if window and len(marked) == window else ""
        raise InputError(
            f"{where}: no token to score{reason}; the first token of a sequence is read and never "
            "scored"
        )
    return _sequence(marked)


def _tokenised(
    text: str, answers: Sequence[Span], tokenizer: Any, *, special: bool = True
) -> Marked:
    """Tokens of a text that goes on; those with a character of ``answers`` are scored.

    With ``special`` the tokens that the tokenizer adds at the beginning are kept. Those that it
    adds at the end are left out.
    """
    if not getattr(tokenizer, "is_fast", False):
        return _by_prefixes(text, answers, tokenizer, special)
    made = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    marked: Marked = []
    done, count = 0, 1  # characters so far, and tokens up to the last one of the text itself
    columns = (made["input_ids"], made["offset_mapping"], made["special_tokens_mask"])
    for token, (start, end), is_special in zip(*columns, strict=True):
        if start == end and is_special:  # added by the tokenizer
            marked.append((token, False))
            continue
        # Some tokenizers do not count white space to a token. A token of white space alone then has
        # no characters; it is taken to begin where the token before it ends.
        first = start if start < end else min(done, end)
        marked.append((token, any(first < b and a < end for a, b in answers)))
        done, count = max(done, end), len(marked)
    return marked[:count]


def _by_prefixes(text: str, answers: Sequence[Span], tokenizer: Any, special: bool) -> Marked:
    """:func:`_tokenised` for a tokenizer that does not tell which characters a token holds.

    The text before an answer is tokenised alone. The answer begins at the first token in which the
    whole text differs from that. It ends, likewise, with the last token that the text up to its end
    has in common with the whole text, or with the next one if that holds a part of the answer.
    """

    def tokens_of(part: str) -> list[int]:
        made = list(tokenizer(part, add_special_tokens=special).input_ids)
        closes = len(made) > 1 and made[-1] == tokenizer.eos_token_id
        return made[:-1] if special and closes else made

    tokens = tokens_of(text)
    scored = [False] * len(tokens)
    for start, end in answers:
        before, whole = tokens_of(text[:start]), tokens_of(text[:end])
        first = common_length(before, tokens)
        last = common_length(whole, tokens)
        straddles = last < len(whole)
        for t in range(first, min(last + straddles, len(tokens))):
            scored[t] = True
    return list(zip(tokens, scored, strict=True))


def _close(marked: Marked, tokenizer: Any, *, score: bool) -> None:
    """Exactly one EOS at the end, where the tokenizer has one; it is scored if ``score``."""
    eos = tokenizer.eos_token_id
    if eos is not None:
        if marked and marked[-1][0] == eos:
            marked.pop()
        marked.append((eos, score))


def _text_tokens(text: str, tokenizer: Any, closes: bool, score_end: bool) -> Marked:
    """Tokens of a text, all scored but those that the tokenizer adds; with EOS if ``closes``."""
    bos = tokenizer.bos_token_id  # is not scored where it was written into the text, either
    marked = _tokenised(text, [(0, len(text))], tokenizer)
    marked = [(token, scored and token != bos) for token, scored in marked]
    if closes:
        _close(marked, tokenizer, score=score_end)
    return marked


def _plain_tokens(example: Example, tokenizer: Any) -> Marked:
    """Prompt and completion end to end as they are written; EOS closes an answer.

    A bare completion gets no EOS: a cloze such as "The capital of France is" | " Paris" need not
    be the end of a text, and forgetting would then unlearn to stop. The space before an answer is
    scored with it, since tokenizers join a space to the word after it.
    """
    user_prefix, lead = example.plain_prefix
    space = lead[len(lead.rstrip(" ")) :]
    marked: Marked = []
    text, answers = "", list[Span]()  # what is not tokenised yet: all since the last EOS
    for number, (role, content) in enumerate(example.turns):
        if role == "user":
            text += user_prefix + content + lead.rstrip(" ")
        elif role != "assistant":
            text += content + "\n"
        else:
            start = len(text)
            text += space + content
            if example.scores(number):
                answers.append((start, len(text)))
            if example.closes:
                if text:
                    marked += _tokenised(text, answers, tokenizer, special=not marked)
                _close(marked, tokenizer, score=example.scores(number))
                text, answers = "", []
    if text:
        marked += _tokenised(text, answers, tokenizer, special=not marked)
    return marked


def _chat_tokens(
    example: Example, tokenizer: Any, template: ChatTemplate, cut: list[str | None]
) -> Marked:
    """Tokens of the rendered chat; each answer is scored as it was written, and its end.

    A last answer that the template does not close gets an EOS. ``cut`` gains an entry for each
    answer: its place if the template leaves out some of it, else None.
    """
    messages = _messages(example)
    while messages[-1]["role"] != "assistant":  # without an answer
        messages.pop()
    made = template.answers(messages, tokenizer, example.where, example.unscored)
    cut += [example.where if some else None for some in made.cut]
    marked = _tokenised(made.text, made.spans, tokenizer, special=False)
    if not made.closed:
        _close(marked, tokenizer, score=True)
    return marked


def _messages(example: Example) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in example.turns]
