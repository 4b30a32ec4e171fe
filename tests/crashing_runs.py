"""Runs that kill themselves, in processes of their own, at a stated point: what resuming is tested with."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aerogel.engine import resume
from aerogel.engine.calibration import Samples
from aerogel.engine.progress import Event
from aerogel.engine.run import compress
from aerogel.io import save, shards
from aerogel.model.activations import Activations

# Its children begin with everything imported and no threads; a fork of the test process itself could inherit a locked thread pool.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *(__name__, "aerogel.engine.exporting", "aerogel.export.gptq", "aerogel.methods.quantization.gptq"),
        *("transformers.models.llama.modeling_llama", "diffusers.pipelines.pipeline_utils"),
    ]
)


class Doom(NamedTuple):
    """Where a run dies: when a block or a stage begins, after so many files, activations or shards, or when the output has its name."""

    at: Literal["block", "save", "file", "activation", "shard", "name"]
    count: int = 0


def options(source: Path) -> dict[str, Any]:
    """How the tests calibrate a model that has a text beside it."""
    return {"samples": Samples(source.parent / "text.txt", count=6, length=24), "measures": ()}


def killed(source: Path, output: Path, recipe: Any, doom: Doom) -> None:
    """Compress in another process, which resumes an unfinished run if there is one and kills itself."""
    child = CONTEXT.Process(target=_run, args=(source, output, recipe, doom))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, "the run ended, or hung, before it killed itself"


def _run(source: Path, output: Path, recipe: Any, doom: Doom) -> None:
    resume.replace_durably = _dying_after(resume.replace_durably, doom.count if doom.at == "file" else 0)
    save._take_name = _dying_after(save._take_name, 1 if doom.at == "name" else 0)
    shards._Spool.flush = _dying_after(shards._Spool.flush, doom.count if doom.at == "shard" else 0)  # type: ignore[method-assign]
    Activations.put = _dying_after(Activations.put, doom.count if doom.at == "activation" else 0)  # type: ignore[method-assign]

    def tell(event: Event) -> None:
        if (doom.at == "block" and (event.stage, event.done) == ("compress", doom.count) and event.what) or doom.at == event.stage:
            _die()

    compress(source, recipe, output=output, resume=True, tell=tell, **options(source))


def _dying_after(call: Callable[..., Any], times: int) -> Callable[..., Any]:
    left = times

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        result = call(*args, **kwargs)
        left -= 1
        if not left:
            _die()
        return result

    return wrapped


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
