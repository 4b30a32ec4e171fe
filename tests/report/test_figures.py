"""Figures: what is drawn stands where its numbers say, nothing leaves the image, a file of its own is valid XML."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from aerogel.errors import AerogelError
from aerogel.io.record import files
from aerogel.io.record.measures import TemporalResult
from aerogel.io.record.schema import JournalLine
from aerogel.report import page, phrases
from aerogel.report.layers import error_map, towers, zeros, zeros_map
from aerogel.report.parts import parts_bars
from aerogel.report.svg import Scale, element
from aerogel.report.temporal import short, time_maps
from aerogel.report.tradeoff import SIZE, Point, tradeoff
from tests.report.runs import folders, full, temporal


def circles(svg: str) -> dict[str, tuple[float, float]]:
    return {c.get("class", ""): (float(c.get("cx", "")), float(c.get("cy", ""))) for c in Xml.fromstring(svg).iter("circle")}


def test_points_stand_where_their_numbers_say() -> None:
    drawn = circles(tradeoff([Point("a", 200, 20, "original"), Point("b", 100, 22, "this"), Point("c", 50, 30)], SIZE, "Perplexity"))
    (xa, ya), (xb, yb), (xc, yc) = drawn["original"], drawn["this"], drawn["other"]
    assert (xa - xb) / (xb - xc) == pytest.approx(2.0, rel=0.01)
    assert (ya - yb) / (yb - yc) == pytest.approx(2 / 8, rel=0.01)
    assert yc < yb < ya, "worse is higher"


def test_a_wide_range_is_drawn_by_ratio() -> None:
    drawn = circles(tradeoff([Point("a", 200, 20, "original"), Point("b", 100, 200, "this"), Point("c", 50, 2000)], SIZE, "Perplexity"))
    assert drawn["original"][1] - drawn["this"][1] == pytest.approx(drawn["this"][1] - drawn["other"][1], abs=0.02)


def test_points_without_a_finite_quality_are_left_out() -> None:
    assert set(circles(tradeoff([Point("a", 1, float("inf"), "original"), Point("b", 1, 2, "this")], SIZE, "Perplexity"))) == {"this"}


@pytest.mark.parametrize("width", [328.0, 456.0, 956.0])
def test_labels_stay_inside_and_apart(width: float) -> None:
    points = [Point(f"recipe-number-{n}", 100 + n, 20 + n / 10) for n in range(6)] + [Point("original", 269, 20, "original")]
    labels = [t for t in Xml.fromstring(tradeoff(points, SIZE, "Perplexity", width=width)).iter("text") if "halo" in (t.get("class") or "")]
    spans = []
    for text in labels:
        reach, x = 7.2 * len(text.text or ""), float(text.get("x", ""))
        spans.append((x - reach if text.get("text-anchor") == "end" else x, float(text.get("y", "")), reach))
    assert all(left >= 0 and left + reach <= width + 1 for left, _, reach in spans)
    for index, (left, y, reach) in enumerate(spans):
        assert all(
            abs(y - other) >= 12 or left > end or left + reach < end - length
            for end, other, length in ((a + c, b, c) for a, b, c in spans[:index])
        )


def test_a_file_of_its_own_is_xml_with_its_colours(tmp_path: Path) -> None:
    path = page.write_plot(folders(tmp_path / "runs"), tmp_path / "tradeoff.svg")
    root = Xml.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in path.read_text("utf-8")
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 2 * 6
    with pytest.raises(AerogelError, match="has no trade-off to draw: its quality was not measured"):
        page.write_plot(tmp_path / "runs" / "minimal", tmp_path / "tradeoff.svg")


def test_error_map_has_a_cell_for_every_linear() -> None:
    tables = towers(files.parse(full()).journal)
    assert list(tables) == ["model.layers"]
    for tall in (False, True):
        rects = [r for r in Xml.fromstring(error_map(tables["model.layers"], 956, tall)).iter("rect") if r.get("class") == "heat"]
        assert len(rects) == 210 + 6, "and six in the legend"
    assert error_map(tables["model.layers"]).count('class="fell"') == 1


def test_experts_share_a_cell() -> None:
    lines = [
        JournalLine(name=f"model.layers.0.mlp.experts.{n}.up_proj", block="model.layers.0", error=error, fallback=None if n else "no token")
        for n, error in enumerate((0.1, 0.3))
    ]
    ((place, cell),) = towers(lines)["model.layers"].items()
    assert place == ("mlp.experts.*.up_proj", "0")
    assert cell.value == pytest.approx(0.2)
    assert cell.fell
    assert "mean of 2" in cell.words


def test_nested_lists_of_a_unet_share_a_map() -> None:
    blocks = ("down_blocks.0.resnets.1", "down_blocks.1.resnets.0", "down_blocks.10.resnets.0", "mid_block.resnets.0")
    tables = towers([JournalLine(name=f"{block}.conv1", block=block, error=0.1) for block in reversed(blocks)])
    assert {name: {index for _, index in table} for name, table in tables.items()} == {
        "down_blocks.resnets": {"0.1", "1.0", "10.0"}, "mid_block.resnets": {"0"},
    }  # fmt: skip
    drawn = re.findall(r">(\d+\.\d)<", error_map(tables["down_blocks.resnets"]))
    assert drawn[:3] == ["0.1", "1.0", "10.0"], "in the order of their numbers"


def test_several_towers_have_their_own_maps() -> None:
    lines = [JournalLine(name=f"{tower}.0.fc", block=f"{tower}.0", error=0.1) for tower in ("model.visual.blocks", "model.layers")]
    assert list(towers(lines)) == ["model.visual.blocks", "model.layers"]
    assert towers([JournalLine(name="lm_head", error=0.1)]) == {}


@pytest.mark.parametrize(("width", "stacked"), [(956.0, False), (328.0, True)])
@pytest.mark.parametrize("steps", [1, 20, 200])
def test_time_maps_stay_inside_and_have_a_cell_for_every_block_and_step(width: float, stacked: bool, steps: int) -> None:
    found = TemporalResult.model_validate(temporal(steps=steps))
    svg = Xml.fromstring(time_maps(found, width, stacked))
    boxes = [[float(r.get(side, "")) for side in ("x", "y", "width", "height")] for r in svg.iter("rect")]
    assert all(x >= 0 and y >= 0 and x + wide <= width + 0.1 and y + high <= float(svg.get("height", "")) for x, y, wide, high in boxes)
    cells = len(boxes) - 2 * 6 - 2
    assert cells == 3 * 5 * steps if steps <= 20 else 0 < cells < 3 * 5 * steps
    for text in svg.iter("text"):
        reach, x = 6.6 * len(text.text or ""), float(text.get("x", ""))
        assert x >= reach if text.get("text-anchor") == "end" else x + reach <= width, text.text


def test_shades_and_wrong_cells_are_where_the_numbers_say() -> None:
    found = TemporalResult.model_validate(temporal())
    svg = Xml.fromstring(time_maps(found))
    titled = {r.findtext("title", ""): r for r in svg.iter("rect") if r.find("title") is not None}
    assert len(titled) == 3 * 100
    last = titled[f"up_blocks.1.resnets.0.time_emb_proj, step {found.steps[-1]:g}: 10.0\u202f%"]
    half = titled[f"up_blocks.1.resnets.0.time_emb_proj, step {found.steps[9]:g}: 5.00\u202f%"]
    assert float(last.get("fill-opacity", "")) == 1
    assert float(half.get("fill-opacity", "")) == pytest.approx(0.06 + 0.94 / 2, abs=0.001)
    (wrong,) = (words for words, r in titled.items() if r.get("class") == "wrong")
    assert wrong == f"down_blocks.1.resnets.0.time_emb_proj, step {found.steps[2]:g}: nearer to another step"
    assert sum("nearest to its own step" in words for words in titled) == 99
    assert time_maps(found, 328, stacked=True).count("<title>") == 1, "a phone has no pointer"


def test_a_column_of_several_steps_is_their_mean() -> None:
    content = temporal(layers=2, steps=400)
    content["mismatches"] = [[False] * 400, [step % 2 == 0 for step in range(400)]]
    svg = Xml.fromstring(time_maps(TemporalResult.model_validate(content)))
    wrong = [r for r in svg.iter("rect") if r.get("class") == "wrong" and r.find("title") is not None]
    assert wrong
    assert all(0 < float(r.get("fill-opacity", "")) < 1 for r in wrong)
    assert any("50.0\u202f% nearer to another step" in r.findtext("title", "") for r in wrong)


def test_errors_without_end_are_strongest_and_leave_the_others_apart() -> None:
    content = temporal(layers=1, steps=3) | {"errors": [[0.1, 0.2, float("inf")]]}
    svg = Xml.fromstring(time_maps(TemporalResult.model_validate(content)))
    shades = [float(r.get("fill-opacity", "")) for r in svg.iter("rect") if r.find("title") is not None][:3]
    assert shades == pytest.approx([0.53, 1, 1])


def test_what_all_names_share_is_left_out() -> None:
    assert short(["down.0.resnets.1.proj", "mid.resnets.0.proj"]) == ["down.0.1", "mid.0"]
    assert short(["adaln.linear"]) == ["adaln.linear"]
    assert short(["a.x", "a.x.b"]) == ["a.x", "b"]


def test_bars_are_as_long_as_their_bytes() -> None:
    svg = Xml.fromstring(parts_bars({"Original": {"unquantized layers": 300, "embeddings": 100}, "Compressed": {"quantized layers": 100}}))
    bars = {r.findtext("title", ""): float(r.get("width", "")) for r in svg.iter("rect") if r.find("title") is not None}
    widths = {name.partition(":")[0]: width + 1 for name, width in bars.items()}
    assert widths["unquantized layers"] == pytest.approx(3 * widths["embeddings"], rel=0.01)
    assert widths["quantized layers"] == pytest.approx(widths["embeddings"], rel=0.01)


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [(0, 300, False, [0, 100, 200, 300]), (23, 26, False, [23, 24, 25, 26]), (20, 3000, True, [20, 50, 100, 200, 500, 1000, 2000])],
)
def test_ticks_are_round(low: float, high: float, log: bool, ticks: list[float]) -> None:
    assert Scale(low, high, 0, 1, log).ticks(4) == pytest.approx(ticks)


def test_attributes_and_text_are_escaped() -> None:
    assert str(element("text", '<b>"', class_='a"b', x=1.50)) == '<text class="a&#34;b" x="1.5">&lt;b&gt;&#34;</text>'


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (phrases.size(0), "0 B"), (phrases.size(999), "999 B"), (phrases.size(999_999), "1.00 MB"), (phrases.size(87_412_336), "87.4 MB"),
        (phrases.size(None), "–"), (phrases.number(134_515_008), "135 M"), (phrases.number(576), "576"), (phrases.digits(0.0412), "0.0412"),
        (phrases.digits(1234.5), "1,234"), (phrases.digits(float("nan")), "not a number"), (phrases.change(24.0, 25.2), "+5.0 %"),
        (phrases.change(24.0, 23.9), "−0.42 %"), (phrases.change(0, 1), "–"), (phrases.versus(3, 1, "up", "down"), "3.0× up"),
        (phrases.versus(1, 3, "up", "down"), "3.0× down"), (phrases.versus(1.05, 1, "up", "down"), "5.0 % up"),
        (phrases.versus(1, 1, "up", "down"), "the same"), (phrases.seconds(61), "61 s"), (phrases.seconds(264), "4 min"),
        (phrases.seconds(7200), "2.0 h"), (phrases.near_one(0.5), "0.500"), (phrases.near_one(0.99987), "0.99987"),
        (phrases.near_one(1.0), "1"), (phrases.near_one(1 - 1e-9), "1.000000"), (phrases.near_one(-0.25), "-0.250"),
        (phrases.several("a.*", 1), "a.*"), (phrases.several("a.*", 3), "a.* (3 of them)"),
    ],
)  # fmt: skip
def test_numbers_in_words(found: str, said: str) -> None:
    assert re.sub("\u202f", " ", found) == said


@pytest.mark.parametrize(
    ("size", "speed", "perplexity", "said"),
    [
        (87_412_336, 20.0, 24.02, "3.1× smaller and 1.9× slower; its perplexity stays the same."),
        (300_000_000, 37.2, 23.0, "1.1× larger; its perplexity falls by 4.2 %, from 24.0 to 23.0."),
    ],
)
def test_headline_is_honest(size: int, speed: float, perplexity: float, said: str) -> None:
    sentence = phrases.headline(files.parse(full(size=size, speed=speed, perplexity=perplexity)))
    assert sentence.replace("\u202f", " ") == f"smollm2-135m is {said}"


def test_errors_of_two_kinds_have_their_own_maps() -> None:
    """What a criterion loses of its weight is not averaged with what a later step loses of the output."""
    name, block = "model.layers.0.fc", "model.layers.0"
    pruned = JournalLine(name=name, block=block, method="wanda", error=0.3, error_of="weights")
    rounded = JournalLine(name=name, block=block, method="gptq", error=0.01, error_of="outputs")
    tables = towers([pruned, rounded])
    assert {title: table["fc", "0"].value for title, table in tables.items()} == {
        "model.layers, wanda, error of the weights": 0.3,
        "model.layers, gptq, error of the outputs": 0.01,
    }
    assert list(towers([pruned])) == ["model.layers, error of the weights"]


def test_zeros_are_those_of_the_layers_and_what_was_allocated_is_told() -> None:
    names = [f"model.layers.{number}.{kind}" for number in range(2) for kind in ("q", "up")]
    shares = dict(zip(names, (0.25, 0.75, 0.5, 0.5), strict=True))
    table = zeros(shares, {name: name.rpartition(".")[0] for name in names}, {names[0]: 0.26})["model.layers"]
    assert {place: cell.value for place, cell in table.items()} == {("q", "0"): 0.25, ("up", "0"): 0.75, ("q", "1"): 0.5, ("up", "1"): 0.5}
    assert table["q", "0"].words.replace("\u202f", " ") == "model.layers.0.q: 25.0 % zeros, 26.0 % allocated"
    shades = [rect.get("fill-opacity") for rect in Xml.fromstring(zeros_map(table)).iter("rect") if rect.get("class") == "heat"]
    assert shades[:4] == ["0.295", "0.530", "0.765", "0.530"], "a share of one has the full colour"
