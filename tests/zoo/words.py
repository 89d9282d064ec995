"""A tiny tokenizer: one token a word."""

from __future__ import annotations

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from zoo.families import VOCABULARY

SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "Question:", "Answer:"]
WORDS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", "0", "1", "2", "3"]
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a word, ids in the order of ``WORDS``; with ``chat``, a template with roles."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    assert len(WORDS) == VOCABULARY
    return made
