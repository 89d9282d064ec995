"""Prompts in, greedy completions out: forms, padding, ends."""

from __future__ import annotations

import json

import pytest
import zoo
from helpers import greedy

from kfade.errors import InputError
from kfade.evaluate.completions import (
    complete,
    completed,
    encode_prompts,
    read_prompts,
)
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_form_of_a_prompt(tmp_path):
    source = write(
        tmp_path / "p.jsonl",
        {"instruction": "a", "input": "b", "output": "z"},
        {"instruction": "c", "input": ""},
        {"prompt": "d", "completion": "z"},
        {"question": "e"},
        {"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "z"}]},
    )
    examples = read_prompts(source)
    assert [e.turns[-1][1] for e in examples] == ["a\n\nb", "c", "d", "e", "f"]
    tokenizer = zoo.tokenizer()
    plain = [tokenizer.convert_ids_to_tokens(p.tokens) for p in encode_prompts(examples, tokenizer)]
    assert plain[3] == ["Question:", "e", "Answer:"]
    assert plain[2] == ["d"]
    chat = encode_prompts(examples, zoo.tokenizer(chat=True))
    words = tokenizer.convert_ids_to_tokens(chat[0].tokens)
    assert words == ["<s>", "<user>", "a", "b", "<assistant>"]
    assert [p.text for p in chat] == ["a\n\nb", "c", "d", "e", "f"]
    assert len(read_prompts(source, limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "has text; write one of"),
        ({"prompt": " "}, "an empty prompt"),
        ({"messages": []}, "an empty prompt"),
        ({"messages": [{"role": "user"}]}, 'each message needs "role"'),
        ([1], "has no object"),
    ],
)
def test_what_is_not_a_prompt_is_refused(tmp_path, row, said):
    with pytest.raises(InputError, match=said):
        read_prompts(write(tmp_path / "p.jsonl", row))


def test_no_prompts_and_too_long_prompts(tmp_path):
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl"))
    examples = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a b c d"}))
    assert len(encode_prompts(examples, zoo.tokenizer(), window=6, max_new_tokens=2)) == 1
    with pytest.raises(InputError, match="line 1: 4 tokens"):
        encode_prompts(examples, zoo.tokenizer(), window=5, max_new_tokens=2)


def test_complete_goes_on_where_a_log_ends(tmp_path):
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    examples = read_prompts(write(tmp_path / "p.jsonl", *({"prompt": x} for x in "abc")))
    prompts = encode_prompts(examples, tokenizer)
    with ItemLog(tmp_path / "log.jsonl", {}) as log:
        log.add("1", prompt="b", tokens=[3], text="kept")
        complete(model, tokenizer, prompts, log, Decoding(4))
        assert log.items["1"]["text"] == "kept"
        assert log.items["2"]["tokens"] == greedy(model, prompts[2].tokens, [2], 4)
        assert set(log.items) == {"0", "1", "2"}


def test_a_completed_prompt_is_scored_on_its_completion(tmp_path):
    (example,) = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a b"}))
    (prompt,) = encode_prompts([example], zoo.tokenizer())
    sequence = completed(prompt, [9, 2])
    assert sequence.tokens == (7, 8, 9, 2)
    assert sequence.scored == (False, False, True, True)
