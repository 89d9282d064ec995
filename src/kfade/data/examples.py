"""Read forget and retain data: the forms that a row may have, of a file or of a data set.

{"text": ...}                             scored throughout, packed to a sequence length
{"prompt": ..., "completion": ...}        only the completion is scored
{"question": ..., "answer": ...}          only the answer is scored
{"instruction": ..., "output": ...}       only the output is scored; an "input" follows the
                                          instruction after a blank line; "system" and "history"
                                          go before it, and the answers in the history are scored
{"messages": [{"role", "content"}]}       only the assistant's turns are scored; other forms of
                                          conversations are in ``conversations.py``

Other keys of a row are ignored. One warning names those that hold a part of a conversation. A row
with the keys of several forms is read as instruction and output if it has both (Alpaca repeats them
in "text"), else by the first of its forms in this list.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfade.data.conversations import LISTS, Turns, read_conversation, read_instruction, unread_of
from kfade.data.rows import is_file, read_rows
from kfade.errors import InputError

FORMS = (
    '{"text"}, {"prompt", "completion"}, {"question", "answer"}, {"instruction"[, "input"], '
    '"output"}, {"messages"}, {"conversations"} or {"conversation"}'
)
STRINGS = ("text", "prompt", "completion", "question", "answer", "instruction", "output")
# What stands before the user's words and before the answer where there is no chat template.
PLAIN_QA = ("Question: ", "\nAnswer: ")
PLAIN_INSTRUCTION = ("Instruction: ", "\nResponse: ")
PLAIN_TURNS = ("", "\n")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One document or one exchange; exactly one of ``text`` and ``turns`` is set."""

    where: str
    """File and line number, for messages."""
    text: str | None = None
    turns: Turns = ()
    """(role, content) pairs; the assistant's are scored, but for ``unscored``."""
    plain_prefix: tuple[str, str] = ("", "")
    """What goes before prompt and completion where there is no chat template."""
    closes: bool = True
    """Whether the scored text is a whole answer or document, which ends with EOS."""
    unread: tuple[str, ...] = ()
    """Keys that hold a part of a conversation and are not read."""
    unscored: tuple[int, ...] = ()
    """Numbers, from 0, of the assistant's turns that are not scored."""

    def scores(self, number: int) -> bool:
        """Whether turn ``number``, from 0, is scored."""
        return self.turns[number][0] == "assistant" and number not in self.unscored

    @property
    def scored_texts(self) -> list[str]:
        """The whole text, or the turns that are scored."""
        if self.text is not None:
            return [self.text]
        return [content for i, (_, content) in enumerate(self.turns) if self.scores(i)]

    @property
    def blank(self) -> bool:
        """Whether there is nothing to score."""
        return not any(text.strip() for text in self.scored_texts)


def load_examples(source: str) -> list[Example]:
    """All examples of a file, a folder or ``hf:NAME[:CONFIG][:SPLIT]`` (``train`` by default).

    A row with nothing to score is an error in a file. In a data set, which the user cannot correct,
    it is skipped, and a warning tells how many there are.

    Raises:
        InputError: no such file or data set, a malformed line, an unknown form, an empty set.
    """
    if is_file(source):
        examples = [parse_example(row, where) for where, row in read_rows(source)]
    else:
        found = [_parsed(row, where) for where, row in read_rows(source)]
        examples = [example for example in found if not example.blank]
        if skipped := len(found) - len(examples):
            told = "%s: %d rows with nothing to score skipped, %d rows kept"
            logger.warning(told, source, skipped, len(examples))
    warn_of_unread(source, examples)
    if not examples:
        raise InputError(f"{source} holds no examples: give at least one line of the form {FORMS}")
    return examples


def parse_example(row: Any, where: str) -> Example:
    """The example of a row in any of the forms.

    Raises:
        InputError: it has none of them, or nothing to score.
    """
    example = _parsed(row, where)
    if example.turns and not example.scored_texts:
        raise InputError(
            f"{where}: every turn of the assistant is left out of the loss (weight 0, train false "
            "or loss false), so nothing to score; remove the line or one of the marks"
        )
    if example.blank:
        raise InputError(f"{where}: the text to score is blank; remove the line or fill it")
    return example


def warn_of_unread(source: str, examples: Iterable[Example]) -> None:
    """Log one warning that names the keys of rows that are not read, if there are any."""
    keys = sorted({key for example in examples for key in example.unread})
    if keys:
        logger.warning("%s: not read of its rows: %s", source, ", ".join(keys))


def _parsed(row: Any, where: str) -> Example:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: not a JSON object; write one of {FORMS}")
    turns: Turns
    match row:
        case {"instruction": str(), "output": str(output)}:
            said = read_instruction(row, where)
            turns = (*said.turns, ("assistant", output))
            example = Example(where, None, turns, PLAIN_INSTRUCTION, unread=said.unread)
        case {"text": str(text)}:
            example = Example(where, text=text)
        case {"prompt": str(prompt), "completion": str(completion)}:
            turns = (("user", prompt), ("assistant", completion))
            example = Example(where, turns=turns, closes=False, unread=unread_of(row))
        case {"question": str(question), "answer": str(answer)}:
            turns = (("user", question), ("assistant", answer))
            example = Example(where, None, turns, PLAIN_QA, unread=unread_of(row))
        case _ if (read := read_conversation(row, where)) is not None:
            example = Example(
                where, None, read.turns, PLAIN_TURNS, unread=read.unread, unscored=read.unscored
            )
        case _:
            keys = ", ".join(map(str, row)) or "none"
            kinds = [f"{k} is {type(v).__name__}" for k, v in row.items() if not _fits(k, v)]
            given = f" ({', '.join(kinds)})" if kinds else ""
            raise InputError(
                f"{where}: has the keys {keys}; write one of {FORMS}, all strings{given}"
            )
    roles = dict.fromkeys(role for role, _ in example.turns)
    if example.text is None and "assistant" not in roles:
        raise InputError(
            f"{where}: no message of the role assistant, so nothing to score; the roles are "
            f"{', '.join(roles) or 'none'}"
        )
    return example


def _fits(key: str, value: Any) -> bool:
    """Whether a value is of the type that the key has in any form."""
    if key in LISTS:
        return isinstance(value, list)
    return key not in STRINGS or isinstance(value, str)


def split_holdout(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(fit, held out): ``count`` examples drawn without replacement are held out."""
    held = set(random.Random(seed).sample(range(len(examples)), count))
    fit = [example for i, example in enumerate(examples) if i not in held]
    return fit, [examples[i] for i in sorted(held)]
