"""Heads leave in whole groups with the key-value head that they share; what is left is the model that one would cut by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import aerogel
from aerogel.engine.planning import plan
from aerogel.model.calls import Call
from tests.folders import model_folder, text_file
from tests.tiny import FAMILIES, output
from tests.tiny_text import SHAPE

MATRIX = {"options": {"share": 0.5}, "bound": 0.9}  # of two groups one leaves
ATTENTION = "model.layers.{}.self_attn.{}_proj.weight"
GROUPS, QUERIES, WIDTH = 4, 2, 8
"""Key-value heads, heads of queries for each, width of a head."""


def llama(idle: int | None = None, groups: int = GROUPS) -> nn.Module:
    """A Llama of random layers; what the idle group attends to is not read."""
    torch.manual_seed(0)
    heads = {"hidden_size": 96, "num_attention_heads": groups * QUERIES, "num_key_value_heads": groups, "head_dim": WIDTH}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **heads})).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, 0, 0.1)
        if idle is not None and name.endswith("o_proj.weight"):
            nn.init.zeros_(parameter[:, idle * QUERIES * WIDTH : (idle + 1) * QUERIES * WIDTH])
    return model.requires_grad_(False)


def pruned(model: nn.Module, calls: list[Call], folder: Path | None = None, **given: Any) -> aerogel.Result:
    steps = [{"prune_attention_heads": given}]
    return aerogel.compress(model, {"name": "p", "steps": steps}, samples=calls, output=folder, measures=())


def stays(model: nn.Module, after: nn.Module, layer: int) -> list[int]:
    """The groups that are left, by their keys."""
    before, kept = (one.get_parameter(ATTENTION.format(layer, "k")).unflatten(0, (-1, WIDTH)) for one in (model, after))
    return [next(number for number, group in enumerate(before) if torch.equal(group, one)) for one in kept]


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
def test_what_is_left_is_cut_by_hand(criterion: str, tmp_path: Path) -> None:
    """Queries leave with their keys and values; transformers opens it, and writes text with a smaller cache."""
    calls = FAMILIES["llama"].calls(4)
    result = pruned(llama(), calls, tmp_path / "out", criterion=criterion, repair=False)
    by_hand, before = llama(groups=GROUPS - 1), llama()
    state = before.state_dict()
    for layer in range(2):
        left = stays(before, result.network.module, layer)
        assert len(set(left)) == GROUPS - 1
        for part, width in (("q", QUERIES * WIDTH), ("k", WIDTH), ("v", WIDTH)):
            name = ATTENTION.format(layer, part)
            state[name] = state[name].unflatten(0, (GROUPS, width))[left].flatten(0, 1)
        name = ATTENTION.format(layer, "o")
        state[name] = state[name].unflatten(1, (GROUPS, QUERIES * WIDTH))[:, left].flatten(1, 2)
    by_hand.load_state_dict(state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (theirs.config.num_attention_heads, theirs.config.num_key_value_heads, theirs.config.head_dim) == (6, 3, WIDTH)
    for call in calls:
        assert torch.equal(output(by_hand, call), output(result.network.module, call))
        torch.testing.assert_close(output(theirs, call), output(by_hand, call), rtol=0, atol=2e-5)
    prompt = calls[0].kwargs["input_ids"][:1]
    texts = [one.generate(prompt, max_new_tokens=6, do_sample=False) for one in (result.network.module, theirs, by_hand)]
    assert all(torch.equal(one, texts[-1]) for one in texts)
    assert theirs(prompt, use_cache=True).past_key_values.layers[0].keys.shape[1] == GROUPS - 1


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_groups_of_least_norm_leave(criterion: str, order: int) -> None:
    """The norm of all weights that make a group: its queries, keys and values."""
    before = llama()
    after = pruned(llama(), [], criterion=criterion, repair=False).network.module
    for layer in range(2):
        weights = [before.get_parameter(ATTENTION.format(layer, part)).unflatten(0, (GROUPS, -1)) for part in ("q", "k", "v")]
        norms = [sum(float(weight[group].abs().pow(order).sum()) for weight in weights) ** (1 / order) for group in range(GROUPS)]
        assert stays(before, after, layer) == sorted(sorted(range(GROUPS), key=norms.__getitem__)[1:])


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("idle", [0, 2])
def test_a_group_that_nobody_reads_leaves_first_at_no_loss(idle: int, criterion: str) -> None:
    calls, model = FAMILIES["llama"].calls(4), llama(idle)
    before = [output(model, call) for call in calls]
    network = pruned(model, calls, criterion=criterion).network
    assert [stays(llama(idle), network.module, layer) for layer in range(2)] == [[one for one in range(GROUPS) if one != idle]] * 2
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(output(network.module, call), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt_oss", "deepseek_v3"])
def test_repair_never_adds_to_the_error(name: str, criterion: str) -> None:
    journal = pruned(FAMILIES[name].build(), FAMILIES[name].calls(3), share=0.5, criterion=criterion).journal
    assert len(journal) == 2
    assert all(line["error"] <= line["unrepaired"] for line in journal)


def test_nothing_is_changed_where_nothing_leaves() -> None:
    before = llama().state_dict()
    after = pruned(llama(), FAMILIES["llama"].calls(1), share=0).network.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "gemma2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_transformers_opens_what_is_left(name: str, tmp_path: Path) -> None:
    """Fused queries, norms of heads, sinks and latent attention; the width of a head is written where it would follow from their number."""
    calls = FAMILIES[name].calls(2)
    network = pruned(FAMILIES[name].build(), calls, tmp_path / "out", share=0.5).network
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_attention_heads == 2
    for call in calls:
        torch.testing.assert_close(output(theirs, call), output(network.module, call), rtol=0, atol=2e-5)


def test_a_width_that_the_class_has_by_default_is_written_too(tmp_path: Path) -> None:
    """transformers leaves out what is as in a configuration of no settings, from whose number of heads it follows."""
    shape = {**SHAPE, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    assert model.config.head_dim == transformers.LlamaConfig().head_dim == 128
    network = pruned(model, FAMILIES["llama"].calls(1), tmp_path / "out", share=0.5).network
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (theirs.config.num_attention_heads, theirs.config.head_dim) == (1, 128)
    call = FAMILIES["llama"].calls(1)[0]
    torch.testing.assert_close(output(theirs, call), output(network.module, call), rtol=0, atol=2e-5)


def test_a_folder_with_channels_and_heads_fewer_and_4_bits(tmp_path: Path) -> None:
    """The plan knows the bytes; the folder has the width of a head though that it came from had not."""
    text_file(tmp_path / "text.txt")
    source = model_folder(tmp_path / "model")
    steps = [{"prune_attention_heads": {"share": 0.5}}, {"prune_ffn_channels": {"multiple": 32}}, {"gptq": {"scheme": "W4A16_G32"}}]
    calls = FAMILIES["llama"].calls(2)
    planned = plan(source, {"name": "p", "steps": steps}, samples=calls, flops_a_second=lambda: 1e9)
    aerogel.compress(source, {"name": "p", "steps": steps}, samples=calls, output=tmp_path / "out", measures=())
    assert planned.predicted_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "out/model.safetensors").values())
    config = aerogel.load(tmp_path / "out").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size) == (2, 1, 16, 96)


REFUSED: list[tuple[str, list[dict[str, Any]], str]] = [
    ("llama", [{"prune_attention_heads": {"share": 0.2}}], "share 0.2 is too small to remove anything from this model; give a larger one"),
    ("opt", [{"prune_attention_heads": {"share": 0.5}}], "no setting of this opt model's configuration says how many: nobody could open"),
    (
        "flux",
        [{"prune_attention_heads": {}}],
        "this flux model has no attention heads that can leave a block; leave prune_attention_heads out",
    ),
    ("llama", [{"kivi": {}}, {"prune_attention_heads": {"share": 0.5}}], "kivi, which was measured on all channels; put kivi behind it"),
]


@pytest.mark.parametrize(("name", "steps", "words"), REFUSED)
def test_what_cannot_go_well_is_refused(name: str, steps: list[dict[str, Any]], words: str) -> None:
    planned = plan(FAMILIES[name].build(), {"name": "p", "steps": steps}, samples=FAMILIES[name].calls(1), flops_a_second=lambda: 1e9)
    assert any(words in problem for problem in planned.problems), planned.problems
