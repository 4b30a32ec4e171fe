"""Pushing a compressed folder to the Hugging Face hub: an explicit step, checked before any work; the repository is private by default."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from aerogel.errors import AerogelError
from aerogel.io import hub
from aerogel.io.json_files import read_object
from aerogel.io.quantized import quantization_of
from aerogel.io.record import files
from aerogel.io.text_files import replace_text
from aerogel.report.card import card
from aerogel.version import __version__

_README = "README.md"
_OF_THE_HUB = (".gitattributes", _README)
"""Files of a repository that has no model yet."""


def check(name: str, overwrite: bool = False) -> None:
    """Make sure that a model can be pushed as `name`: the form of the name, the connection, the token and that nothing is in the way.

    Raises AerogelError with what to do; with `overwrite` a repository may hold a model, which gets a new commit.
    """
    if not hub.ID.fullmatch(name):
        raise AerogelError(f"{name!r} is no name for a model on the hub; expected OWNER/NAME")
    api = huggingface_hub.HfApi()
    try:
        with hub.explained(name, None):
            _require_writer(api, name.partition("/")[0])
            held = _files(api, name)
    except ConnectionError as error:
        raise AerogelError(f"{name} cannot be pushed: the hub cannot be reached ({error}); check the connection, HF_HUB_OFFLINE") from error
    if not overwrite and (models := [file for file in held if file not in _OF_THE_HUB]):
        raise AerogelError(f"{name} exists on the hub and holds {models[0]}; give another name, or push with --overwrite for a new commit")


def push(folder: Path, name: str, *, public: bool = False, overwrite: bool = False) -> str:
    """Push a folder that `compress` wrote, with a model card where it has none, and return its address.

    Raises AerogelError when the folder has no record or was changed, for what `check` refuses, and when the hub cannot be reached.
    """
    record = files.read(folder)
    files.verify(folder)
    check(name, overwrite)
    if not (folder / _README).is_file():
        replace_text(folder / _README, card(record, name, *_opened_by(folder)))
    api = huggingface_hub.HfApi()
    try:
        with hub.explained(name, None):
            api.create_repo(name, private=not public, exist_ok=True)
            message = f"{record.label} by Aerogel {__version__}"
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except ConnectionError as error:
        raise AerogelError(f"{folder} could not be pushed ({error}); run `aerogel push {folder} {name}` again") from error
    return f"{constants.ENDPOINT}/{name}"


def _require_writer(api: huggingface_hub.HfApi, owner: str) -> None:
    """Raise AerogelError where there is no token, it may not write, or it is of somebody else."""
    advice = f"set HF_TOKEN to a token that may write ({constants.ENDPOINT}/settings/tokens)"
    try:
        user = api.whoami()
    except errors.LocalTokenNotFoundError as error:
        raise AerogelError(f"there is no token for the hub; {advice}, or run `hf auth login`") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise AerogelError(f"the token of {user['name']} may only read; {advice}")
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
    if owner not in owners:
        raise AerogelError(f"this token cannot push as {owner}; it is of {', '.join(owners)}")


def _files(api: huggingface_hub.HfApi, name: str) -> list[str]:
    """The files of a repository, none where it does not exist yet."""
    try:
        return [file.rfilename for file in api.model_info(name).siblings or []]
    except errors.RepositoryNotFoundError:
        return []


def _opened_by(folder: Path) -> tuple[str, str]:
    """The library that a folder is opened with, and the modality of its model."""
    config = folder / "config.json"
    settings = read_object(config) if config.is_file() else {}
    if (folder / hub.INDEX).is_file() or "_class_name" in settings:
        return "diffusers", "image"
    own = quantization_of(settings).get("quant_method") == "aerogel"
    classes = settings.get("architectures")
    first = str(classes[0]) if isinstance(classes, list) and classes else ""
    return "transformers" if settings and not own else "aerogel", "text" if first.endswith("ForCausalLM") else "image-text"
