"""The report: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aerogel.errors import AerogelError
from aerogel.io.record import files
from aerogel.report import page
from aerogel.report.reuse import reuse_map, reuse_of
from aerogel.report.skips import skip_map
from tests.report.runs import MINIMAL, answers, folders, full, images, schedule, temporal

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collects what a browser would see, and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "title" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text).replace("\u202f", " "))


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert not reader.open
    return reader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folders(tmp_path)


def test_full_report_says_everything(folder: Path) -> None:
    words = read(page.render(folder)).words
    for said in (
        "smollm2-135m is 3.1× smaller and 1.6× faster; its perplexity rises by 5.4 %, from 24.0 to 25.3.",
        "Weights on disk 269 MB 87.4 MB 3.1× smaller",
        "Perplexity 24.02 25.31 +5.4 %",
        "Prefill, tokens per second 512 498 2.8 % slower",
        "Perplexity on 16,383 tokens of sotu-held-out, windows of 1,024 that move by 512.",
        "Speed on cpu, batch 1, prompt 512, new tokens 64, threads 2.",
        "1 of 210 layers fell back to a simpler method (outlined).",
        "the Hessian could not be factorised at damping 0.1",
        "21.1 % of all weights",
        "ignored by the recipe",
        "scheme: W4A16_G64",
        "2026-11-23 06:12:00 UTC",
        "sotu, 128 × 512 tokens",
        "made in 3 min",
        "the first 14 of 48 tokens are the same",
        "Compressed · identical",
    ):
        assert said in words, said


def test_a_linear_counts_once_whatever_methods_noted_about_it() -> None:
    content = full()
    content["journal"] = [{"name": line["name"], "method": "smoothquant", "alpha": 0.5} for line in content["journal"]] + content["journal"]
    assert "1 of 210 layers fell back" in read(page.page(files.parse(content))).words


def test_runs_of_the_same_model_stand_beside_it(folder: Path) -> None:
    words = read(page.render(folder)).words
    assert all(name in words for name in ("rtn-w4a16", "gptq-w3a16", "awq-w4a16", "rtn-w8a8"))
    assert "my-model" not in words
    (folder.parent / "rtn-w4a16" / "aerogel.json").write_text("{broken")
    stranger = full("gptq-w3a16")
    stranger["metrics"]["compressed"]["perplexity"]["fingerprint"] = "sha256:another text"
    (folder.parent / "gptq-w3a16" / "aerogel.json").write_text(json.dumps(stranger))
    words = read(page.render(folder)).words
    assert "rtn-w4a16" not in words
    assert "gptq-w3a16" not in words, "judged on another text"
    assert "awq-w4a16" in words


def test_minimal_report_says_what_is_missing() -> None:
    words = read(page.page(files.parse(MINIMAL))).words
    assert "my-model was compressed with this run; its quality was not measured." in words
    assert "Quality was not measured: run aerogel evaluate" in words
    assert "Speed was not measured: run aerogel bench" in words
    assert "Original and compressed" not in words


@pytest.mark.parametrize("missing", ["size", "perplexity", "kl_divergence", "generation", "speed"])
@pytest.mark.parametrize("side", ["original", "compressed"])
def test_any_measure_may_be_missing(missing: str, side: str) -> None:
    content = full()
    content["metrics"][side].pop(missing, None)
    read(page.page(files.parse(content)))


def test_nothing_is_fetched(folder: Path) -> None:
    for written in (folder, folder.parent / "unet-w4"):
        html = page.render(written)
        reader = read(html)
        assert not re.search(r"https?:|//\w|url\(|@import", re.sub(r'"data:image/png;base64,[^"]*"', "", html))
        assert not {"script", "link", "iframe", "object"} & set(reader.seen)
        assert not {"href", "srcset", "onload", "onclick"} & {name for name, _ in reader.attributes}
        assert all(value.startswith("data:image/png;base64,iVBORw0KGgo") for name, value in reader.attributes if name == "src")
        assert reader.seen.count("img") == (4 if written.name == "unet-w4" else 0)


def test_images_stand_side_by_side_with_their_figures() -> None:
    reader = read(page.page(files.parse(images())))
    for said in (
        "fashion-unet is 3.1× smaller; its Fréchet distance [fashion-judge] is 3.53, the original's 3.21.",
        "Fréchet distance [fashion-judge] 3.210 3.531 +10 %",
        "Spatial Fréchet distance [fashion-judge] 1.500 1.650 +10 %",
        "Recall [fashion-judge] 62.0 % 55.8 % −10 %",
        "Accuracy of the class that was asked for [fashion-judge] 95.5 % 85.9 % −10 %",
        "SSIM with the original's images – 0.913",
        "PSNR against the original's images, dB – 25.1",
        "Perceptual distance [efficientnet-lite0, unlearned] – 0.0712",
        "Compared with the original's images: 256 images in 20 steps with guidance 2 from seed 0.",
        "Compared with real images (the test set of Fashion-MNIST): 256 images in 20 steps with guidance 2 from seed 0.",
        "Images from the same noise 2 of 256 images in 20 steps with guidance 2 from seed 0.",
        "a <b>bag</b> a <b>boot</b>",
        "Share of generated images within the manifold of the real ones",
    ):
        assert said in reader.words, said
    assert "Quality was not measured" not in reader.words
    assert "b" not in reader.seen, "subjects are escaped"
    sources = [value for name, value in reader.attributes if name == "src"]
    assert sources[0] == sources[1] == sources[2] != sources[3]


def test_speed_of_images_is_said_and_drawn(folder: Path) -> None:
    content = json.loads((folder.parent / "unet-w4" / "aerogel.json").read_text())
    timed = {"denoiser_milliseconds": 40.0, "batch": 4, "steps": 20, "guidance": 2.0, "threads": 2, "device": "cpu"}
    content["metrics"]["original"]["sampling"] = {"images_per_minute": 30.0, **timed}
    content["metrics"]["compressed"]["sampling"] = {"images_per_minute": 60.0, **timed, "denoiser_milliseconds": 16.0}
    run = files.parse(content)
    words = read(page.page(run)).words
    for said in (
        "fashion-unet is 3.1× smaller and 2.0× faster;",
        "Images per minute 30.0 60.0 2.0× faster",
        "Denoiser forward, ms 40.0 16.0 2.5× faster",
        "Sampling on cpu, batch 4, steps 20, guidance 2, threads 2.",
        "Fréchet distance [fashion-judge] ↓ better",
        "Images per minute → better",
    ):
        assert said in words, said
    assert "Speed was not measured" not in words
    assert len(page.images(run)) == 2, "against size and against speed"


def test_temporal_features_are_shown_and_said() -> None:
    words = read(page.page(files.parse(images()))).words
    for said in (
        "Relative squared error of temporal features – 3.15 %",
        "Temporal features nearer to another step – 1.00 %",
        "Temporal features at the 20 steps of DDIMScheduler.",
        "Over 5 blocks and 20 steps the error is 3.15 % of the features' squared size.",
        "The mean cosine similarity with the original's is 0.984, the lowest 0.950.",
        "1 of 100 (1.00 %) is nearer to the original's feature of another step.",
        "down_blocks. 1. resnets. 0. time_emb_proj 2.10 % 0.980 1 of 20",
        "The time embedding as a block of the denoiser receives it.",
    ):
        assert said in words, said
    for absent in ("Temporal features", "Quantized layers", "temporal"):
        assert absent not in read(page.page(files.parse(full()))).words, "records of before have neither"


def test_a_cache_schedule_is_drawn_and_said() -> None:
    content = images() | {"policies": [{"step": {"attention_quant": {}}, "state": {"softmax": 1.0}}, schedule()]}
    words = read(page.page(files.parse(content))).words
    for said in (
        "Feature caching: harmonica",
        "Of 4 modules at 4 steps of DDIMScheduler, 31.2 % of the outputs come from the cache; at 1 step all of them do.",
        "The mean squared error of final latents from held-out noise is 0.00123.",
    ):
        assert said in words, said
    drawn = str(reuse_map(reuse_of(files.parse(content).policies[1])))  # type: ignore[arg-type]
    assert "blocks.0.&lt;b&gt;attn, step 300: cached" in drawn
    assert "blocks.0.ff, step 600: computed" in drawn
    assert drawn.count(": cached") == 5
    assert "Feature caching" not in read(page.page(files.parse(images()))).words


def test_a_recipe_of_caches_only_does_not_list_unquantized_layers() -> None:
    nothing = {
        "coverage": {"layers": 3, "unquantized_weights": ["a", "b", "c"], "unquantized_inputs": ["a", "b", "c"]},
        "plan": {"share_reached": 0.0},
    }
    words = read(page.page(files.parse(images() | nothing | {"policies": [schedule()]}))).words
    for absent in ("Quantized layers", "Not quantized", "of them compressed"):
        assert absent not in words


def test_a_schedule_with_holes_is_named() -> None:
    broken = schedule()
    broken["state"]["computed"][1] = "11"
    with pytest.raises(AerogelError, match=r"aerogel\.json: state of harmonica: .*a table of 4 steps and 4 cached modules was expected"):
        page.page(files.parse(images() | {"policies": [broken]}))


def test_granularities_of_input_scales_are_compared_by_layer() -> None:
    reader = read(page.page(files.parse(images())))
    for said in (
        "Error of 8-bit inputs",
        "proj_in 1 0.200 % 0.200 % 0.100 % 0.100 %",
        "blocks. *. <b>to_q</b> 2 2.00 % 0.200 % 0.100 % 0.200 %",
        "proj_out 1 0 % 0.200 % 0.100 % 0 %",
        "1 of 3 kinds of layers have more than twice the error of a scale per token",
        "at most 10.0 times as large (blocks.*.<b>to_q</b>).",
    ):
        assert said in reader.words, said
    assert "b" not in reader.seen, "names are escaped"
    assert "Error of 8-bit inputs" not in read(page.page(files.parse(full()))).words


def test_inputs_with_holes_are_named() -> None:
    content = images()
    content["metrics"]["compressed"]["inputs"]["token"].pop()
    with pytest.raises(AerogelError, match=r"aerogel\.json: metrics\.compressed\.inputs"):
        files.parse(content)


def test_temporal_features_without_error_are_said_so() -> None:
    content = images()
    unhurt = temporal(steps=2) | {"cosines": [[1.0, 1.0]] * 5, "errors": [[0.0, 0.0]] * 5, "mismatches": [[False] * 2] * 5}
    content["metrics"]["compressed"]["temporal"] = unhurt | {"error": 0.0, "cosine": 1.0, "least_cosine": 1.0, "mismatch": 0.0}
    words = read(page.page(files.parse(content))).words
    assert "the error is 0 % of the features' squared size. The mean cosine similarity with the original's is 1, the lowest 1." in words
    assert "None of 10 are nearer to the original's feature of another step." in words


def test_quantized_layers_are_counted_and_the_others_named() -> None:
    reader = read(page.page(files.parse(images())))
    for said in (
        "Weights int4 5 of 10",
        "Weights not quantized 5 of 10",
        "Inputs int8, one range a step 4 of 10",
        "Inputs not quantized 6 of 10",
        "Attention operands quantized 2",
        "Layers with unquantized weights Module Count conv_in 1 conv_out 1 up_blocks. *. resnets. *. conv_shortcut 3",
        "Layers with unquantized inputs Module Count mid_block. <b>conv</b> 1",
        "Attention modules with quantized operands Module Count mid_block. attentions. *. transformer_blocks. *. attn1 1",
    ):
        assert said in reader.words, said
    assert "b" not in reader.seen, "names are escaped"


def test_what_no_layer_has_quantized_is_not_named() -> None:
    content = full() | {"coverage": {"layers": 2, "weights": {"int4": 2}, "unquantized_inputs": ["a", "b"]}}
    words = read(page.page(files.parse(content))).words
    assert "Weights int4 2 of 2 Inputs not quantized 2 of 2" in words
    assert "Layers with unquantized" not in words
    assert "Attention operands" not in words


@pytest.mark.parametrize("changed", [{"layers": ["one"]}, {"steps": []}, {"errors": [[0.1]] * 5}])
def test_incomplete_temporal_features_are_named(changed: dict[str, Any]) -> None:
    content = images()
    content["metrics"]["compressed"]["temporal"] |= changed
    with pytest.raises(AerogelError, match=r"aerogel\.json: metrics\.compressed\.temporal"):
        files.parse(content)


def test_identical_images_have_infinite_psnr() -> None:
    content = images()
    content["metrics"]["compressed"]["image_similarity"] |= {"mse": 0.0, "psnr": float("inf"), "ssim": 1.0}
    del content["metrics"]["compressed"]["image_quality"]
    words = read(page.page(files.parse(json.loads(json.dumps(content))))).words
    assert "its images have an SSIM of 1.00 with the original's" in words
    assert "PSNR against the original's images, dB – ∞" in words


def test_only_base64_is_put_into_images() -> None:
    content = images()
    content["metrics"]["compressed"]["image_similarity"]["pairs"][0]["original"] = 'x" onerror="alert(1)'
    with pytest.raises(AerogelError, match=r"metrics\.compressed\.image_similarity\.pairs\.0\.original: string should match pattern"):
        files.parse(content)


def test_text_of_models_is_escaped_everywhere() -> None:
    evil = '"><script>alert(1)</script>&{{ 7 * 7 }}'
    content = full(recipe=evil)
    content["model"]["name"] = evil
    content["kept"] = [{"name": evil, "parameters": 1, "reason": evil}]
    content["journal"][0] |= {"name": f"model.layers.0.{evil}", "scheme": evil, "fallback": evil}
    content["provenance"]["machine"] = {evil: evil}
    content["metrics"]["compressed"]["lm_eval"] = {evil: {evil: 0.5}}
    content["metrics"]["compressed"]["generation"]["samples"][0] = {"prompt": evil, "original": "a", "compressed": evil}
    html = page.page(files.parse(content), [files.parse(full(evil))])
    reader = read(html)
    assert "script" not in reader.seen
    assert reader.words.count("<script>alert(1)</script>&{{ 7 * 7 }}") >= 10


def test_differences_are_marked_word_by_word() -> None:
    marked = page.mark_difference("the sky is blue <b>today</b>", "the sea is blue <i>today</i>")
    assert marked == "the <mark>sea</mark> is blue <mark>&lt;i&gt;today&lt;/i&gt;</mark>"
    assert page.mark_difference("same words", "same words") == "same words"


def test_numbers_that_are_not_finite_are_shown() -> None:
    content = full(perplexity=float("inf"))
    words = read(page.page(files.parse(content))).words
    assert "its perplexity goes from 24.0 to ∞" in words


def test_a_changed_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"has no aerogel.json; give a folder"):
        page.render(tmp_path)
    (tmp_path / "aerogel.json").write_text('{"model": {"name": "a"}, "metrics": {"compressed": {"perplexity": {"perplexity": "low"}}}}')
    with pytest.raises(AerogelError, match=r"metrics\.compressed\.perplexity\.perplexity: input should be a valid number"):
        page.render(tmp_path)
    (tmp_path / "aerogel.json").write_text("{")
    with pytest.raises(AerogelError, match="is not JSON"):
        page.render(tmp_path)


def test_report_needs_no_torch(folder: Path) -> None:
    code = f"import sys; from aerogel.report.page import write; print(write({str(folder)!r})); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == folder / "report.html"
    assert "<!doctype html>" in (folder / "report.html").read_text("utf-8")


def test_skipped_experts_are_drawn_and_said() -> None:
    content = full()
    content["metrics"]["original"]["exact_match"] = {"right": 0.84, "count": 128}
    content["metrics"]["compressed"]["exact_match"] = answers()
    words = read(page.page(files.parse(content))).words
    for said in (
        "Skipped experts",
        "70.0 % of the token-expert assignments were dropped in prefill and 45.0 % in decoding; 21.0 % of the tokens",
        "Answers to 128 questions of held-out.jsonl",
        "Exact match with the expected answers",
        "skips 70.0 % of its token-expert assignments in prefill; 81.0 % of its answers match exactly, 84.0 % of the original's.",
    ):
        assert said in words, said
    side = files.parse(content).metrics.compressed
    assert side.exact_match is not None
    assert side.exact_match.skipped is not None
    drawn = str(skip_map(side.exact_match.skipped)).replace("\u202f", " ")
    for cell in ("Text, layer 1: 90.0 %", "Images, layer 0: 50.0 %", "No routed expert, layer 1: 42.0 %"):
        assert cell in drawn
    assert "Skipped experts" not in read(page.page(files.parse(full()))).words
