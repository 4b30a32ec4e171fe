"""Small networks rounded to nearest and saved: what tests of saving, loading and exporting start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import nn

from aerogel.io.save import new_folder, write
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.model.network import Network
from aerogel.numerics.quantize import Grid, quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from tests.tiny import FAMILIES, VOCABULARY, family_of

SchemeOf = Callable[[str], str | None]


def round_to_nearest(
    module: nn.Module, scheme: str | SchemeOf | None, act_order: bool = False, dtype: torch.dtype | None = None
) -> nn.Module:
    """Quantize the float linears, all but lm_head or those that `scheme` names a scheme for; `dtype` is that of stored scales."""
    for name, linear in list(module.named_modules()):
        chosen = scheme(name) if callable(scheme) else None if name == "lm_head" else scheme
        if isinstance(linear, nn.Linear) and chosen is not None:
            module.set_submodule(name, quantized(linear, Scheme.parse(chosen), act_order, dtype))
    return module


def quantized(linear: nn.Linear, scheme: Scheme, act_order: bool = False, dtype: torch.dtype | None = None) -> QuantLinear:
    """The linear on its min-max grid; with `act_order` its groups take columns in a shuffled order."""
    columns = linear.in_features
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)) if act_order else torch.arange(columns)
    g_idx = None
    if act_order:
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = torch.arange(columns, dtype=torch.int32) // (scheme.group or columns)
    grid = stored_grid(weight_grid(linear.weight[:, order], scheme.weights), dtype or linear.weight.dtype)
    static = Grid(torch.tensor(0.03125)) if scheme.inputs is not None and not scheme.inputs.dynamic else None
    codes = quantize(linear.weight, grid, scheme.weights, g_idx)
    return QuantLinear.from_codes(linear, scheme, codes, grid, g_idx, static, dtype)


def network(
    scheme: str | SchemeOf | None = "W4A16_G32",
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    act_order: bool = False,
    **fields: Any,
) -> Network:
    """A tiny network of tests/tiny.py with quantized linears."""
    module = FAMILIES[kind].build()
    for parameter in module.parameters():  # buffers of rotary embeddings stay float32, as in transformers
        parameter.data = parameter.data.to(dtype)
    return Network(round_to_nearest(module, scheme, act_order), family_of(kind), **fields)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of 128 tokens for lower-case text: three special ones, printable ASCII, merges."""
    text = ["the cat sat on the mat and the dog ran to the man in the sun, then it hid in a hat"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(text * 2, trainer)
    assert model.get_vocab_size() == VOCABULARY
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save(given: Network, output: Path, **options: Any) -> dict[str, str]:
    """Save a network and return its checksums."""
    with new_folder(output) as folder:
        return write(given, folder, **options)
