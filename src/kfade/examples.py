"""Read forget and retain data: JSONL files in four forms, or a data set from the hub.

{"text": ...}                       scored throughout, packed to a sequence length
{"prompt": ..., "completion": ...}  only the completion is scored
{"question": ..., "answer": ...}    only the answer is scored
{"messages": [{"role", "content"}]} only the assistant's turns are scored
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfade.errors import InputError

FORMS = '{"text"}, {"prompt", "completion"}, {"question", "answer"} or {"messages"}'
KEYS = ("text", "prompt", "completion", "question", "answer", "messages")
PLAIN_QA = ("Question: ", "\nAnswer: ")  # before question and answer, without a chat template


@dataclass(frozen=True)
class Example:
    """One document or one exchange; exactly one of ``text`` and ``turns`` is set."""

    where: str
    """File and line number, for messages."""
    text: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    """(role, content) pairs; the assistant's are scored."""
    plain_prefix: tuple[str, str] = ("", "")
    """What goes before prompt and completion where there is no chat template."""
    closes: bool = True
    """Whether the scored text is a whole answer or document, which ends with EOS."""


def load_examples(source: str) -> list[Example]:
    """All examples of a JSONL file or of ``hf:NAME[:CONFIG][:SPLIT]`` (split ``train`` if unsaid).

    Raises:
        InputError: no such file or data set, a malformed line, an unknown form, an empty set.
    """
    examples = [parse_example(row, where) for where, row in read_rows(source)]
    if not examples:
        raise InputError(f"{source} holds no examples: give at least one line of the form {FORMS}")
    return examples


def read_rows(source: str) -> Iterable[tuple[str, Any]]:
    """(where, row) of a JSONL file or of ``hf:NAME[:CONFIG][:SPLIT]``, whatever the rows hold."""
    return _hub_rows(source) if source.startswith("hf:") else _file_rows(Path(source))


def read_utf8(path: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def parse_example(row: Any, where: str) -> Example:
    """One row in any of the four forms."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: not a JSON object; write one of {FORMS}")
    match row:
        case {"text": str(text)}:
            example = Example(where, text=text)
        case {"prompt": str(prompt), "completion": str(completion)}:
            turns = (("user", prompt), ("assistant", completion))
            example = Example(where, turns=turns, closes=False)
        case {"question": str(question), "answer": str(answer)}:
            turns = (("user", question), ("assistant", answer))
            example = Example(where, turns=turns, plain_prefix=PLAIN_QA)
        case {"messages": [*messages]}:
            example = Example(where, turns=tuple(parse_turn(m, where) for m in messages))
        case _:
            keys = ", ".join(map(str, row)) or "none"
            kinds = [f"{k} is {type(v).__name__}" for k, v in row.items() if not _fits(k, v)]
            given = f" ({', '.join(kinds)})" if kinds else ""
            raise InputError(
                f"{where}: has the keys {keys}; write one of {FORMS}, all strings{given}"
            )
    if example.text is None and "assistant" not in [role for role, _ in example.turns]:
        raise InputError(f"{where}: no message of the role assistant, so nothing to score")
    scored = [example.text] if example.text is not None else _assistant(example)
    if not any(text.strip() for text in scored):
        raise InputError(f"{where}: the text to score is empty; remove the line or fill it")
    return example


def _fits(key: str, value: Any) -> bool:
    """Whether a value is of the type that the key has in any form."""
    return key not in KEYS or isinstance(value, list if key == "messages" else str)


def split_holdout(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """(fit, held out): ``count`` examples drawn without replacement are held out."""
    held = set(random.Random(seed).sample(range(len(examples)), count))
    fit = [example for i, example in enumerate(examples) if i not in held]
    return fit, [examples[i] for i in sorted(held)]


def _assistant(example: Example) -> list[str]:
    return [content for role, content in example.turns if role == "assistant"]


def parse_turn(message: Any, where: str) -> tuple[str, str]:
    """(role, content) of one message."""
    match message:
        case {"role": str(role), "content": str(content)}:
            return role, content
    raise InputError(f'{where}: each message needs "role" and "content", both strings')


def _file_rows(path: Path) -> Iterable[tuple[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a JSONL file or hf:NAME[:CONFIG][:SPLIT]")
    # Not splitlines(): JSON strings may hold line separators such as U+2028 as they are.
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "each line must hold one JSON object"
            ) from None


def _hub_rows(source: str) -> Iterable[tuple[str, Any]]:
    name, *rest = source.removeprefix("hf:").split(":")
    if not all([name, *rest]) or len(rest) > 2:
        raise InputError(f"{source}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    try:
        import datasets  # an optional extra, and slow to import
    except ImportError:
        raise InputError(
            f"{source}: reading data sets from the hub needs the package datasets: "
            "pip install 'kfade[hub]'"
        ) from None
    try:
        # One word after the name is a configuration where the data set has one so called.
        if len(rest) == 1 and rest[0] in datasets.get_dataset_config_names(name):
            rest.append("train")
        split = rest[-1] if rest else "train"
        config = rest[0] if len(rest) == 2 else None
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises whatever its many back ends raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{source}: the data set could not be loaded ({reason}); check the name, the "
            "configuration and the split, or download it and give a JSONL file"
        ) from None
    for index, row in enumerate(rows):
        yield f"{source}, row {index}", row
