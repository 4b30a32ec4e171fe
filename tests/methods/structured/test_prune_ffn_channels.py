"""FFN channels that leave are those of least loss; what is left is the model that one would cut by hand, on disk and in a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import aerogel
from aerogel.engine.planning import plan
from aerogel.model.calls import Call
from tests.crashing_runs import Doom, killed, options
from tests.engine.test_resume import outcome
from tests.folders import model_folder, text_file
from tests.tiny import FAMILIES, VARIANTS, output
from tests.tiny_text import SHAPE

MATRIX = {"options": {"multiple": 16}, "bound": 0.4}
RECIPES = ("prune-ffn-25",)
MLP = "model.layers.{}.mlp.{}_proj.weight"


def pruned(model: nn.Module, calls: list[Call], folder: Path | None = None, **given: Any) -> aerogel.Result:
    steps = [{"prune_ffn_channels": {"multiple": 16, **given}}]
    return aerogel.compress(model, {"name": "p", "steps": steps}, samples=calls, output=folder, measures=())


def kept_rows(before: Tensor, after: Tensor) -> list[int]:
    """The rows that are left, by their values."""
    return [next(number for number, row in enumerate(before) if torch.equal(row, one)) for one in after]


def inputs_of(model: nn.Module, name: str, calls: list[Call]) -> Tensor:
    """What a layer reads in all calls, as rows."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for call in calls:
        output(model, call)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("repair", [False, True])
def test_what_is_left_is_cut_by_hand_and_adjusted_by_least_squares(repair: bool, tmp_path: Path) -> None:
    """The first layer against numpy on what it reads; all of it against a model that is built with so many channels."""
    calls = FAMILIES["llama"].calls(8)
    before = FAMILIES["llama"].build().state_dict()
    result = pruned(FAMILIES["llama"].build(), calls, tmp_path / "out", repair=repair, percdamp=1e-7)
    after = result.network.module.state_dict()
    for layer in range(2):
        gate, up, down = (MLP.format(layer, part) for part in ("gate", "up", "down"))
        rows = kept_rows(before[gate], after[gate])
        assert rows == sorted(set(rows))
        assert len(rows) == 96
        assert torch.equal(after[up], before[up][rows])
        if repair and not layer:
            x_TI = inputs_of(FAMILIES["llama"].build(), "model.layers.0.mlp.down_proj", calls)
            theirs, *_ = numpy.linalg.lstsq(x_TI[:, rows].double().numpy(), (x_TI @ before[down].T).double().numpy(), rcond=None)
            torch.testing.assert_close(after[down], torch.from_numpy(theirs.T).float(), rtol=0, atol=5e-4)
        elif not repair:
            assert torch.equal(after[down], before[down][:, rows])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".mlp." not in name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.intermediate_size == result.network.config.intermediate_size == 96
    by_hand = transformers.LlamaForCausalLM(theirs.config).eval()
    by_hand.load_state_dict(after)
    for call in calls[:2]:
        assert torch.equal(output(by_hand, call), output(result.network.module, call))
        torch.testing.assert_close(output(theirs, call), output(by_hand, call), rtol=0, atol=2e-5)
    prompt = calls[0].kwargs["input_ids"][:1]
    texts = [one.generate(prompt, max_new_tokens=6, do_sample=False) for one in (result.network.module, theirs, by_hand)]
    assert all(torch.equal(one, texts[-1]) for one in texts)


def test_the_second_layer_sees_what_the_first_one_lost() -> None:
    """Its repair is that of its own inputs in the model whose first layer is pruned."""
    calls = FAMILIES["llama"].calls(8)
    result = pruned(FAMILIES["llama"].build(), calls, percdamp=1e-7)
    after, before = result.network.module.state_dict(), FAMILIES["llama"].build()
    half = pruned(FAMILIES["llama"].build(), calls, share=0).network.module
    half.get_submodule("model.layers").__setitem__(0, result.network.module.get_submodule("model.layers.0"))  # type: ignore[operator]
    x_TI = inputs_of(half, "model.layers.1.mlp.down_proj", calls)
    gate, down = MLP.format(1, "gate"), MLP.format(1, "down")
    rows = kept_rows(before.state_dict()[gate], after[gate])
    theirs, *_ = numpy.linalg.lstsq(x_TI[:, rows].double().numpy(), (x_TI @ before.state_dict()[down].T).double().numpy(), rcond=None)
    torch.testing.assert_close(after[down], torch.from_numpy(theirs.T).float(), rtol=0, atol=5e-4)


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
def test_channels_that_do_nothing_leave_first_at_no_loss(criterion: str) -> None:
    model, calls = FAMILIES["llama"].build(), FAMILIES["llama"].calls(4)
    idle = list(range(3, 128, 4))
    for layer in range(2):
        model.get_parameter(MLP.format(layer, "down"))[:, idle[::2]] = 0
        model.get_parameter(MLP.format(layer, "up"))[idle[1::2]] = 0
    before, gate = [output(model, call) for call in calls], model.get_parameter(MLP.format(0, "gate")).clone()
    network = pruned(model, calls, criterion=criterion).network
    assert kept_rows(gate, network.module.get_parameter(MLP.format(0, "gate"))) == [one for one in range(128) if one not in idle]
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(output(network.module, call), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_channels_of_least_norm_leave(criterion: str, order: int) -> None:
    """The norm of all weights that make a channel, each row of the gate and of the upper layer (arXiv:1608.08710)."""
    before = FAMILIES["llama"].build().state_dict()
    network = pruned(FAMILIES["llama"].build(), [], criterion=criterion, repair=False).network
    for layer in range(2):
        gate, up = (before[MLP.format(layer, part)] for part in ("gate", "up"))
        norms = [float((gate[row].abs().pow(order).sum() + up[row].abs().pow(order).sum()) ** (1 / order)) for row in range(128)]
        left = kept_rows(gate, network.module.get_parameter(MLP.format(layer, "gate")))
        assert left == sorted(sorted(range(128), key=norms.__getitem__)[32:])


def test_twins_are_merged() -> None:
    """Of 32 channels there are two each; the reader takes over what one of them gave."""
    model, calls = FAMILIES["llama"].build(), FAMILIES["llama"].calls(8)
    for layer in range(2):
        for part in ("gate", "up"):
            weight = model.get_parameter(MLP.format(layer, part))
            weight[32:64] = weight[:32]
    before = [output(model, call) for call in calls]
    result = pruned(model, calls, percdamp=1e-6)
    for line in result.journal:
        assert line["error"] < 1e-7
        assert line["unrepaired"] > 1e-3
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(output(result.network.module, call), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "mixtral", "galactica"])
def test_repair_never_adds_to_the_error(name: str, criterion: str) -> None:
    tiny = (FAMILIES | VARIANTS)[name]
    journal = pruned(tiny.build(), tiny.calls(3), criterion=criterion).journal
    assert journal
    assert all(line["error"] <= line["unrepaired"] and line["removed"] == 32 and line["of"] == 128 for line in journal)


def test_nothing_is_changed_where_nothing_leaves(tmp_path: Path) -> None:
    calls, before = FAMILIES["llama"].calls(2), FAMILIES["llama"].build().state_dict()
    result = pruned(FAMILIES["llama"].build(), calls, tmp_path / "out", share=0)
    assert result.journal == []
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("opt", {"ffn_dim": 96}),
        ("phi3", {"intermediate_size": 96}),
        ("gpt_oss", {"intermediate_size": 96}),
        ("deepseek_v3", {"intermediate_size": 96, "moe_intermediate_size": 48}),
        ("qwen3_moe", {"moe_intermediate_size": 48, "intermediate_size": 128}),
    ],
)
def test_transformers_opens_what_is_left(name: str, settings: dict[str, int], tmp_path: Path) -> None:
    """Whatever the setting is called; fused layers and experts, and widths of two kinds."""
    calls = FAMILIES[name].calls(2)
    network = pruned(FAMILIES[name].build(), calls, tmp_path / "out").network
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert settings.items() <= theirs.config.to_dict().items()
    for call in calls:
        torch.testing.assert_close(output(theirs, call), output(network.module, call), rtol=0, atol=2e-5)


def test_experts_that_no_token_reached_are_pruned_by_magnitude() -> None:
    call = Call((), {"input_ids": torch.tensor([[5]]), "use_cache": False})
    with pytest.warns(UserWarning, match="pruned by magnitude, not adjusted: no token reached it"):
        result = pruned(FAMILIES["qwen3_moe"].build(), [call])
    assert sum("fallback" in line for line in result.journal) == 2 * 2
    assert {len(part.weight) for name, part in result.network.module.named_modules() if name.endswith("gate_proj")} == {48}


def test_an_ignored_tower_stays() -> None:
    """The widths of the vision encoder and of the language model are settings of their own."""
    network = pruned(FAMILIES["llava"].build(), FAMILIES["llava"].calls(2), ignore=["*vision_tower*"]).network
    assert network.config.vision_config.intermediate_size == 64
    assert network.config.text_config.intermediate_size == 96


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("channels")
    text_file(folder / "text.txt")
    return model_folder(folder / "model")


AND_GPTQ = {"name": "tested", "steps": [{"prune_ffn_channels": {"multiple": 32}}, {"gptq": {"scheme": "W4A16_G32"}}]}


def test_the_plan_says_what_is_left_on_disk(source: Path, tmp_path: Path) -> None:
    """And 4 bits behind it go onto the narrower layers."""
    planned = plan(source, AND_GPTQ, samples=options(source)["samples"], flops_a_second=lambda: 1e9)
    result = aerogel.compress(source, AND_GPTQ, output=tmp_path / "out", **options(source))
    assert not planned.problems
    assert planned.predicted_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "out/model.safetensors").values())
    assert {(one.inputs, one.outputs) for one in planned.touched if "down_proj" in one.name} == {(96, 64)}
    assert result.network.config.intermediate_size == 96
    again = aerogel.load(tmp_path / "out", lazy=False)
    call = FAMILIES["llama"].calls(1)[0]
    assert torch.equal(output(again.module, call), output(aerogel.load(tmp_path / "out", lazy=False).module, call))


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_bits(source: Path, tmp_path: Path) -> None:
    aerogel.compress(source, AND_GPTQ, output=tmp_path / "whole", **options(source))
    killed(source, tmp_path / "out", AND_GPTQ, Doom("save"))
    aerogel.compress(source, AND_GPTQ, output=tmp_path / "out", resume=True, **options(source))
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shipped_recipe(recipe: str) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, "intermediate_size": 256})).eval()
    result = aerogel.compress(model, recipe, samples=FAMILIES["llama"].calls(2), measures=())
    assert result.network.config.intermediate_size == 192


SOME = {"prune_ffn_channels": {"multiple": 16}}
REFUSED: list[tuple[str, list[dict[str, Any]], str]] = [
    ("llama", [{"prune_ffn_channels": {"share": 0.1, "multiple": 64}}], "share 0.1 is too small to remove anything from this model; give"),
    (
        "llama",
        [{"wanda": {}}, SOME],
        "prune_ffn_channels comes after wanda and would fill the zeros that it makes; put prune_ffn_channels be",
    ),
    ("llama", [{"rtn": {"scheme": "W4A16_G32"}}, SOME], "is quantized by then; put prune_ffn_channels before that"),
    ("llama", [SOME, SOME], "prune_ffn_channels, which removes the same kind of channels; leave one of them out"),
    ("llama", [{"kv_cache_fp8": {}}, SOME], "comes after kv_cache_fp8, which was measured on all channels; put kv_cache_fp8 behind it"),
    ("llama", [SOME, {"rtn": {"scheme": "W4A16_G64"}}], "groups that fit: 32, 48, 96"),
    ("llama", [{"prune_ffn_channels": {"multiple": 15}}, {"magnitude": {"pattern": "2:4"}}], "x 90 has no inputs in runs of 4; ignore it"),
    ("dit", [SOME], "channels of an FFN, and no setting of this dit model's configuration says how many: nobody could open what is left"),
    ("qwen3_moe", [{"prune_ffn_channels": {"multiple": 16, "ignore": ["*experts.0.*"]}}], "moe_intermediate_size says the width of"),
]


@pytest.mark.parametrize(("name", "steps", "words"), REFUSED)
def test_what_cannot_go_well_is_refused(name: str, steps: list[dict[str, Any]], words: str) -> None:
    planned = plan(FAMILIES[name].build(), {"name": "p", "steps": steps}, samples=FAMILIES[name].calls(1), flops_a_second=lambda: 1e9)
    assert any(words in problem for problem in planned.problems), planned.problems


def test_zeros_stay_where_nothing_is_adjusted() -> None:
    """Pruning weights first is refused with a repair only."""
    steps = [{"magnitude": {"sparsity": 0.5}}, {"prune_ffn_channels": {"multiple": 16, "repair": False}}]
    network = aerogel.compress(
        FAMILIES["llama"].build(), {"name": "p", "steps": steps}, samples=FAMILIES["llama"].calls(2), measures=()
    ).network
    weight = network.module.get_parameter(MLP.format(0, "down"))
    assert weight.shape == (64, 96)
    assert float((weight == 0).float().mean()) > 0.3
