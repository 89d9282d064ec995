"""Generation in batches against one token at a time without cache or padding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from helpers import greedy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from zoo.caches import OTHERS

from kfade.errors import InputError
from kfade.evaluate.generation import (
    Decoding,
    company,
    end_tokens,
    generate,
    generate_texts,
    shares_batches,
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 5, 9, 30]]
END = 2


def continued(model, prompts=PROMPTS, **options) -> dict[int, list[int]]:
    found = list(generate(model, zoo.tokenizer(), prompts, Decoding(**options)))
    assert len(found) == len(prompts)
    return dict(found)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize("batch_tokens", [1, 45, 4096])
def test_a_padded_batch_says_what_each_prompt_alone_says(family, batch_tokens):
    # float32: in float64 transformers' eager attention makes NaN of a row that is all padding
    model = zoo.tiny(family, dtype=torch.float32)
    model.generation_config.eos_token_id = [20, 21, 22]
    found = continued(model, max_new_tokens=8, batch_tokens=batch_tokens)
    expected = {i: greedy(model, p, [END, 20, 21, 22], 8) for i, p in enumerate(PROMPTS)}
    assert found == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > 1  # the prompts matter


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_kinds_say_in_batches_what_they_say_alone(name):
    build, expected_company = OTHERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    prompts = [*PROMPTS, [5, 6, 8], [30, 29], list(range(5, 25))]
    model.generation_config.eos_token_id = None
    expected = {i: greedy(model, p, [END], 8) for i, p in enumerate(prompts)}
    assert len({tuple(tokens) for tokens in expected.values()}) > 1
    assert continued(model, prompts, max_new_tokens=8) == expected
    model.generation_config.pad_token_id = END  # the one that generation pads with
    assert company(model, prompts) == expected_company
    assert company(model, prompts[:1]) == "any"
    assert shares_batches(model, zoo.tokenizer()) == (expected_company == "any")
    same_length = "none" if expected_company == "none" else "any"
    assert company(model, [[5, 6, 7], [5, 6, 8]]) == same_length
    assert company(model.bfloat16(), prompts) == expected_company  # rounding is not taken for it


def test_a_model_without_an_attention_mask_gets_no_padding():
    class Unmasked(LlamaForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
            assert kwargs.pop("attention_mask", None) is None
            return super().forward(
                input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs
            )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Unmasked(LlamaConfig(**zoo.GROUPED)).eval()
    model.generation_config.eos_token_id = None
    expected = {i: greedy(model, p, [END], 8) for i, p in enumerate(PROMPTS)}
    assert continued(model, max_new_tokens=8) == expected


def test_a_continuation_ends_with_its_end_token():
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    whole = [greedy(model, prompt, [END], 9) for prompt in PROMPTS]
    ends = whole[0][3]  # what the first one says in the fourth place shall end it
    model.generation_config.eos_token_id = [END, ends]
    found = continued(model, max_new_tokens=9)
    texts = generate_texts(model, tokenizer, PROMPTS, Decoding(9))
    for index, tokens in enumerate(whole):
        kept = tokens[: tokens.index(ends) + 1] if ends in tokens else tokens
        assert found[index] == kept
        said = kept[:-1] if kept[-1] in (END, ends) else kept
        assert texts[index] == tokenizer.decode(said)
    assert found[0][-1] == ends


def test_ends_of_model_and_tokenizer():
    model = zoo.tiny("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, zoo.tokenizer()) == [2, 7, 9]
    model.generation_config.eos_token_id = 7
    assert end_tokens(model, zoo.tokenizer()) == [2, 7]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, zoo.tokenizer()) == [2]


def test_the_models_own_settings_do_not_count_and_stay():
    model = zoo.tiny("llama")
    plain = continued(model, max_new_tokens=9)
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    model.generation_config = own
    assert continued(model, max_new_tokens=9) == plain
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_sampling_draws_from_the_softmax():
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    state = torch.get_rng_state()
    count = 4000
    texts = generate_texts(
        *(model, tokenizer, [[1, 8]] * count),
        Decoding(1, 3 * count, temperature=2.0, seed=3),
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
    model = zoo.tiny("llama")

    def draw(seed: int) -> dict[int, list[int]]:
        return continued(model, max_new_tokens=9, batch_tokens=30, temperature=1.0, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_models_window_ends_a_continuation_but_not_its_neighbours():
    model = zoo.tiny("gpt2")
    model.generation_config.eos_token_id = None
    longest = [1] + [8] * (zoo.WINDOW - 3)
    found = continued(model, [longest, [5, 6, 7]], max_new_tokens=9)
    assert found[0] == greedy(model, longest, [END], 2)
    assert found[1] == greedy(model, [5, 6, 7], [END], 9)
    assert len(found[1]) > 2  # in a batch with the other it would end there
    with pytest.raises(InputError, match="a prompt of 32 tokens leaves no room"):
        continued(model, [[8] * zoo.WINDOW], max_new_tokens=9)


def test_no_prompts_no_texts():
    assert generate_texts(zoo.tiny("llama"), zoo.tokenizer(), [], Decoding(9)) == []


def test_what_is_drawn_for_a_prompt_does_not_depend_on_the_others():
    model = zoo.tiny("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = [20]
    options = {"max_new_tokens": 9, "temperature": 1.5, "seed": 7}
    prompts = [*PROMPTS, PROMPTS[0]]
    together = continued(model, prompts, **options)
    assert continued(model, prompts, batch_tokens=1, **options) == together
    assert continued(model, prompts, batch_tokens=40, **options) == together
    for i, prompt in enumerate(PROMPTS):
        assert continued(model, [prompt], **options) == {0: together[i]}
    backwards = continued(model, PROMPTS[::-1], **options)
    assert [backwards[len(PROMPTS) - 1 - i] for i in range(5)] == [together[i] for i in range(5)]
    assert together[5] != together[0]  # the same prompt again is drawn for anew
