"""Prompts in, greedy completions out: forms, padding, ends."""

from __future__ import annotations

import json

import pytest
import torch
import zoo

from kfade.errors import InputError
from kfade.evaluate.completions import (
    complete,
    completed,
    digest_prompts,
    encode_prompts,
    end_tokens,
    generate,
    read_prompts,
)
from kfade.evaluate.log import ItemLog


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def greedy(model, prompt: list[int], ends: list[int], count: int) -> list[int]:
    """One sequence, no padding, no cache: the plainest loop."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 5, 9, 30]]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox", "phi"])
def test_a_padded_batch_says_what_each_prompt_alone_says(family):
    # float32: in float64 transformers' eager attention makes NaN of a row that is all padding
    model = zoo.tiny(family, dtype=torch.float32)
    ends = [20, 21, 22]
    found = {}
    generate(model, PROMPTS, found.__setitem__, ends=ends, max_new_tokens=8, batch_tokens=45)
    expected = {i: greedy(model, p, ends, 8) for i, p in enumerate(PROMPTS)}
    assert found == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > 1


def test_a_completion_ends_with_its_end_token():
    model = zoo.tiny("llama")
    free = greedy(model, PROMPTS[0], [], 8)
    end = free[3]
    found = {}
    generate(model, PROMPTS[:1], found.__setitem__, ends=[end], max_new_tokens=8)
    assert found[0] == free[: free.index(end) + 1]


def test_the_models_own_penalties_do_not_count_and_stay():
    model = zoo.tiny("llama")
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.3
    own = model.generation_config
    found = {}
    generate(model, PROMPTS, found.__setitem__, ends=[], max_new_tokens=8)
    assert found == {i: greedy(model, p, [], 8) for i, p in enumerate(PROMPTS)}
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_ends_of_model_and_tokenizer():
    model = zoo.tiny("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, zoo.tokenizer()) == [2, 7, 9]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, zoo.tokenizer()) == [2]


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
    assert len(encode_prompts(examples, zoo.tokenizer(), longest=4)) == 1
    with pytest.raises(InputError, match="line 1: 4 tokens"):
        encode_prompts(examples, zoo.tokenizer(), longest=3)


def test_complete_goes_on_where_a_log_ends(tmp_path):
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    examples = read_prompts(write(tmp_path / "p.jsonl", *({"prompt": x} for x in "abc")))
    prompts = encode_prompts(examples, tokenizer)
    with ItemLog(tmp_path / "log.jsonl", {}) as log:
        log.add("1", prompt="b", tokens=[3], text="kept")
        complete(model, tokenizer, prompts, log, max_new_tokens=4)
        assert log.items["1"]["text"] == "kept"
        assert log.items["2"]["tokens"] == greedy(model, list(prompts[2].tokens), [2], 4)
        assert set(log.items) == {"0", "1", "2"}
    assert digest_prompts(prompts) != digest_prompts(prompts[:2])


def test_a_completed_prompt_is_scored_on_its_completion(tmp_path):
    (example,) = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a b"}))
    (prompt,) = encode_prompts([example], zoo.tokenizer())
    sequence = completed(prompt, [9, 2])
    assert sequence.tokens == (7, 8, 9, 2)
    assert sequence.scored == (False, False, True, True)
