"""Generation in batches against one token at a time without cache or padding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from transformers import GenerationConfig

from kfade.errors import InputError
from kfade.evaluate.generation import generate

PROMPTS = [[1, 8, 9], [1, 7], [1, 10, 11, 12, 13], [1]]
END = 2


def one_by_one(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == END:
            break
    new = tokens[len(prompt) :]
    return new[:-1] if new[-1:] == [END] else new


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_is_the_likeliest_token_each_time(family, batch):
    # In float32: Gemma's soft-capped attention casts the mask's least float64 to minus infinity.
    model, tokenizer = zoo.tiny(family, dtype=torch.float32), zoo.tokenizer()
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=9, batch=batch)
    expected = [
        tokenizer.decode(one_by_one(model, prompt, 9), skip_special_tokens=True)
        for prompt in PROMPTS
    ]
    assert texts == expected
    assert len(set(texts)) > 1  # the prompts matter


def test_a_text_ends_at_the_first_end_token():
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    whole = [one_by_one(model, prompt, 9) for prompt in PROMPTS]
    ends = whole[0][3]  # what the first text says in the fourth place shall end it
    model.generation_config = GenerationConfig(eos_token_id=[END, ends])
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=9, batch=4)
    for text, tokens in zip(texts, whole, strict=True):
        kept = tokens[: tokens.index(ends)] if ends in tokens else tokens
        assert text == tokenizer.decode(kept, skip_special_tokens=True)


def test_the_models_own_settings_do_not_count_and_stay():
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=9, batch=4)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    model.generation_config = own
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=9, batch=4) == plain
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_sampling_draws_from_the_softmax():
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    state = torch.get_rng_state()
    count = 4000
    texts = generate(
        model, tokenizer, [[1, 8]] * count, max_new_tokens=1, batch=count, temperature=2.0, seed=3
    )
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 8]])).logits[0, -1]
    p = (logits / 2.0).softmax(-1)
    seen = Counter(texts)
    words = [i for i in range(len(zoo.SPECIAL), zoo.VOCABULARY) if p[i] > 0.02]
    assert len(words) > 3
    for token in words:  # five standard deviations
        share = seen[zoo.WORDS[token]] / count
        assert share == pytest.approx(p[token].item(), abs=5 * (p[token].item() / count) ** 0.5)


def test_a_seed_repeats_and_another_does_not():
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()

    def draw(seed: int) -> list[str]:
        return generate(
            model, tokenizer, PROMPTS, max_new_tokens=9, batch=2, temperature=1.0, seed=seed
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_models_window_ends_a_text():
    model, tokenizer = zoo.tiny("gpt2"), zoo.tokenizer()
    longest = [1] + [8] * (zoo.WINDOW - 3)
    texts = generate(model, tokenizer, [longest, [1, 8]], max_new_tokens=9, batch=2)
    assert len(texts[0].split()) <= 2
    with pytest.raises(InputError, match="a prompt of 32 tokens leaves no room"):
        generate(model, tokenizer, [[8] * zoo.WINDOW], max_new_tokens=9, batch=2)


def test_no_prompts_no_texts():
    assert generate(zoo.tiny("llama"), zoo.tokenizer(), [], max_new_tokens=9, batch=2) == []
