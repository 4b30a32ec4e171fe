"""Models on the Hugging Face hub: the files of a repository that are needed, fetching them, and what to say where that fails.

Nothing here passes a token: huggingface_hub takes it from HF_TOKEN or from the file that `hf auth login` writes.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub import utils as hub_utils

from aerogel.errors import AerogelError
from aerogel.io.adapters import WEIGHTS as ADAPTER
from aerogel.io.checkpoint import STEMS
from aerogel.io.headers import read_index
from aerogel.io.states import FILES

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Form of the name of a model on the hub: owner/name."""
INDEX = "model_index.json"
"""The file that makes a folder a diffusers pipeline."""
_PATIENCE = 10.0
"""Seconds until the hub counts as not reached."""
_SETTINGS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
_WEIGHTS = re.compile(rf"({'|'.join(STEMS)})(-\d+-of-\d+)?\.safetensors")


def fetch(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Return the folder of a model of the hub, after fetching what of it is not in the cache; without a connection, the cached one.

    Only what is needed to open the model is fetched: safetensors in one precision, settings, tokenizer and licence, and Python files
    with `trust_remote_code`. Raises AerogelError when the hub has no such model or revision, it may not be read with this token, it has
    no safetensors, or the hub cannot be reached and the cache does not have it.
    """
    try:
        with explained(name, revision):
            # In one request: a listing of its tree is tried six times where there is no connection.
            found = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_PATIENCE).siblings or []
    except ConnectionError as error:
        return _cached(name, revision, error)
    try:
        with explained(name, revision):
            wanted = needed([file.rfilename for file in found], name, trust_remote_code, lambda index: _shards(name, index, revision))
            return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]))
    except ConnectionError as error:
        raise AerogelError(f"the download of {name} stopped ({error}); run the command again, it continues where it stopped") from error


def needed(files: Sequence[str], name: str, trust_remote_code: bool, shards: Callable[[str], list[str]]) -> list[str]:
    """Return the files of a repository that opening the model needs; `shards` gives those that an index names.

    Raises AerogelError when it has no safetensors.
    """
    pipeline = INDEX in files
    weights = _of_parts(files) if pipeline else _of_one_stem(files, shards) or [file for file in files if file == ADAPTER]
    if not weights:
        raise AerogelError(_no_safetensors(files, name))
    settings = (*_SETTINGS, "*.py") if trust_remote_code else _SETTINGS
    shallow = [file for file in files if _depth(file) <= (2 if pipeline else 1)]
    beside = [file for file in shallow if any(PurePosixPath(file).match(pattern) for pattern in settings)]
    return sorted({*weights, *beside, *(file for file in files if file in FILES)})


def _of_parts(files: Sequence[str]) -> list[str]:
    """The weights of a pipeline, each part's in a folder of its own: not those of other precisions, nor a file with all parts in one."""
    return [file for file in files if _depth(file) == 2 and _WEIGHTS.fullmatch(PurePosixPath(file).name)]


def _of_one_stem(files: Sequence[str], shards: Callable[[str], list[str]]) -> list[str]:
    """The weights of a single model: one file wins over shards, as for a checkpoint on disk."""
    for stem in STEMS:
        if f"{stem}.safetensors" in files:
            return [f"{stem}.safetensors"]
        if (index := f"{stem}.safetensors.index.json") in files:
            return shards(index)
    return []


def _shards(name: str, index: str, revision: str | None) -> list[str]:
    return sorted(set(read_index(Path(huggingface_hub.hf_hub_download(name, index, revision=revision))).values()))


def _depth(file: str) -> int:
    return len(PurePosixPath(file).parts)


def _no_safetensors(files: Sequence[str], name: str) -> str:
    others = [file for file in files if file.endswith(_OTHER_WEIGHTS)]
    has = f"has its weights only as {others[0]}" if others else "has no weights"
    advice = "give a model or a --revision with model.safetensors, or convert it: save_pretrained of transformers writes safetensors"
    return f"{name} {has}, and only safetensors are opened, in files called model*.safetensors; {advice}"


def _cached(name: str, revision: str | None, error: ConnectionError) -> Path:
    """Return the snapshot of an earlier download, whose weights are checked when they are opened."""
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json", INDEX])
    except errors.LocalEntryNotFoundError as absent:
        at = "" if revision is None else f" at revision {revision!r}"
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({error})"
        advice = "unset HF_HUB_OFFLINE to download it" if offline else "check the connection"
        raise AerogelError(
            f"{name}: no such folder here, it is not in the hub's cache{at}, and {why}; {advice}, or give the model's folder"
        ) from absent
    return Path(found)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show the progress bars of huggingface_hub, or keep them out, while the context lasts; HF_HUB_DISABLE_PROGRESS_BARS wins."""
    before = not hub_utils.are_progress_bars_disabled()
    _set_bars(shown)
    try:
        yield
    finally:
        _set_bars(before)


def _set_bars(shown: bool) -> None:
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # else huggingface_hub warns that it cannot be changed
        hub_utils.enable_progress_bars() if shown else hub_utils.disable_progress_bars()


@contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn errors of huggingface_hub into AerogelError where the hub refuses, and into ConnectionError where it cannot be reached."""
    page = f"{constants.ENDPOINT}/{name}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise AerogelError(f"{name} is gated: accept its terms at {page}, and set HF_TOKEN to a token of that account") from error
    except errors.RevisionNotFoundError as error:
        raise AerogelError(f"{name} has no revision {revision!r}; {page}/commits/main lists them") from error
    except errors.RepositoryNotFoundError as error:
        raise AerogelError(
            f"{name}: no such folder here, and the hub has no such model that may be read; check the name, and HF_TOKEN if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise AerogelError(f"{name!r} is no name of a model on the hub ({_first_line(error)}); expected owner/name") from error
    except errors.LocalEntryNotFoundError as error:  # the connection went away after the files were listed
        raise ConnectionError(_first_line(error)) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise AerogelError(f"{name}: the hub refuses the token ({_first_line(error)}); set HF_TOKEN to a valid one") from error
        raise ConnectionError(_first_line(error)) from error
    except errors.HTTPError as error:
        raise ConnectionError(_first_line(error) or type(error).__name__) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
