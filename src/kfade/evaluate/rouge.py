"""ROUGE-L recall in any script: the reference's words where they suffice, else Unicode's.

The tokenizer of the package rouge-score keeps ``a-z`` and ``0-9`` only. Texts in other letters lose
all or part of their words by it, and identical ones may score 0.
"""

from __future__ import annotations

import unicodedata
from typing import Any, Protocol

import regex

from kfade.errors import InputError

# Written without spaces: a character is a token. The extensions count the long-vowel mark of
# Katakana, for example, which belongs to two scripts.
_UNSPACED = "".join(
    rf"\p{{scx={script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_TOKEN = regex.compile(
    rf"[[\p{{L}}\p{{N}}]&&[{_UNSPACED}]]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}]--[{_UNSPACED}]](?:[[\p{{L}}\p{{N}}]--[{_UNSPACED}]]|\p{{M}})*",
    regex.V1,
)
# A mark counts on a letter or digit only: on a symbol it chooses how an emoji looks. Signs such as
# ² and ½ have no part in the reference's words, so they do not end its use.
_BEYOND_ASCII = regex.compile(r"[[\p{L}\p{Nd}\p{Nl}]--[\x00-\x7f]]|[\p{L}\p{N}]\p{M}", regex.V1)
_COUNTED = regex.compile(r"[\p{L}\p{N}]")
_INVISIBLE = regex.compile(r"[\p{Cf}--[\u200b]]", regex.V1)  # all but the space of no width

# NFKC parts the vowels "am" of Thai and Lao, whose first half would change the letter before.
_AM_VOWELS = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3"}


class Recall(Protocol):
    """A loaded ROUGE-L recall."""

    def __call__(self, truth: str, generated: str, item: str = "the item") -> float:
        """Longest common subsequence of tokens / number of tokens of ``truth``, 0 to 1.

        Raises:
            InputError: ``truth`` is empty; the message names ``item``.
        """


def check_truth(truth: str, item: str) -> None:
    """Raises :class:`InputError` where a true answer has nothing that could be recalled."""
    if not truth or truth.isspace():
        raise InputError(
            f"{item}: the true answer is empty, so it has no ROUGE-L recall; give it an answer or "
            "leave it out"
        )


def reference_reads(truth: str) -> bool:
    """Whether the reference's words hold more than half of the letters and digits of ``truth``."""
    counted = _COUNTED.findall(truth)
    return 2 * sum(letter.isascii() for letter in counted) > len(counted)


def load_rouge_l_recall() -> Recall:
    """ROUGE-L recall of (truth, generated, name of the item).

    Both texts are cut by the same rule, the first that fits the two of them:

    1. no letter or digit beyond ASCII in either: the reference's stemmed words;
    2. else: lower-case NFKC words of letters, marks and digits, ASCII ones stemmed as in 1; one
       token a character with its marks in scripts without spaces;
    3. where that leaves no token of the truth: the characters that are no space.

    Raises:
        InputError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError:
        raise InputError("TOFU needs the package rouge-score: pip install 'kfade[tofu]'") from None
    reference = DefaultTokenizer(use_stemmer=True)
    unicode, characters = _UnicodeTokenizer(reference), _CharacterTokenizer()
    scorers = {
        tokenizer: RougeScorer(["rougeL"], tokenizer=tokenizer)
        for tokenizer in (reference, unicode, characters)
    }

    def recall(truth: str, generated: str, item: str = "the item") -> float:
        check_truth(truth, item)
        tokenizer = unicode if _beyond_ascii(truth, generated) else reference
        if not tokenizer.tokenize(truth):
            tokenizer = characters
        return float(scorers[tokenizer].score(truth, generated)["rougeL"].recall)

    return recall


def _beyond_ascii(*texts: str) -> bool:
    return any(_BEYOND_ASCII.search(text) for text in texts)


class _UnicodeTokenizer:
    """Words of any script; a character where words are not marked by spaces."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference  # for ASCII words

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).lower()
        text = unicodedata.normalize("NFKC", text)
        for parted, vowel in _AM_VOWELS.items():
            text = text.replace(parted, vowel)
        tokens: list[str] = []
        for token in _TOKEN.findall(text):
            tokens += self._reference.tokenize(token) if token.isascii() else [token]
        return tokens


class _CharacterTokenizer:
    """All that is no space."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]
