"""A word tokenizer built offline, for tests that need real ids and no download."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("the", "of", "and", "to", "in", "a", "we", "our", "that", "is", "for", "people", "congress", "war", "peace", "world")
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def tokenizer(eos: bool = True, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """Build one: ids are [UNK] 0, </s> 1, <s> 2, then WORDS; `bos` puts <s> before every text."""
    vocabulary = {word: index for index, word in enumerate(("[UNK]", "</s>", "<s>", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>" if eos else None, bos_token="<s>" if bos else None
    )
    made.chat_template = CHAT if chat else None
    return made
