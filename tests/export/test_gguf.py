"""GGUF: read back by the gguf package, opened by transformers, decoded by llama.cpp itself (slow)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from aerogel.engine.exporting import source_of
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.export.gguf import Gguf
from aerogel.layers.linear import QuantLinear, cache_dequantized
from aerogel.layers.scaled_input import ScaledInput
from tests.saved import network, round_to_nearest, save, tokenizer
from tests.tiny import FAMILIES, output

LLAMA_CPP = Path(__file__).parents[2] / ".envs/llama-cpp"
Q_PROJ = "model.layers.0.self_attn.q_proj"
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def rows_back(weight_OI: Tensor, part: str, heads: int, kv_heads: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows: pairs side by side -> two halves."""
    count = {"attn_q": heads, "attn_k": kv_heads}.get(part)
    return weight_OI if count is None else weight_OI.view(count, -1, 2, weight_OI.shape[1]).transpose(1, 2).reshape(weight_OI.shape)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], gguf.GGUFReader]:
    """The tensors in float32 as the gguf package decodes them, and their types."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(values.copy()).reshape(tuple(int(size) for size in reversed(tensor.shape)))
    return tensors, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}, reader


def written(folder: Path, **options: str) -> Path:
    Gguf(**options).write(source_of(folder), folder.parent / "gguf")  # type: ignore[arg-type]
    return folder.parent / "gguf/model.gguf"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("scheme", "block"),
    [
        ("W4A16_G32", "Q4_0"), ("W3A16_G64", "Q4_0"), ("W4A16_CHANNEL", "Q4_0"), ("W4A16_G32_ASYM", "Q4_1"), ("W2A16_G64_ASYM", "Q4_1"),
        ("W8A16_G32", "Q8_0"), ("W5A16_CHANNEL", "Q8_0"),
    ],
)  # fmt: skip
def test_codes_and_scales_come_back(kind: str, scheme: str, block: str, tmp_path: Path) -> None:
    given = network(scheme, kind=kind, dtype=torch.float16, processor=tokenizer())
    save(given, tmp_path / "master")
    tensors, types, _ = read(written(tmp_path / "master"))
    for layer in range(2):
        for ours, theirs in PARTS.items():
            linear = given.module.get_submodule(f"model.layers.{layer}.{ours}")
            assert isinstance(linear, QuantLinear)
            name = f"blk.{layer}.{theirs}.weight"
            assert types[name] == block
            weight_OI = tensors[name] if kind != "llama" else rows_back(tensors[name], theirs, 4, 2)
            expected = linear.dequantized(torch.float32)
            if linear.scheme.weights.symmetric:
                assert weight_OI.equal(expected), name
            else:  # the offset of a block is a product rounded to half precision, at most 15 scales large
                error = (weight_OI - expected).abs().max(1).values
                assert (error <= 2.0**-11 * 15 * linear.grid().scale.max(1).values).all(), name


def test_everything_else_is_carried_over_exactly(tmp_path: Path) -> None:
    given = network("W4A16_G32", dtype=torch.bfloat16, processor=tokenizer())
    save(given, tmp_path / "master")
    tensors, types, reader = read(written(tmp_path / "master"))
    state = given.module.state_dict()
    pairs = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight", "output_norm.weight": "model.norm.weight"}
    pairs |= {"blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight"}
    pairs |= {"blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight"}
    assert all(tensors[theirs].equal(state[ours].float()) for theirs, ours in pairs.items())
    assert {types[name] for name in pairs} == {"BF16", "F32"}
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    config = given.config
    assert config is not None
    assert fields == {
        "llama.vocab_size": 128, "llama.block_count": 2, "llama.context_length": 128, "llama.embedding_length": 64,
        "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": pytest.approx(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
    }  # fmt: skip


def test_transformers_opens_it_and_gives_our_logits_and_tokens(tmp_path: Path) -> None:
    given = network("W4A16_G32", dtype=torch.float16, processor=tokenizer())
    given.module.float()
    save(given, tmp_path / "master")
    path = written(tmp_path / "master")
    plain = transformers.GgufConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=plain
    )
    for call in FAMILIES["llama"].calls(2):
        with cache_dequantized(given.module):
            torch.testing.assert_close(output(theirs.eval(), call), output(given.module, call), rtol=1e-4, atol=1e-5)
    opened = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "the hat and the man"
    assert opened(text)["input_ids"] == given.processor(text)["input_ids"]


@pytest.mark.parametrize(
    ("scheme", "word"),
    [
        ("W8A8", "quantizes inputs"),
        ("W8A16_G32_ASYM", "asymmetric with more than 4 bits"),
        ("W4A16_G16", "do not tile the scales"),
        ("MXFP4A16", "fp4_e2m1 weights"),
    ],
)
def test_what_blocks_cannot_hold_is_refused_or_rounded_anew_when_asked(scheme: str, word: str, tmp_path: Path) -> None:
    given = network(scheme, processor=tokenizer())
    save(given, tmp_path / "master")
    reasons = Gguf().refuse(source_of(tmp_path / "master"))
    assert len(reasons) == 14
    assert all(word in reason and "requantize=Q8_0" in reason for reason in reasons)
    with pytest.raises(AerogelError, match=word):
        written(tmp_path / "master")
    assert not (tmp_path / "gguf").exists()
    tensors, types, _ = read(written(tmp_path / "master", requantize="Q8_0"))
    linear = given.module.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(linear, QuantLinear)
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    expected = linear.dequantized(torch.float32)
    assert (tensors["blk.0.ffn_down.weight"] - expected).norm() < 0.01 * expected.norm()


def test_activation_order_and_scaled_inputs_are_refused(tmp_path: Path) -> None:
    given = network(act_order=True, processor=tokenizer())
    inner = given.module.get_submodule(Q_PROJ)
    assert isinstance(inner, QuantLinear)
    save(given, tmp_path / "a")
    assert all("activation order" in reason for reason in Gguf().refuse(source_of(tmp_path / "a")))
    given.module.set_submodule(Q_PROJ, ScaledInput(inner, torch.ones(inner.in_features)))
    save(given, tmp_path / "b")
    assert Gguf().refuse(source_of(tmp_path / "b"))[0] == f"{Q_PROJ} divides its input by a scale for each channel"


def test_architectures_and_tokenizers_without_a_word_in_gguf_are_refused(tmp_path: Path) -> None:
    save(network(kind="opt"), tmp_path / "opt")
    assert Gguf().refuse(source_of(tmp_path / "opt")) == ["the architecture opt is not one of llama, mistral, qwen2, qwen3"]
    save(network(kind="mistral", processor=tokenizer()), tmp_path / "mistral")
    assert Gguf().refuse(source_of(tmp_path / "mistral")) == ["it attends to a sliding window of 8, which llama.cpp does not do for it"]
    save(network(), tmp_path / "bare")
    assert Gguf().refuse(source_of(tmp_path / "bare")) == ["it has no tokenizer.json, and a GGUF file carries its tokenizer"]
    given = tokenizer()
    given.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    save(network(processor=given), tmp_path / "words")
    assert "byte-level" in Gguf().refuse(source_of(tmp_path / "words"))[0]


def test_the_tokenizer_says_how_text_is_split_and_whether_it_begins_with_a_token(tmp_path: Path) -> None:
    given = tokenizer()
    split = [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    given.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    given.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    save(network(processor=given), tmp_path / "master")
    fields = read(written(tmp_path / "master"))[2].fields
    said = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert (said["model"], said["pre"], said["add_bos_token"], said["bos_token_id"], said["eos_token_id"]) == ("gpt2", "smollm", True, 1, 2)
    assert said["tokens"] == given.convert_ids_to_tokens(range(128))
    assert said["token_type"] == [3] * 3 + [1] * 125
    assert said["merges"][0] == "h e"


DECODE = """
import json, sys
from llama_cpp import Llama
asked = json.loads(sys.argv[2])
model = Llama(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
tokens = model.tokenize(asked["text"].encode(), add_bos=False, special=True)
said = []
for token in model.generate(asked["ids"], temp=0.0, top_k=1, repeat_penalty=1.0):
    said.append(token)
    if len(said) == asked["count"]:
        break
print(json.dumps({"tokens": tokens, "said": said}))
"""


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """A Python with llama-cpp-python in it, built on first use (10 to 20 minutes)."""
    python = LLAMA_CPP / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(LLAMA_CPP)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "llama-cpp-python"], check=True)
    return python


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16_G32_ASYM", "W4A16_G32", "W8A16_G64"])
def test_llama_cpp_decodes_the_same_tokens_as_generate(scheme: str, llama_cpp: Path, tmp_path: Path) -> None:
    given = open_model("smollm2-135m", lazy=False)
    round_to_nearest(given.module, scheme, dtype=given.stored_dtype)
    save(given, tmp_path / "master")
    path = written(tmp_path / "master")
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    text = given.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = given.processor(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with cache_dequantized(given.module):
        said = given.module.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    asked = json.dumps({"text": text, "ids": ids[0].tolist(), "count": len(said)})
    done = subprocess.run([str(llama_cpp), "-c", DECODE, str(path), asked], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["tokens"] == ids[0].tolist()
    assert answer["said"] == said
