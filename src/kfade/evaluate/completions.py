"""Completions of instructions by a model: prompts in, greedy completions out.

{"instruction": ..., "input": ...}  the input, if any, follows after a blank line; "system" and
                                    "history" come before the instruction
{"prompt": ...}, {"question": ...}  an answer in the row is not used
{"messages": [...]}                 up to the last answer; also the other forms of conversations
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kfade.data.chat import ChatTemplate
from kfade.data.conversations import Turns, read_conversation, read_instruction, unread_of
from kfade.data.examples import PLAIN_INSTRUCTION, PLAIN_QA, PLAIN_TURNS, Example, warn_of_unread
from kfade.data.rows import read_rows
from kfade.data.sequences import TokenSequence, encode_prompt
from kfade.errors import InputError
from kfade.evaluate.generation import Decoding, generate
from kfade.evaluate.item_log import ItemLog

FORMS = (
    '{"instruction"[, "input"]}, {"prompt"}, {"question"}, {"messages"}, {"conversations"} or '
    '{"conversation"}'
)


@dataclass(frozen=True)
class Prompt:
    """What a completion follows."""

    text: str
    """The user's last turn."""
    tokens: tuple[int, ...]


def read_prompts(source: str, limit: int | None = None) -> list[Example]:
    """Turns that wait for an answer, from a JSONL file or ``hf:NAME[:CONFIG][:SPLIT]``.

    Raises:
        InputError: no such file, a row of another form, no rows.
    """
    examples = [_parse(row, where) for where, row in read_rows(source, limit)]
    warn_of_unread(source, examples)
    if not examples:
        raise InputError(f"{source} holds no prompts: give at least one line of the form {FORMS}")
    return examples


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    template: ChatTemplate | None = None,
    window: int | None = None,
    max_new_tokens: int = 0,
) -> list[Prompt]:
    """The prompts' tokens, through the chat template where there is one.

    Raises:
        InputError: a prompt with ``max_new_tokens`` more is longer than the model's ``window``.
    """
    prompts = []
    for example in examples:
        tokens = encode_prompt(example, tokenizer, template=template)
        if window is not None and len(tokens) + max_new_tokens > window:
            raise InputError(
                f"{example.where}: {len(tokens)} tokens, and with {max_new_tokens} new ones over "
                f"the model's window of {window}; shorten it, or lower --max-new-tokens"
            )
        prompts.append(Prompt(example.turns[-1][1], tokens))
    return prompts


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], log: ItemLog, decoding: Decoding
) -> None:
    """Write the completions that ``log`` lacks, as ``{"prompt", "tokens", "text"}`` by number."""

    def continued(some: list[Prompt]) -> Iterator[tuple[int, list[int]]]:
        return generate(model, tokenizer, [prompt.tokens for prompt in some], decoding)

    numbered = {str(number): prompt for number, prompt in enumerate(prompts)}
    for name, prompt, tokens in log.measure(numbered, continued):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        log.add(name, prompt=prompt.text, tokens=tokens, text=text)


def completed(prompt: Prompt, tokens: Sequence[int]) -> TokenSequence:
    """Prompt and completion as one sequence, scored on the completion."""
    scored = (False,) * len(prompt.tokens) + (True,) * len(tokens)
    return TokenSequence((*prompt.tokens, *tokens), scored)


def _parse(row: Any, where: str) -> Example:
    turns: Turns
    match row:
        case {"instruction": str()}:
            said = read_instruction(row, where)
            example = Example(where, None, said.turns, PLAIN_INSTRUCTION, unread=said.unread)
        case {"prompt": str(text)}:
            example = Example(where, turns=(("user", text),), unread=unread_of(row))
        case {"question": str(text)}:
            turns = (("user", text),)
            example = Example(where, None, turns, PLAIN_QA, unread=unread_of(row))
        case {} if (read := read_conversation(row, where)) is not None:
            turns = read.turns
            while turns and turns[-1][0] == "assistant":
                turns = turns[:-1]
            example = Example(where, None, turns, PLAIN_TURNS, unread=read.unread)
        case _:
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else "no object"
            raise InputError(f"{where}: has {keys or 'no keys'}; write one of {FORMS}")
    if not example.turns or not example.turns[-1][1].strip():
        raise InputError(f"{where}: an empty prompt; remove the line or fill it")
    return example
