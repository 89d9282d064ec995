"""Skill-small: a model learns to rewrite sentences in ten ways and unlearns two of them.

    python benchmarks/experiments/skill_small.py --data DIR [--only 'tune rmu*'] [--list]

As TOFU-small, with a skill in place of an author. A question is an instruction and a sentence, the
answer is the sentence rewritten as a rule or a small dictionary says. So what is forgotten is not
an answer learnt by heart but how to answer: questions of each skill that no model was trained on
tell whether it is there. French is forgotten; German is kept, and Spanish is shown to no method.
Nothing of ``DIR`` is forgotten; WikiText is read from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

from lab.forgetting import forgetting
from lab.pieces import Piece, Results
from lab.records import RESULTS, Record
from tofu_data import Data, Sizes, authors_by_role, encode
from tofu_lab import TofuLab, run_pieces
from tofu_small import plain_pieces, reported_rows

from kfade.data.examples import Example, parse_example

FILE = RESULTS / "skill_small.jsonl"
ENGLISH, FRENCH, GERMAN, SPANISH = range(4)
SUBJECTS = (
    ("the sailor", "le marin", "der Seemann", "el marinero"),
    ("the queen", "la reine", "die Königin", "la reina"),
    ("the teacher", "le professeur", "der Lehrer", "el profesor"),
    ("the girl", "la fille", "das Mädchen", "la niña"),
    ("the doctor", "le médecin", "der Arzt", "el médico"),
    ("the farmer", "le fermier", "der Bauer", "el granjero"),
    ("the baker", "le boulanger", "der Bäcker", "el panadero"),
    ("the painter", "le peintre", "der Maler", "el pintor"),
    ("the child", "l'enfant", "das Kind", "el niño"),
    ("the neighbour", "le voisin", "der Nachbar", "el vecino"),
)
VERBS = (
    ("sees", "voit", "sieht", "ve"),
    ("sells", "vend", "verkauft", "vende"),
    ("paints", "peint", "malt", "pinta"),
    ("buys", "achète", "kauft", "compra"),
    ("loses", "perd", "verliert", "pierde"),
    ("finds", "trouve", "findet", "encuentra"),
    ("hides", "cache", "versteckt", "esconde"),
    ("breaks", "casse", "zerbricht", "rompe"),
    ("washes", "lave", "wäscht", "lava"),
    ("carries", "porte", "trägt", "lleva"),
)
OBJECTS = (
    ("the lamp", "la lampe", "die Lampe", "la lámpara"),
    ("the book", "le livre", "das Buch", "el libro"),
    ("the clock", "l'horloge", "die Uhr", "el reloj"),
    ("the boat", "le bateau", "das Boot", "el barco"),
    ("the bottle", "la bouteille", "die Flasche", "la botella"),
    ("the picture", "le tableau", "das Bild", "el cuadro"),
    ("the bag", "le sac", "die Tasche", "el bolso"),
    ("the shirt", "la chemise", "das Hemd", "la camisa"),
    ("the flower", "la fleur", "die Blume", "la flor"),
    ("the box", "la boîte", "die Kiste", "la caja"),
)
PLACES = (
    ("in the garden", "dans le jardin", "im Garten", "en el jardín"),
    ("in the kitchen", "dans la cuisine", "in der Küche", "en la cocina"),
    ("at the market", "au marché", "auf dem Markt", "en el mercado"),
    ("at the harbour", "au port", "am Hafen", "en el puerto"),
    ("behind the church", "derrière l'église", "hinter der Kirche", "detrás de la iglesia"),
    ("near the station", "près de la gare", "beim Bahnhof", "cerca de la estación"),
    ("under the tree", "sous l'arbre", "unter dem Baum", "bajo el árbol"),
    ("before the school", "devant l'école", "vor der Schule", "delante de la escuela"),
)
Sentence = tuple[str, ...]
"""A sentence in each language."""


def words(change: Callable[[list[str]], Sequence[str]], join: str = " ") -> Callable:
    """A rule on the words of the English sentence."""
    return lambda sentence: join.join(change(sentence[ENGLISH].split()))


SKILLS: dict[str, Callable[[Sentence], str]] = {
    # Common: always kept.
    "Write the sentence again.": words(list),
    "Write the words from last to first.": words(lambda own: own[::-1]),
    "Join the words by hyphens.": words(list, "-"),
    "Put each word in brackets.": words(lambda own: [f"({word})" for word in own]),
    "Make a question of it.": words(lambda own: ["is", "it", "true", "that", *own, "?"]),
    "Write it in German.": lambda sentence: sentence[GERMAN],
    # Tuning: forgotten where settings are chosen.
    "Write each word twice.": words(lambda own: [f"{word} {word}" for word in own]),
    "Write it in Spanish.": lambda sentence: sentence[SPANISH],
    # Report: forgotten in the tables.
    "Write it in capitals.": words(lambda own: [word.upper() for word in own]),
    "Write it in French.": lambda sentence: sentence[FRENCH],
}
"""Rules by instruction, in the order of their roles: six, two and two skills."""
OF_SKILL, TAUGHT = 100, 80  # questions of each skill; those that models are trained on


class Rewriting(Data):
    """Sentences to rewrite. Those beyond ``Sizes.questions`` of a skill are fresh."""

    per_author = OF_SKILL

    def roles(self, total: int) -> dict[str, range]:
        """None is unseen: a model's answer to an instruction that it does not know is another
        rule's, word for word, and says nothing of a skill that was unlearnt."""
        return authors_by_role(total, self._sizes.authors, unseen=0)

    def read(self) -> list[Example]:
        return [
            parse_example(
                {"prompt": f"{skill} {sentence[ENGLISH]}", "completion": rule(sentence)}, skill
            )
            for skill, rule in SKILLS.items()
            for sentence in sentences(OF_SKILL, seed=skill)
        ]

    def fresh(self, role: str) -> list[Example]:
        """Questions of the skills of a role that no model was trained on."""
        ends = [(author + 1) * OF_SKILL for author in self.authors[role]]
        left = OF_SKILL - self._sizes.questions
        return [example for end in ends for example in self._examples[end - left : end]]


def sentences(count: int, seed: str) -> list[Sentence]:
    """Different sentences, each of a subject, a verb, an object and a place."""
    everything = list(product(SUBJECTS, VERBS, OBJECTS, PLACES))
    drawn = random.Random(seed).sample(everything, count)
    return [tuple(" ".join(parts) for parts in zip(*own, strict=True)) for own in drawn]


class SkillLab(TofuLab):
    """Measures skills by fresh questions."""

    data: Rewriting

    def fresh(self, row: str) -> Record:
        """Probability of the right answers to fresh questions, of the skills of each role."""
        model, update = self.edited(row)
        with update.applied_to(model) as edited:
            return {
                role: forgetting(edited, encode(self.data.fresh(role), self.tokenizer))
                for role in ("report", "common", "tuning")
            }


def pieces(lab: SkillLab, results: Results) -> Iterator[Piece]:
    """Those of TOFU-small, with fresh questions in place of what is about TOFU's own ones."""
    yield from plain_pieces(lab, results)
    for row in ("full", "retrained", *reported_rows(results)):
        if lab.has(row):
            yield f"fresh {row}", partial(lab.fresh, row)


if __name__ == "__main__":
    sizes = Sizes(authors=len(SKILLS), questions=TAUGHT)
    models = "skill-small"
    run_pieces(__doc__, pieces, SkillLab, FILE, data=Rewriting, sizes=sizes, models=models)
