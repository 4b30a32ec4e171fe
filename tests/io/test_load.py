"""Load: every source gives the network that transformers or diffusers would give, and every mistake one clear line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import huggingface_hub
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import aerogel
from aerogel import catalog
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.io.load import computing_dtype, part_of
from aerogel.io.save import new_folder, write
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.model.network import Network
from aerogel.numerics.quantize import quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from tests.folders import model_folder
from tests.saved import network, save
from tests.tiny import FAMILIES, output

TRANSFORMERS = [name for name, tiny in FAMILIES.items() if tiny.family not in catalog.names("families")]
AUTO = dict.fromkeys(("qwen2_5_vl", "llava", "qwen3_vl_moe", "internvl"), transformers.AutoModelForImageTextToText)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    FAMILIES[name].build().to(dtype).save_pretrained(folder)
    return folder


def resident(network: Network) -> nn.Module:
    assert network.checkpoint is not None
    network.checkpoint.materialise(network.module)
    return network.module


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_lazy_opening_gives_the_logits_of_transformers_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = AUTO.get(name, transformers.AutoModelForCausalLM).from_pretrained(saved(name, tmp_path)).eval()
    network = open_model(tmp_path)
    for call in FAMILIES[name].calls(2):
        if name == "gpt_oss":  # columns in turns are summed in another order
            torch.testing.assert_close(output(resident(network), call), output(whole, call), rtol=0, atol=2e-6)
        else:
            assert torch.equal(output(resident(network), call), output(whole, call))


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "llava", "qwen3_vl_moe", "gpt_oss"])
def test_only_the_blocks_stay_on_disk(name: str, tmp_path: Path) -> None:
    network = open_model(saved(name, tmp_path))
    blocks = tuple(f"{block}." for block in network.blocks())
    assert blocks
    for parameter, tensor in network.module.named_parameters():
        assert tensor.is_meta == parameter.startswith(blocks), parameter
    assert not any(buffer.is_meta for buffer in network.module.buffers())
    assert network.origin == tmp_path
    assert network.family.name == name


def test_a_block_is_read_when_it_is_visited(tmp_path: Path) -> None:
    network = open_model(saved("mixtral", tmp_path))
    original = load_file(tmp_path / "model.safetensors")
    checkpoint = network.checkpoint
    assert checkpoint is not None
    block = network.blocks()["model.layers.1"]
    checkpoint.materialise(block, "model.layers.1")
    expert = block.get_submodule("mlp.experts.3.w2")
    assert torch.equal(expert.weight, original["model.layers.1.block_sparse_moe.experts.3.w2.weight"])
    checkpoint.release(block)
    assert all(parameter.is_meta for parameter in block.parameters())


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    module = resident(open_model(saved("qwen2", tmp_path)))
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_not_lazy_is_all_resident(tmp_path: Path) -> None:
    network = open_model(saved("llama", tmp_path), lazy=False)
    assert network.checkpoint is None
    assert not any(parameter.is_meta for parameter in network.module.parameters())
    assert not network.module.training


def test_sampling_settings_come_along(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    transformers.GenerationConfig(max_new_tokens=17, eos_token_id=[2, 5]).save_pretrained(tmp_path)
    settings = open_model(tmp_path).module.generation_config
    assert (settings.max_new_tokens, settings.eos_token_id) == (17, [2, 5])


def test_a_tokenizer_comes_along(tmp_path: Path) -> None:
    assert open_model(saved("llama", tmp_path)).processor is None
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    assert open_model(tmp_path).processor("b")["input_ids"] == [1]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": ""}))
    with pytest.raises(AerogelError, match=r"its tokenizer or processor cannot be read \(RecursionError"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("capabilities", "stored", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": False}, torch.bfloat16, torch.float32),
        ({"avx512_bf16": True}, torch.float16, torch.float32),
        ({"avx512_fp16": True}, torch.float16, torch.float16),
        ({}, torch.float64, torch.float64),
    ],
)
def test_computing_in_what_the_machine_has_instructions_for(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], stored: torch.dtype, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "bf16 fp16", **capabilities})
    assert computing_dtype(stored) == expected


def test_the_stored_dtype_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    saved("llama", tmp_path, torch.bfloat16)
    network = open_model(tmp_path)
    assert network.stored_dtype == torch.bfloat16
    assert {parameter.dtype for parameter in resident(network).parameters()} == {torch.float32}
    asked = open_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in resident(asked).parameters()} == {torch.bfloat16}
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    call = FAMILIES["llama"].calls(1)[0]
    assert torch.equal(output(asked.module, call), output(whole, call))


def test_names_of_another_time_are_read_whole_by_transformers(tmp_path: Path) -> None:
    module = FAMILIES["qwen2"].build()
    module.model.save_pretrained(tmp_path)  # names without the first `model.`
    assert type(open_model(tmp_path).module).__name__ == "Qwen2Model"
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": None}))
    network = open_model(tmp_path)
    call = FAMILIES["qwen2"].calls(1)[0]
    assert network.checkpoint is None
    assert torch.equal(output(network.module, call), output(module, call))


def test_weights_that_are_not_there_are_never_invented(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(AerogelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(tmp_path)


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W8A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "llava", "dit", "wan"])
def test_a_compressed_folder_opens_as_it_was_in_memory(name: str, scheme: str, tmp_path: Path) -> None:
    parsed = Scheme.parse(scheme)
    network = open_model(FAMILIES[name].build())
    for full_name, linear in list(network.module.named_modules()):
        if isinstance(linear, nn.Linear) and full_name != "lm_head":
            grid = stored_grid(weight_grid(linear.weight, parsed.weights), linear.weight.dtype)
            codes = quantize(linear.weight, grid, parsed.weights)
            network.module.set_submodule(full_name, QuantLinear.from_codes(linear, parsed, codes, grid))
    with new_folder(tmp_path / "out") as folder:
        write(network, folder)
    again = open_model(tmp_path / "out")
    if again.checkpoint is not None:
        codes = [
            tensor
            for block in again.blocks().values()
            for part in block.modules()
            if isinstance(part, QuantLinear)
            for tensor in part.buffers()
        ]
        assert codes
        assert all(tensor.is_meta for tensor in codes)
        again.checkpoint.materialise(again.module)
    for call in FAMILIES[name].calls(1):
        assert torch.equal(output(again.module, call), output(network.module, call))


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("scheme", ["FP8_STATIC", "W8A8_STATIC", "NVFP4A16"])
def test_a_single_scale_may_be_a_scalar_or_a_vector_of_one(scheme: str, lazy: bool, tmp_path: Path) -> None:
    given = network(scheme)
    save(given, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    single = [name for name, tensor in tensors.items() if tensor.shape == (1,)]
    assert len(single) == (28 if scheme == "FP8_STATIC" else 14)
    save_file(tensors | {name: tensors[name].reshape(()) for name in single}, tmp_path / "model.safetensors")
    opened = open_model(tmp_path, lazy=lazy)
    module = resident(opened) if lazy else opened.module
    for call in FAMILIES["llama"].calls(1):
        assert torch.equal(output(module, call), output(given.module, call))


def test_parts_that_are_kept_in_float32_stay_so(tmp_path: Path) -> None:
    module = FAMILIES["wan"].build()
    module.save_pretrained(tmp_path)
    network = open_model(tmp_path, dtype=torch.bfloat16)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert {name: parameter.dtype for name, parameter in network.module.named_parameters()} == expected
    assert set(expected.values()) == {torch.float32, torch.bfloat16}


def test_quantization_of_others_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(AerogelError, match="gptq"):
        open_model(tmp_path)


def test_live_modules_are_taken_as_they_are() -> None:
    module = FAMILIES["llama"].build()
    network = open_model(module)
    assert network.module is module
    assert (network.origin, network.checkpoint, network.processor) == (None, None, None)
    processor = object()
    assert open_model((module, processor)).processor is processor
    assert open_model(network) is network


def test_a_live_module_must_have_its_weights() -> None:
    with pytest.raises(AerogelError, match=r"embed_tokens.*meta device"):
        open_model(FAMILIES["llama"].build().to("meta"))


def test_experts_of_a_live_module_come_apart() -> None:
    module = FAMILIES["qwen3_moe"].build()
    call = FAMILIES["qwen3_moe"].calls(1)[0]
    before = output(module, call)
    network = open_model(module)
    assert isinstance(network.module.get_submodule("model.layers.1.mlp.experts.3.up_proj"), nn.Linear)
    assert torch.allclose(output(network.module, call), before, atol=1e-5)


def _dit_pipeline() -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4)
    return diffusers.DiTPipeline(transformer=FAMILIES["dit"].build(), vae=vae, scheduler=diffusers.DDIMScheduler())


@pytest.mark.parametrize("lost", ["folder", "entry"])
def test_a_pipeline_that_lacks_a_part_is_refused_by_name(lost: str, tmp_path: Path) -> None:
    _dit_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    if lost == "entry":
        index["scheduler"] = [None, None]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(AerogelError, match=rf"diffusers cannot open this pipeline .*scheduler.* or open {tmp_path}/transformer alone"):
        open_model(tmp_path)
    assert open_model(tmp_path / "transformer").family.name == "dit"


def test_pipelines_open_live_and_from_a_folder(tmp_path: Path) -> None:
    pipeline = _dit_pipeline()
    live = open_model(pipeline)
    assert live.module is pipeline.transformer
    assert live.processor is pipeline
    pipeline.save_pretrained(tmp_path)
    assert part_of(tmp_path) == part_of(tmp_path / "transformer") == tmp_path / "transformer"
    network = open_model(tmp_path)
    call = FAMILIES["dit"].calls(1)[0]
    assert network.family.name == "dit"
    assert isinstance(network.processor, diffusers.DiTPipeline)
    assert network.processor.transformer is network.module
    assert torch.equal(output(network.module, call), output(pipeline.transformer, call))


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_a_denoiser_opens_from_a_folder_of_its_own(name: str, tmp_path: Path) -> None:
    module = FAMILIES[name].build()
    module.save_pretrained(tmp_path)
    network = open_model(tmp_path)
    call = FAMILIES[name].calls(1)[0]
    assert network.family.name == name
    assert torch.equal(output(network.module, call), output(module, call))


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "abacus"}))
    with pytest.raises(AerogelError, match=r"config\.json: transformers \d.* has no such model .*abacus.*; upgrade transformers, or give"):
        open_model(tmp_path)


def test_what_is_not_a_model_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"no folder.*did you mean smollm2-135m"):
        open_model("smollm2-135")
    with pytest.raises(AerogelError, match="no folder"):
        open_model("/no/such/place")
    (tmp_path / "file.bin").touch()
    with pytest.raises(AerogelError, match="is a file"):
        open_model(tmp_path / "file.bin")
    with pytest.raises(AerogelError, match=r"config\.json is missing"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AerogelError, match=r"config\.json is not JSON"):
        open_model(tmp_path)
    with pytest.raises(AerogelError, match="cannot open a int"):
        open_model(5)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(AerogelError, match="only safetensors are opened"):
        open_model(tmp_path)


def test_a_damaged_checkpoint_is_found_at_once(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AerogelError, match=re.escape(str(path))):
        open_model(tmp_path)


def test_the_reference_model_speaks() -> None:
    network = open_model("smollm2-135m", lazy=False)
    assert network.stored_dtype == torch.bfloat16
    prompt = network.processor("The capital of France is", return_tensors="pt")
    answer = network.module.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert network.processor.decode(answer[0, -1]) == " Paris"
    assert "<|im_start|>user\nHi<|im_end|>" in network.processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_python_files_of_a_model_run_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = saved("llama", tmp_path / "model")
    code = "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}))
    assert type(open_model(folder).module).__name__ == "LlamaForCausalLM", "transformers has a class of its own"
    assert type(open_model(folder, trust_remote_code=True).module).__name__ == "OwnForCausalLM"


def test_a_module_in_a_wrapper_is_refused() -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(AerogelError, match=r"LlamaForCausalLM is wrapped by torch\.compile"):
        open_model(torch.compile(model))

    class Wrapped(nn.Module):
        peft_config: ClassVar[dict[str, object]] = {}

        def get_base_model(self) -> nn.Module:
            return model

    with pytest.raises(AerogelError, match=r"LlamaForCausalLM is wrapped by PEFT.*merge_and_unload"):
        open_model(Wrapped())


@pytest.mark.parametrize("wrong", [{}, "x", [None], True, 1.5])
def test_special_tokens_of_generation_that_are_no_ids_are_named(wrong: Any, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "in", num_hidden_layers=1)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token_id": wrong}))
    with pytest.raises(AerogelError, match=r"generation_config\.json: bos_token_id is .*, expected the id of a token or a list of ids"):
        aerogel.load(folder)
