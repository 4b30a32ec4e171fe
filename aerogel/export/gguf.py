"""GGUF, for llama.cpp and what is built on it: integer codes carried over into blocks of 32 that can hold them.

Q4_0: value = d (q - 8).  Q4_1: value = d q + m.  Q8_0: value = d q.  q are the master's integer codes; d and m are half precision, the
only one these blocks have. O outputs, I inputs, B blocks of a row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.export.exporter import Exporter, Master, Source, inexpressible, not_language
from aerogel.io.gguf_contract import BLOCK, columns_reason, model_reasons, scheme_reason, tokenizer_reason
from aerogel.io.save import new_folder
from aerogel.layers.layout import Stored
from aerogel.numerics.quantize import expand
from aerogel.numerics.scheme import Scheme

try:
    import gguf

    from aerogel.export.gguf_tokenizer import add_tokenizer
except ImportError as error:
    raise AerogelError("GGUF files are written through the package gguf: pip install 'aerogel[gguf]'") from error

Type = gguf.GGMLQuantizationType
_SUFFIXES = (".weight", ".bias")
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
_FILE_TYPES = {
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.F32: gguf.LlamaFileType.ALL_F32,
}


class _Item(NamedTuple):
    """One tensor of the file: its name there, its name in the master, its type and shape, and whether integer codes are carried over."""

    name: str
    source: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    carried: bool


@dataclass(frozen=True)
class Gguf(Exporter):
    """One GGUF file for llama.cpp, tokenizer included: Q4_0, Q4_1 and Q8_0 blocks with unchanged integer codes."""

    requantize: Literal["Q4_0", "Q4_1", "Q8_0"] | None = None
    """Block type for layers that no block type can represent exactly, which are requantized; None refuses them."""

    def refuse(self, source: Source) -> list[str]:
        """Return the architectures, tokenizers and schemes that GGUF cannot express, or only with other numbers."""
        master = Master.open(source)
        if reasons := not_language(master):
            return reasons
        config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True)
        reasons = _network_reasons(master, config)
        if not reasons:
            for name in master.linears:
                if (reason := self._reason(master, name)) is not None:
                    reasons.append(f"{name}: {reason}")
        return reasons

    def write(self, source: Source, output: Path) -> None:
        """Write output/model.gguf, tensor by tensor."""
        self.accept(source)
        master = Master.open(source)
        config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True)
        items = list(self._items(master, config))
        with new_folder(output) as target:
            writer = gguf.GGUFWriter(target / "model.gguf", gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]])
            _add_settings(writer, config, items, source.folder.absolute().name)
            add_tokenizer(writer, source.folder, config.vocab_size)
            for item in items:
                size = math.prod(gguf.quant_shape_to_byte_shape(item.shape, item.type))
                writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), size, item.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for item in items:
                writer.write_tensor_data(_data(master, item, config).numpy())
            writer.close()

    def _reason(self, master: Master, name: str) -> str | None:
        if (reason := columns_reason(master.shape(name)[1])) is not None:
            return reason
        reason = _inexpressible(master, name)
        if reason is None or self.requantize is not None:
            return None
        return f"{reason}; requantize=Q8_0 (or Q4_1, Q4_0) rounds it anew"

    def _items(self, master: Master, config: Any) -> Iterator[_Item]:
        names = gguf.get_tensor_name_map(_ARCHITECTURES[config.model_type], config.num_hidden_layers)
        for source in master.floats:
            shape = master.checkpoint.shape(source)
            # llama.cpp adds and multiplies vectors in float32 only.
            kind = Type.F32 if len(shape) == 1 else _FLOATS[master.checkpoint.dtype(source)]
            yield _Item(str(names.get_name(source, _SUFFIXES)), source, kind, shape, False)
        for source, assigned in master.linears.items():
            carried = _inexpressible(master, source) is None
            kind = _block_type(assigned.scheme) if carried else Type[str(self.requantize)]
            yield _Item(f"{names.get_name(source)}.weight", source, kind, master.shape(source), carried)


def _data(master: Master, item: _Item, config: Any) -> Tensor:
    """The bytes or numbers of one tensor, rows in GGUF's order."""
    rows = _row_order(item, config)
    if item.carried:
        data = blocks(master.stored(item.source), master.linears[item.source].scheme)
    elif item.source in master.linears:
        data = torch.from_numpy(gguf.quantize(master.dequantized(item.source).numpy(), item.type))
    else:
        data = master.checkpoint.tensor(item.source)
        data = data.view(torch.int16) if item.type == Type.BF16 else data.float() if item.type == Type.F32 else data
    return data if rows is None else data[rows]


def blocks(stored: Stored, scheme: Scheme) -> Tensor:
    """Return the bytes (O, bytes of a row) of Q4_0, Q4_1 or Q8_0 blocks that hold the integer codes of one linear."""
    codes_OI, grid, _, _ = stored
    rows, columns = codes_OI.shape
    kind = _block_type(scheme)
    scale_OB = expand(grid.scale, columns, scheme.weights.granularity).expand(rows, columns)[:, ::BLOCK].contiguous()
    heads = [scale_OB]
    if kind == Type.Q8_0:
        body = codes_OI.view(torch.uint8).unflatten(1, (-1, BLOCK))
    else:
        lowest = -8
        if grid.zero is not None:
            lowest = int(scheme.weights.format.low)
            zero_OB = expand(grid.zero, columns, scheme.weights.granularity).expand(rows, columns)[:, ::BLOCK]
            heads.append(scale_OB * (lowest - zero_OB.float()))
        halves = (codes_OI - lowest).to(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2))
        body = halves[:, :, 0] | (halves[:, :, 1] << 4)
    head = torch.stack(heads, dim=2).half().view(torch.uint8)
    return torch.cat((head, body), dim=2).flatten(1)


def _block_type(scheme: Scheme) -> gguf.GGMLQuantizationType:
    if not scheme.weights.symmetric:
        return Type.Q4_1
    return Type.Q4_0 if scheme.bits <= 4 else Type.Q8_0


def _inexpressible(master: Master, name: str) -> str | None:
    """Return why no block type holds the integer codes of a linear as they are."""
    assigned = master.linears[name]
    highest = float(master.checkpoint.tensor(f"{name}.weight_scale").float().max())
    return scheme_reason(assigned.scheme, assigned.act_order) or (
        # Smaller scales than the largest may lose digits: what they scale is as much smaller.
        None if 2.0**-14 <= highest <= 65504 else f"its largest scale is {highest:.1e}, which half precision cannot hold"
    )


def _network_reasons(master: Master, config: Any) -> list[str]:
    """Return what GGUF or llama.cpp cannot express apart from the linear layers."""
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        return list(model_reasons(config))
    reasons = [*inexpressible(master), *model_reasons(config)]
    if (reason := tokenizer_reason(master.folder, config.vocab_size)) is not None:
        reasons.append(reason)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    nameless = [name for name in master.floats if names.get_name(name, _SUFFIXES) is None]
    return reasons + [f"the tensor {name} has no name in GGUF" for name in nameless]


def _add_settings(writer: gguf.GGUFWriter, config: Any, items: list[_Item], name: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    sizes = Counter[gguf.GGMLQuantizationType]()
    for item in items:
        sizes[item.type] += math.prod(item.shape) if ".blk." in f".{item.name}" else 0
    writer.add_file_type(_FILE_TYPES[sizes.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _row_order(item: _Item, config: Any) -> Tensor | None:
    """The order of rows where llama.cpp keeps the two halves of a rotary pair side by side, or None where it does not."""
    if _ARCHITECTURES[config.model_type] != gguf.MODEL_ARCH.LLAMA or not any(part in item.name for part in (".attn_q.", ".attn_k.")):
        return None
    heads = config.num_attention_heads if ".attn_q." in item.name else config.num_key_value_heads
    return torch.arange(item.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
