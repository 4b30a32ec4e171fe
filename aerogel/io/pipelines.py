"""Diffusers pipelines: the models beside the denoisers are opened one by one, so that weights which are not there are an error.

By itself the library gives such weights random values and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from aerogel.errors import AerogelError
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.json_files import read_object
from aerogel.io.skeleton import made_from

INDEX = "model_index.json"
_AGAIN = "fetch its files again"


def library(folder: Path) -> Any:
    """Return the diffusers library; raises AerogelError that names the folder where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise AerogelError(f"{folder} holds a diffusers model: pip install 'aerogel[diffusion]'") from error
    return diffusers


def open_pipeline(folder: Path, denoisers: Mapping[str, nn.Module], dtype: torch.dtype) -> Any:
    """Return the pipeline of a folder around its denoisers; raises AerogelError for what it lacks and for what is wrong in it."""
    diffusers, index = library(folder), read_object(folder / INDEX)
    # By name: DiffusionPipeline would itself load what is given to it where the class does without, as Wan's denoisers.
    named = index.get("_class_name")
    cls = getattr(diffusers, named, diffusers.DiffusionPipeline) if isinstance(named, str) else diffusers.DiffusionPipeline
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    with _without_bars(diffusers.utils.logging), _without_bars(transformers.utils.logging):
        others = {name: _opened(folder / name, kind, options) for name, kind in _models(folder, index) if name not in denoisers}
        make = partial(cls.from_pretrained, folder, **options, **denoisers, **others)
        advice = f"add what it lacks, or open {folder / next(iter(denoisers))} alone"
        return made_from(make, f"{folder}: diffusers cannot open this pipeline", advice)


def _models(folder: Path, index: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the models of a pipeline with their classes."""
    libraries: dict[Any, Any] = {"diffusers": library(folder), "transformers": transformers}
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            continue
        kind = getattr(libraries.get(entry[0]), entry[1], None)
        if isinstance(kind, type) and issubclass(kind, nn.Module) and (folder / name).is_dir():
            yield name, kind


def _opened(folder: Path, cls: Any, options: Mapping[str, Any]) -> nn.Module:
    """Open one model; raises AerogelError where weights are missing or do not fit."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    make = partial(cls.from_pretrained, folder, output_loading_info=True, **options)
    module, found = made_from(make, f"{folder}: no {cls.__name__} can be made from these files", _AGAIN)
    if lacking := sorted(map(str, found["missing_keys"])):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise AerogelError(f"{folder}: no weights for {lacking[0]}{more}; {_AGAIN}")
    if "quantization_config" not in read_object(folder / "config.json"):
        checkpoint.check(module)
    opened: nn.Module = module
    return opened


@contextmanager
def _without_bars(logging: Any) -> Iterator[None]:
    """Keep a library's progress bars out of ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
