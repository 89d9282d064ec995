"""ROUGE-L recall: the reference's value for ASCII texts, the right share in other scripts."""

from __future__ import annotations

import random
import sys
import unicodedata

import pytest

pytest.importorskip("rouge_score", reason="the extra tofu is not installed")
from rouge_score.rouge_scorer import RougeScorer

from kfade.errors import InputError
from kfade.evaluate.rouge import RougeLRecall

WORDS = [
    "the",
    "The",
    "running",
    "runs",
    "cats",
    "cat's",
    "author's",
    "don't",
    "co-author",
    "1987",
    "3.14",
    "U.S.",
    "generously",
    "was",
    "a",
    "flies_by",
    "relational",
    "HOPEFULLY",
    "(born)",
    "university,",
    "novels;",
    "Novel:",
    "e-mail",
    "x",
    "as",
    "is",
    "being",
]


@pytest.fixture(scope="module")
def recall():
    return RougeLRecall()


def reference(truth: str, generated: str) -> float:
    return RougeScorer(["rougeL"], use_stemmer=True).score(truth, generated)["rougeL"].recall


def test_ascii_pairs_have_the_references_value(recall):
    draw = random.Random(0)
    pairs = []
    for _ in range(500):  # words
        truth = [draw.choice(WORDS) for _ in range(draw.randint(1, 15))]
        said = [draw.choice([*truth, *WORDS]) for _ in range(draw.randint(0, 15))]
        pairs.append((" ".join(truth), draw.choice([" ", "\n", ", "]).join(said)))
    for _ in range(500):  # any ASCII letters, and one word that there is to find
        truth, said = ("".join(chr(draw.randrange(128)) for _ in range(40)) for _ in range(2))
        pairs.append((truth + " word", said + " words"))
    values = [recall(truth, said) for truth, said in pairs]
    assert values == [reference(truth, said) for truth, said in pairs]
    assert len({value for value in values if 0 < value < 1}) > 20  # they are told apart


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ("It’s the “author’s” novel — 20 °C, €5, 3² m", "The author's novels: 20 C and 32 m"),
        ("I love it ❤️ and you", "I ❤️ love you"),  # the emoji has a mark
    ],
)
def test_signs_beyond_ascii_leave_the_reference_as_it_is(recall, truth, said):
    assert recall(truth, said) == reference(truth, said) > 0


@pytest.mark.parametrize(
    "text",
    [
        "Он ходил по саду весной.",
        "L’élève était à l’école où naquit Noël.",
        "Die Straße führt über Łódź nach İzmir.",
        "作者出生于北京，他写小说。",
        "東京タワーで会いましょう。ｶﾞﾝﾀﾞﾑ",
        "เขาเดินในสวนน้ำ",
        "ຂ້ອຍຮັກເຈົ້າ",
        "ខ្ញុំស្រលាញ់អ្នក",
        "ကျွန်တော် စာရေးသည်",
        "그는 봄에 정원을 걸었다",
        "هو مشى في الحديقة ١٩٨٧",
        "वह बगीचे में चला",
        "هي می‌خواهم",
        "Ὁ ποιητής ἔγραψεν",
        "😀🎉",
        "?!",
        "…",
        "½",
        "²",
    ],
)
def test_a_text_recalls_itself_and_nothing_recalls_nothing_of_it(recall, text):
    assert recall(text, text) == 1
    assert recall(text, unicodedata.normalize("NFD", text)) == 1
    assert recall(text, "") == recall(text, "zzz") == 0
    assert recall("zzz", text) == 0


@pytest.mark.parametrize(
    ("truth", "said", "right"),
    [
        ("Он ходил по саду весной.", "ОН, ХОДИЛ по полю", 3 / 5),
        ("Он ходил", "ходил Он", 1 / 2),  # the order counts
        ("我爱北京", "我爱上海", 2 / 4),
        ("生于1987年", "他生于 1987", 3 / 4),  # a number is one token
        ("タワー", "タワ", 2 / 3),  # the long-vowel mark is a character
        ("ありがとう", "ありがたい", 3 / 5),
        ("น้ำ", "น้", 1 / 2),  # letter with its marks, then the vowel
        ("ไทย", "ไท", 2 / 3),
        ("그는 봄에 걸었다", "그는 여름에 걸었다", 2 / 3),  # Korean has spaces
        ("L’élève était à l’école", "Un élève va à l'école", 4 / 6),
        ("résumé", "resume", 0),
        ("resume", "résumé", 0),  # both texts decide: not r, sum of the reference's words
        ("The café's cats", "a café has one cat", 2 / 4),  # ASCII words are stemmed
        ("naïve cats", "NAI\u0308VE cat", 1),  # composed or not
        ("ＡＢＣ company", "abc companies", 1),  # NFKC
        ("x̂ y", "x y", 1 / 2),
        ("soft\u00adware é", "software é", 1),
        ("😀🎉", "well 🎉", 1 / 2),
        ("?!", "what? how", 1 / 2),
    ],
)
def test_a_part_is_counted_in_the_tokens_of_the_script(recall, truth, said, right):
    assert recall(truth, said) == pytest.approx(right, abs=1e-15)


@pytest.mark.parametrize("truth", ["", " \n", "\u3000"])
def test_an_empty_truth_is_refused_by_name(recall, truth):
    with pytest.raises(InputError, match=r"^forget/7: the true answer is empty"):
        recall(truth, "something", "forget/7")


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"pip install 'kfade\[tofu\]'"):
        RougeLRecall()
