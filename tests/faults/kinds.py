"""Kinds of sound input, tiny, each with the commands that take it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import aerogel
from aerogel.data.denoising import Denoising
from aerogel.engine import exporting
from aerogel.engine.calibration import Samples
from tests import image_pipelines, saved
from tests.faults.commands import (
    CALIBRATING,
    DIFFUSION,
    DROPPED,
    LANGUAGE,
    PRUNED,
    REMOVED,
    RESUMED,
    SEARCHED,
    SKIPPED,
    TRACED,
    WRITTEN,
    exports,
    merged,
    reports_on,
)
from tests.faults.damages import Damage, of_folder
from tests.faults.judged import Command
from tests.folders import model_folder, text_file
from tests.report import test_cache_search, test_skip_search, test_sparsity_search, test_structured_search, test_token_search
from tests.tiny import IMAGE_TOKEN
from tests.words import tokenizer


def of_part(part: str, folder: Path, count: int) -> Iterator[Damage]:
    """The damages of the files in a folder of the input."""
    return (replace(damage, file=f"{part}/{damage.file}") for damage in of_folder(folder / part, count))


@dataclass(frozen=True)
class Kind:
    """A kind of input."""

    name: str
    make: Callable[[Path], object]
    """Makes the input in an empty folder."""
    commands: tuple[Command, ...]
    damages: Callable[[Path, int], Iterator[Damage]] = lambda folder, count: of_part("in", folder, count)
    """(input, seeded damages of each JSON file) -> damages."""

    def __str__(self) -> str:
        return self.name


def _model(folder: Path, **config: Any) -> Path:
    text_file(folder.parent / "text.txt", 200)
    return model_folder(folder, num_hidden_layers=1, **config)


def _compressed(folder: Path, *steps: dict[str, Any], measures: tuple[str, ...] = ()) -> None:
    """Compress `sound` in the folder to `in` beside it."""
    data = Samples(folder / "text.txt", count=2, length=8)
    aerogel.compress(folder / "sound", {"name": "made", "steps": [*steps]}, samples=data, output=folder / "in", measures=measures)


def _make_model(folder: Path) -> None:
    _model(folder / "in", max_shard_size="60KB")
    _model(folder / "sound")


def _make_written(folder: Path) -> None:
    _model(folder / "sound")
    saved.tokenizer().save_pretrained(folder / "sound")
    _compressed(folder, {"rtn": {"scheme": "W4A16_G32"}}, {"kv_cache_fp8": {}}, measures=("size",))


def _make_fp8(folder: Path) -> None:
    _model(folder / "sound")
    _compressed(folder, {"rtn": {"scheme": "FP8_DYNAMIC"}})


def _make_experts(folder: Path) -> None:
    text_file(folder / "text.txt", 200)
    model_folder(folder / "sound", "qwen3_moe")
    _compressed(folder, {"rtn": {"scheme": "W4A16_G32"}}, {"odp": {}})


def _with_record(folder: Path, count: int) -> Iterator[Damage]:
    """All damages but the loss of aerogel.json: a policy without tensors is nowhere else."""
    return (damage for damage in of_part("in", folder, count) if (damage.file, damage.name) != ("in/aerogel.json", "missing"))


def _make_experts_to_skip(folder: Path) -> None:
    text_file(folder / "text.txt", 200)
    model_folder(folder / "in", "qwen3_moe")


_CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{{ c['text'] if c['type'] == 'text' else '<image>' }} {% endfor %}{% endif %}{% endfor %}"
)


def make_image_text(folder: Path) -> None:
    """Make a vision-language model, text for it, and chats about images."""
    words = tokenizer()
    words.add_tokens([f"w{number}" for number in range(IMAGE_TOKEN - len(words))])
    words.add_tokens(["<image>"], special_tokens=True)
    words.image_token = "<image>"
    text_file(folder / "text.txt", 200)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    made = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=_CHAT,
        num_additional_image_tokens=1,
    )
    made.save_pretrained(model_folder(folder / "in", "llava"))
    rows = []
    for number, said in enumerate(("we the people", "of the world", "war and peace", "the congress")):
        Image.new("RGB", (16, 16), (40 * number, 20, 200 - 30 * number)).save(folder / f"{number}.png")
        asked = [{"type": "image"}, {"type": "text", "text": "the people"}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": turns, "images": [f"{number}.png"]})
    (folder / "chats.json").write_text(json.dumps(rows))


def _with_sizes_as_lists(folder: Path, count: int) -> Iterator[Damage]:
    """All damages; transformers takes a size of images also as a list, of height and width."""
    for damage in of_part("in", folder, count):
        listed = re.search(r"(^|[._])size = \[1, 2\]$", damage.name)
        yield replace(damage, legal=True) if listed else damage


def _make_pipeline(folder: Path) -> None:
    (folder / "own.yaml").write_text("steps:\n  - fora: {}\n")
    for name in ("in", "sound"):
        image_pipelines.classes().save_pretrained(folder / name)


def _make_cached(folder: Path) -> None:
    (folder / "own.yaml").write_text("steps:\n  - rtn: {scheme: W8A16_CHANNEL}\n  - fora: {}\n")
    image_pipelines.classes().save_pretrained(folder / "sound")
    recipe = {"name": "made", "steps": [{"rtn": {"scheme": "W8A16_CHANNEL"}}, {"smoothcache": {"alpha": 10.0}}]}
    aerogel.compress(folder / "sound", recipe, samples=Denoising(count=1, steps=2), output=folder / "in", measures=())


def _make_blocks_cached(folder: Path) -> None:
    """A cache that whole blocks share, which other engines have too."""
    image_pipelines.classes(layers=4).save_pretrained(folder / "sound")
    aerogel.compress(
        folder / "sound", {"name": "made", "steps": [{"fora": {}}]}, samples=Denoising(count=1, steps=3), output=folder / "in", measures=()
    )


def _make_graph(folder: Path) -> None:
    image_pipelines.classes().save_pretrained(folder / "sound")
    aerogel.compress(folder / "sound", {"name": "made", "steps": [{"rtn": {"scheme": "W8A8"}}]}, output=folder / "in", measures=())


def _of_denoiser(folder: Path, count: int) -> Iterator[Damage]:
    """The damages of the files that a graph is made of."""
    return (damage for damage in of_part("in", folder, count) if damage.file.startswith(("in/transformer", "in/aerogel.json")))


def _make_asymmetric(folder: Path) -> None:
    _model(folder / "sound", dtype=torch.float16)
    _compressed(folder, {"rtn": {"scheme": "W4A16_G32_ASYM"}})


def _make_pruned(folder: Path) -> None:
    _model(folder / "sound")
    _compressed(folder, {"magnitude": {"sparsity": 0.5}})


def _make_bit_masks(folder: Path) -> None:
    pruned = folder / "pruned"
    pruned.mkdir()
    _make_pruned(pruned)
    (pruned / "sound").rename(folder / "sound")
    exporting.export(pruned / "in", "bitmask", folder / "in")
    shutil.rmtree(pruned)


def _make_adapter(folder: Path) -> None:
    base = _model(folder / "sound")
    (folder / "in").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "in" / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.full((64, 4), 0.01)}
    save_file(parts, folder / "in" / "adapter_model.safetensors", metadata={"format": "pt"})


SEARCHES = {
    "cache": test_cache_search,
    "skip": test_skip_search,
    "tokens": test_token_search,
    "sparsity": test_sparsity_search,
    "structured": test_structured_search,
}
"""Tests of the report on each search, which have a record of it."""


def _make_searches(folder: Path) -> None:
    for name, module in SEARCHES.items():
        (folder / name).mkdir()
        (folder / name / "search.json").write_text(json.dumps(module.record()))


def _make_stopped(folder: Path) -> None:
    _model(folder / "sound")
    recipe = aerogel.Recipe.parse("gptq-w4a16").adjusted("W4A16_G32")
    data = Samples(folder / "text.txt", count=2, length=8)
    with mock.patch("aerogel.io.save.write_shards", side_effect=OSError(28, os.strerror(28), "full")):
        try:
            aerogel.compress(folder / "sound", recipe, samples=data, output=folder / "out", measures=())
        except aerogel.AerogelError:
            return
    raise AssertionError("the run was to stop")


def _make_layout(name: str, scheme: str, folder: Path) -> None:
    """A language model in the layout of another tool."""
    _model(folder / "sound", dtype=torch.float16)
    aerogel.compress(folder / "sound", {"name": "made", "steps": [{"rtn": {"scheme": scheme}}]}, output=folder / "ours", measures=())
    exporting.export(folder / "ours", name, folder / "in")
    shutil.rmtree(folder / "ours")


KINDS = (
    Kind("model", _make_model, (*LANGUAGE, *CALIBRATING)),
    Kind("written", _make_written, (*LANGUAGE, *WRITTEN, *exports("gptq", "gguf", "compressed_tensors"))),
    Kind("fp8", _make_fp8, (*LANGUAGE[:2], *exports("modelopt"))),
    Kind("experts", _make_experts, (*LANGUAGE[:2], *WRITTEN, *exports("gptq")), _with_record),
    Kind("experts to skip", _make_experts_to_skip, (SKIPPED,)),
    Kind("image-text", make_image_text, (*LANGUAGE[:1], *CALIBRATING, DROPPED), _with_sizes_as_lists),
    Kind("pipeline", _make_pipeline, (*DIFFUSION, SEARCHED)),
    Kind("cached", _make_cached, (*DIFFUSION, *WRITTEN)),
    Kind("blocks cached", _make_blocks_cached, exports("cache_dit", "cache_policy")),
    Kind("graph", _make_graph, (TRACED,), _of_denoiser),
    Kind("asymmetric", _make_asymmetric, exports("awq")),
    Kind("pruned", _make_pruned, (PRUNED, REMOVED, *exports("bitmask"))),
    Kind("bit masks", _make_bit_masks, (*LANGUAGE, *exports("compressed_tensors"))),
    Kind("adapter", _make_adapter, tuple(map(merged, (*LANGUAGE[1:], *CALIBRATING)))),
    Kind("gptq", partial(_make_layout, "gptq", "W4A16_G32"), (*LANGUAGE, *CALIBRATING)),
    Kind("awq", partial(_make_layout, "awq", "W4A16_G32_ASYM"), (*LANGUAGE, *CALIBRATING)),
    Kind("searches", _make_searches, reports_on(*SEARCHES), of_folder),
    Kind("stopped", _make_stopped, (RESUMED,), partial(of_part, "out.partial")),
)
"""Folders."""
