"""What is fuzzed: `check(data)` gives bytes to one parser as the content of its file, and only AerogelError may come out.

Each has sound contents, which are what examples are made from.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import save_file

import aerogel
from aerogel.data import chats, prompts, text
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.io.adapters import WEIGHTS, adapter_in, merging, require_mergeable
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.dequantize import dequantizer_of
from aerogel.io.json_files import parse_object, read_object
from aerogel.io.quantized import OWN, assignments, quantization_of
from aerogel.io.record import files
from aerogel.recipe import Recipe
from aerogel.report import page, search
from tests import image_pipelines, words
from tests.folders import model_folder
from tests.report import test_cache_search, test_skip_search

LINEARS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head")
LAYOUTS: tuple[dict[str, object], ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
)
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "owner/base",
    "r": 8,
    "lora_alpha": 16,
    "alpha_pattern": {"q_proj": 4},
    "use_rslora": True,
    "rank_pattern": {},
}
CHATS = (
    [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "hello"},
            ]
        }
    ],
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": None, "tool_calls": []},
            ]
        }
    ],
    [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}],
    [{"instruction": "add", "input": "1 2", "output": "3"}, {"prompt": "a", "completion": "b"}, {"text": "plain"}],
)


@cache
def _shelf() -> Path:
    """A model, and in `out` the same compressed, in a folder that is there as long as the process."""
    folder = Path(_held().name)
    words.tokenizer()
    model_folder(folder / "model", num_hidden_layers=1)
    image_pipelines.classes().transformer.save_pretrained(folder / "dit")
    recipe = {"name": "fuzzed", "steps": [{"rtn": {"scheme": "W4A16_G32"}}, {"kv_cache_fp8": {}}]}
    aerogel.compress(folder / "model", recipe, output=folder / "out", measures=())
    return folder


@cache
def _held() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-")


@cache
def _beside(name: str, original: str) -> Path:
    """A copy of a folder of the shelf that one target changes."""
    return Path(shutil.copytree(_shelf() / original, _shelf() / name))


@contextmanager
def _refusing() -> Iterator[None]:
    """Let only AerogelError end the work, which has to be one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except AerogelError as error:
            assert "\n" not in str(error).strip(), str(error)  # noqa: PT017


def check_header(data: bytes) -> None:
    """Open a file of weights and read every tensor."""
    folder = _beside("header", "model")
    (folder / "model.safetensors").write_bytes(data)
    with _refusing():
        checkpoint = Checkpoint.open(folder)
        checkpoint.verify()
        for name in checkpoint.names():
            assert tuple(checkpoint.tensor(name).shape) == tuple(checkpoint.shape(name))


def check_record(data: bytes) -> None:
    """Read aerogel.json and write the report."""
    folder = _beside("record", "out")
    (folder / "aerogel.json").write_bytes(data)
    with _refusing():
        page.page(files.read(folder))


def check_recipe(data: bytes) -> None:
    """Read a recipe file."""
    path = _shelf() / "recipe.yaml"
    path.write_bytes(data)
    with _refusing():
        recipe, _ = Recipe.parse_run(str(path))
        assert Recipe.parse(recipe.as_dict()).as_dict() == recipe.as_dict()


def check_config(data: bytes) -> None:
    """Open a compressed folder with this config.json."""
    folder = _beside("config", "out")
    (folder / "config.json").write_bytes(data)
    with _refusing():
        open_model(folder, device="cpu")


def check_denoiser(data: bytes) -> None:
    """Open a denoiser of diffusers with this config.json."""
    folder = _beside("denoiser", "dit")
    (folder / "config.json").write_bytes(data)
    with _refusing():
        open_model(folder, device="cpu")


def check_quantization(data: bytes) -> None:
    """Read a quantization_config: ours, and those of others."""
    with _refusing():
        settings = parse_object(data, "quantization_config", "copy it again")
        dequantizer_of({"quantization_config": settings}, _shelf() / "model")
    with _refusing():
        found = quantization_of({"quantization_config": parse_object(data, "quantization_config", "copy it again")})
        if found.get("quant_method") in OWN:
            assignments(found, list(LINEARS))


def check_chats(data: bytes) -> None:
    """Read chats, text and prompts from files of records."""
    for suffix in (".jsonl", ".json", ".csv", ".txt"):
        path = _shelf() / f"data{suffix}"
        path.write_bytes(data)
        with _refusing():
            list(text.read(str(path), words.tokenizer()))
        with _refusing():
            if chats.are_at(path):
                chats.read(path)
        with _refusing():
            prompts.read(str(path))


def check_adapter(data: bytes) -> None:
    """Merge an adapter into a model, whatever base its configuration names."""
    folder, base = _shelf() / "adapter", _shelf() / "model"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(data)
    name, rank = "model.layers.0.self_attn.q_proj", 4
    outputs, inputs = Checkpoint.open(base).shape(f"{name}.weight")
    parts = {"lora_A.weight": torch.ones(rank, inputs), "lora_B.weight": torch.ones(outputs, rank)}
    save_file({f"base_model.model.{name}.{part}": tensor for part, tensor in parts.items()}, folder / WEIGHTS)
    with _refusing():
        adapter = adapter_in(folder)
        assert adapter is not None
        require_mergeable(adapter)
        Checkpoint.open(base, dequantize=merging(adapter, None)).tensor(f"{name}.weight")


def check_search(data: bytes) -> None:
    """Write the report of a search."""
    path = _shelf() / "search.json"
    path.write_bytes(data)
    with _refusing():
        search.page(read_object(path), path)


class Target(NamedTuple):
    """A parser and sound contents of its file."""

    check: Callable[[bytes], None]
    sound: Callable[[], list[bytes]]


def _json(*values: object) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _quantizations() -> list[bytes]:
    config = json.loads((_shelf() / "out" / "config.json").read_text())
    return _json(config["quantization_config"], *LAYOUTS)


TARGETS = {
    "header": Target(check_header, lambda: [(_shelf() / "model" / "model.safetensors").read_bytes()]),
    "record": Target(check_record, lambda: [(_shelf() / "out" / "aerogel.json").read_bytes()]),
    "recipe": Target(
        check_recipe, lambda: [path.read_bytes() for path in sorted((Path(aerogel.__file__).parent / "recipes").glob("*.yaml"))]
    ),
    "config": Target(check_config, lambda: [(_shelf() / "out" / "config.json").read_bytes()]),
    "denoiser": Target(check_denoiser, lambda: [(_shelf() / "dit" / "config.json").read_bytes()]),
    "quantization": Target(check_quantization, _quantizations),
    "chats": Target(
        check_chats, lambda: ["\n".join(map(json.dumps, rows)).encode() for rows in CHATS] + _json(*CHATS) + [b"text,label\na,b\n"]
    ),
    "adapter": Target(check_adapter, lambda: _json(ADAPTER)),
    "search": Target(check_search, lambda: _json(test_cache_search.record(), test_skip_search.record())),
}


def structured(data: bytes) -> object:
    """The values in a sound content, where it has any: JSON, YAML or the header of weights."""
    if data[8:9] == b"{":
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        return json.loads(data)
    except ValueError:
        return yaml.safe_load(data) if b"steps:" in data else None
