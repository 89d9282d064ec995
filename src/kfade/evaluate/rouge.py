"""ROUGE-L recall in any script: with rouge-score's words where they suffice, else with Unicode's.

The tokenizer of the package rouge-score, the reference, keeps ``a-z`` and ``0-9`` only. Texts in
other letters lose all or part of their words, and identical texts may score 0.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import regex

from kfade.errors import InputError

# Scripts written without spaces: each character is a token. Script extensions (scx) include marks
# that belong to two scripts, such as the long-vowel mark of Katakana.
_UNSPACED = "".join(
    rf"\p{{scx={script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_TOKEN = regex.compile(
    rf"[[\p{{L}}\p{{N}}]&&[{_UNSPACED}]]\p{{M}}*"
    rf"|[[\p{{L}}\p{{N}}]--[{_UNSPACED}]](?:[[\p{{L}}\p{{N}}]--[{_UNSPACED}]]|\p{{M}})*",
    regex.V1,
)
# A mark counts on a letter or digit only: on a symbol it selects the look of an emoji. The
# reference's words never include signs such as ² and ½, so those do not count.
_BEYOND_ASCII = regex.compile(r"[[\p{L}\p{Nd}\p{Nl}]--[\x00-\x7f]]|[\p{L}\p{N}]\p{M}", regex.V1)
_COUNTED = regex.compile(r"[\p{L}\p{N}]")
_INVISIBLE = regex.compile(r"[\p{Cf}--[\u200b]]", regex.V1)  # all but the zero-width space

# NFKC splits the vowels "am" of Thai and Lao, whose first half would change the letter before.
_AM_VOWELS = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3"}


def check_truth(truth: str, item: str) -> None:
    """Raises :class:`InputError` where a true answer is empty."""
    if not truth or truth.isspace():
        raise InputError(
            f"{item}: the true answer is empty, so it has no ROUGE-L recall; give it an answer or "
            "leave it out"
        )


def reference_reads(truth: str) -> bool:
    """Whether the reference's words hold more than half of the letters and digits of ``truth``."""
    counted = _COUNTED.findall(truth)
    return 2 * sum(letter.isascii() for letter in counted) > len(counted)


class RougeLRecall:
    """ROUGE-L recall: longest common subsequence of tokens / number of tokens of the truth, 0 to 1.

    Both texts are tokenised by the same rule, the first that fits both:

    1. if all letters and digits are ASCII: the reference's stemmed words;
    2. otherwise: lower-case NFKC words of letters, marks and digits, with ASCII words stemmed as in
       1; in scripts without spaces each character with its marks is a token;
    3. if the truth has no tokens by 1 or 2: all characters but spaces.

    Raises:
        InputError: rouge-score is not installed.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from rouge_score.tokenizers import DefaultTokenizer
        except ImportError:
            raise InputError(
                "TOFU needs the package rouge-score: pip install 'kfade[tofu]'"
            ) from None
        self._words: Any = DefaultTokenizer(use_stemmer=True)
        self._unicode, self._characters = _UnicodeTokenizer(self._words), _CharacterTokenizer()
        self._scorers = {
            tokenizer: RougeScorer(["rougeL"], tokenizer=tokenizer)
            for tokenizer in (self._words, self._unicode, self._characters)
        }

    def __call__(self, truth: str, generated: str, item: str = "the item") -> float:
        """The recall of ``truth`` by ``generated``.

        Raises:
            InputError: ``truth`` is empty; the message names ``item``.
        """
        check_truth(truth, item)
        tokenizer = self._unicode if _beyond_ascii(truth, generated) else self._words
        if not tokenizer.tokenize(truth):
            tokenizer = self._characters
        return float(self._scorers[tokenizer].score(truth, generated)["rougeL"].recall)


def _beyond_ascii(*texts: str) -> bool:
    return any(_BEYOND_ASCII.search(text) for text in texts)


class _UnicodeTokenizer:
    """Words of any script; characters in scripts without spaces."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference  # tokenises ASCII words

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
    """All characters but spaces."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]
