"""A tokenizer that can chat, for models that know 101 tokens."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


def tokenizer_of(template=None):
    """A token a character, and three for a template."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<|end|>": 2, "<|turn|>": 3}
    vocabulary |= {letter: number for number, letter in enumerate(string.printable[:97], 4)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in list(vocabulary)[:4]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|turn|>"],
        chat_template=template,
    )
