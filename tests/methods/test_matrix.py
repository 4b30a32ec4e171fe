"""Every method on every family: it reaches its share, keeps the output close, and what is saved answers as what is in memory.

A new method needs no line here unless its defaults do not fit networks of width 64, or it refuses some families.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import aerogel
from aerogel import catalog
from aerogel.engine import policies
from aerogel.engine.exporting import source_of
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.methods.base import WeightMethod
from aerogel.model import time_path
from aerogel.model.calls import Call
from aerogel.model.match import matches
from aerogel.model.network import Network
from tests.tiny import FAMILIES, Tiny, opened, output

METHODS = catalog.names("methods")

WEIGHTS = [name for name in METHODS if issubclass(catalog.find("methods", name), WeightMethod)]

# Eight bits, in groups that divide every width of the tiny networks.
KNOBS: dict[str, dict[str, Any]] = {name: {"scheme": "W8A16_G32"} for name in WEIGHTS}

# Methods that reach a part of the network only.
KNOBS["brecq"] = {"scheme": "W8A16_G32", "targets": ["Linear"], "steps": 20, "batch": 4}
KNOBS["tiar"] = {"scheme": "W8A16_CHANNEL_ASYM", "steps": 20}

# What the test file of a method says about its row: `MATRIX = {"options": ..., "bound": ...}`.
OWN = {
    path.stem.removeprefix("test_"): runpy.run_path(str(path)).get("MATRIX", {})
    for path in Path(__file__).parent.glob("*/test_*.py")
    if path.stem.removeprefix("test_") in METHODS and "\nMATRIX = " in path.read_text("utf-8")
}
KNOBS |= {name: own["options"] for name, own in OWN.items() if "options" in own}

# Two experts a token: half of the pairs can go before a token has none.
SKIPPING = {"modes", "single_threshold", "naee", "odp", "diep"}
KNOBS |= {name: {"ratio": 0.2} for name in SKIPPING} | {"reduced_topk": {"k": 1}}
KNOBS["modes"] = {"ratio": 0.2, "points": 5}

# Three steps are two pairs to fit a polynomial to.
KNOBS["teacache"] = {"degree": 1}

# Methods that leave some families alone, and why.
DENOISERS = {"dit", "wan", "unet", "pixart", "sd3", "flux", "cogvideox"}
NO_TIME = set(FAMILIES) - {"unet", "pixart", "cogvideox"}
OF_MORE = "names no temporal path|also depend on the (class label|pooled text)"
NO_UNITS = set(FAMILIES) - DENOISERS
NO_EXPERTS = set(FAMILIES) - {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "internvl"}
NO_ROW = NO_UNITS | {"unet"}  # skips join its blocks
REFUSED = {
    "rotate": ({"gemma2", "gemma3", "qwen2_5_vl", "llava", "qwen3_vl_moe", "internvl"} | DENOISERS, "no residual stream"),
    "tiar": (NO_TIME, OF_MORE),
    "temporal_cache": (NO_TIME, OF_MORE),
    # Soft-caps and sinks are written out.
    "attention_quant": ({"gemma2", "gpt_oss"}, "0 modules of this model call scaled_dot_product_attention"),
    "split_shortcut": (set(FAMILIES) - {"unet", "flux"}, "reads concatenated channels"),
    "fsc": (set(FAMILIES), f"{OF_MORE}|put tiar"),
    "activation_ranges": (set(FAMILIES), "reaches no quantized layer"),
    **dict.fromkeys(("awq", "smoothquant"), ({"flux"}, "no norm or linear layer of which it is known that linear layers read")),
    "fora": (NO_UNITS, "names no modules whose outputs"),
    **dict.fromkeys(("uniform_cache", "pab", "smoothcache", "taylorseer"), (NO_UNITS, "names no modules whose outputs")),
    **dict.fromkeys(("delta_dit", "first_block", "magcache", "teacache"), (NO_ROW, "names no streams")),
    **dict.fromkeys(
        ("toca", "duca"),
        (NO_UNITS | {"sd3", "flux", "cogvideox"}, "names no modules whose outputs|no self-attention beside it|set cell to 1"),
    ),
    **dict.fromkeys((*SKIPPING, "reduced_topk", "prune_experts"), (NO_EXPERTS, "has no routed experts")),
    "deepcache": (set(FAMILIES) - {"unet"}, "names no skip connections"),
    "fastercache": (set(FAMILIES), "names no modules whose outputs|different time steps|not the same samples twice"),
    "recalibrate": (set(FAMILIES), "no layer has inputs with static ranges"),
    # These learn from whole generations of a pipeline's sampler: tests of their own have pipelines.
    **dict.fromkeys(("schedule_search", "l2c"), (set(FAMILIES), "give one of ratio|names no modules whose outputs")),
    "schedule_refine": (set(FAMILIES), "goes on from a schedule|different time steps|names no modules whose outputs"),
    "harmonica": (set(FAMILIES), "different time steps|came without its pipeline|names no modules whose outputs"),
}

CACHING = {
    "fora",
    "uniform_cache",
    "pab",
    "smoothcache",
    "taylorseer",
    "delta_dit",
    "first_block",
    "magcache",
    "teacache",
    "toca",
    "duca",
    "deepcache",
}
"""Methods that follow one sampler: all samples of a call are at one step."""

# Largest relative error of the output. Eight bits on random weights: 0.03; where a router picks experts, a rounding can change its
# choice: 0.15. Methods that keep the function are held to float32.
CLOSE, ROUTED, EXACT = 0.03, 0.15, 1e-5
# One grid for the probabilities of all rows: coarser where rows attend to many tokens.
LOOSER = {"attention_quant": 0.05}
# Calls of a tiny network have noise of their own each, so what one gave is far from what the next would.
LOOSER |= dict.fromkeys(CACHING, 2.0)
LOOSER |= {name: own["bound"] for name, own in OWN.items() if "bound" in own}
# Here five choices of the routers change in one call; the median token moves by 0.02, the worst by 0.96.
TURNED = {"internvl": 0.3}
# Random experts all say something else, so what they say is missed where they do not speak.
LOOSER |= dict.fromkeys((*SKIPPING, "reduced_topk", "prune_experts"), 1.0)
KEEP_FUNCTION = {"rotate", "smoothquant", "split_shortcut"}


def pairs(*, refused: bool) -> list[tuple[str, str]]:
    every = [(method, name) for method in METHODS for name in sorted(FAMILIES)]
    return [(method, name) for method, name in every if (name in REFUSED.get(method, ((), ""))[0]) == refused]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Tensor]]:
    """What the untouched networks answer."""
    return {name: [output(tiny.build(), call) for call in tiny.calls(3)] for name, tiny in FAMILIES.items()}


def calls(tiny: Tiny, method: str) -> list[Call]:
    if method not in CACHING:
        return tiny.calls(3)
    given = [call.kwargs for call in tiny.calls(3)]
    return [Call((), kwargs | {"timestep": torch.full_like(kwargs["timestep"], 900 - 300 * row)}) for row, kwargs in enumerate(given)]


def steps(method: str) -> dict[str, Any]:
    return {"name": f"{method}-alone", "steps": [{method: KNOBS.get(method, {})}]}


@pytest.mark.parametrize(("method", "name"), pairs(refused=False))
def test_method_on_family(method: str, name: str, expected: dict[str, list[Tensor]], tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    live = tiny.build().requires_grad_(True)  # as from_pretrained leaves it
    given = calls(tiny, method)
    result = aerogel.compress(live, steps(method), samples=given, output=tmp_path / "out", measures=())
    network = result.network
    assert reached(network) == (temporal(network) if method == "tiar" else reachable(name) if method in WEIGHTS else set())
    with policies.on(network, result.policies):
        answers = [output(network.module, call) for call in given]
    usual = TURNED.get(name, ROUTED) if network.family.experts else CLOSE
    bound = EXACT if method in KEEP_FUNCTION else LOOSER.get(method, usual) if method != "attention_quant" else max(usual, LOOSER[method])
    before_all = expected[name] if method not in CACHING else [output(tiny.build(), call) for call in given]
    for call, answer, before in zip(given, answers, before_all, strict=True):
        assert answer.isfinite().all()
        if method in SKIPPING | {"reduced_topk"}:  # what pads a prompt gets no experts, and nobody reads what it gives
            answer, before = (one[call.kwargs["attention_mask"].bool()] for one in (answer, before))
        assert (answer - before).norm() / before.norm() < bound
    reopened = aerogel.load(tmp_path / "out", lazy=False)
    for call, answer in zip(given, answers, strict=True):
        assert torch.equal(output(reopened.module, call), answer)


@pytest.mark.parametrize(("method", "name"), pairs(refused=True))
def test_refusal_is_clear_and_leaves_everything(method: str, name: str, expected: dict[str, list[Tensor]], tmp_path: Path) -> None:
    tiny = FAMILIES[name]
    network = tiny.build()
    with pytest.raises(AerogelError, match=REFUSED[method][1]):
        aerogel.compress(network, steps(method), samples=tiny.calls(3), output=tmp_path / "out", measures=())
    assert not list(tmp_path.iterdir())
    for call, before in zip(tiny.calls(3), expected[name], strict=True):
        torch.testing.assert_close(output(network, call), before, rtol=0, atol=2e-6)  # experts may have been taken apart


@pytest.mark.parametrize("method", [name for name in WEIGHTS if "calls" in catalog.find("methods", name)().requires])
def test_experts_that_no_token_reached_are_quantized_and_reported(method: str, tmp_path: Path) -> None:
    """One token goes to two of four experts; the other two are rounded to nearest, and the journal says so."""
    call = Call((), {"input_ids": torch.tensor([[5]]), "use_cache": False})
    network = FAMILIES["qwen3_moe"].build()
    with pytest.warns(UserWarning, match="no token reached it"):
        result = aerogel.compress(network, steps(method), samples=[call], output=tmp_path / "out", measures=())
    assert reached(result.network) == reachable("qwen3_moe")
    experts = [entry for entry in result.journal if ".experts." in entry["name"]]
    assert len(experts) == 2 * 4 * 3
    assert sum("no token" in str(entry.get("fallback")) for entry in experts) == 2 * 2 * 3
    assert all(torch.isfinite(torch.tensor(entry["error"])) for entry in experts)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_folder_gives_the_bits_of_a_live_network(name: str, tmp_path: Path) -> None:
    """A folder is compressed with few blocks in memory; names of tensors that stay are those the folder has."""
    tiny = FAMILIES[name]
    tiny.build().save_pretrained(tmp_path / "source")
    for source, target in ((tiny.build(), "live"), (tmp_path / "source", "lazy")):
        aerogel.compress(source, steps("gptq"), samples=tiny.calls(3), output=tmp_path / target, measures=())
    live, lazy = stored(tmp_path / "live"), stored(tmp_path / "lazy")
    assert live.keys() == lazy.keys()
    assert all(torch.equal(live[key], tensor) for key, tensor in lazy.items())
    before = stored(tmp_path / "source")
    experts = opened(name).family.experts
    if experts is not None and experts.fused:  # codes have no fused form: quantized experts lie one by one
        before = {key: tensor for key, tensor in before.items() if ".experts." not in key}
        lazy = {key: tensor for key, tensor in lazy.items() if ".experts." not in key}
    assert {key.removesuffix("_packed").removesuffix("_scale").removesuffix("_shape") for key in lazy} == before.keys()


@pytest.mark.parametrize("name", ["dit", "wan", "unet"])
def test_formats_of_language_engines_refuse_denoisers(name: str, tmp_path: Path) -> None:
    aerogel.compress(FAMILIES[name].build(), steps("rtn"), samples=FAMILIES[name].calls(1), output=tmp_path / "out", measures=())
    formats = set(catalog.names("exporters")) - {"compressed_tensors", "onnx", "cache_policy", "cache_dit"}  # made for denoisers
    assert formats
    for exporter in formats:
        (reason,) = catalog.find("exporters", exporter)().refuse(source_of(tmp_path / "out"))
        assert "language models" in reason, exporter


def stored(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def reached(network: Network) -> set[str]:
    return {name.removesuffix(".inner") for name, part in network.module.named_modules() if isinstance(part, QuantLinear)}


def temporal(network: Network) -> set[str]:
    """The linears of the temporal path."""
    path = time_path.find(network)
    return {*path.embedding_linears, *path.projections}


def reachable(name: str) -> set[str]:
    """Every linear but the head and what the family keeps."""
    network = opened(name)
    linears = {part for part, module in network.module.named_modules() if isinstance(module, nn.Linear)}
    return {linear for linear in linears if linear != "lm_head" and not matches(linear, network.family.never_quantize)}
