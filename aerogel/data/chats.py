"""Chats about images as calls: the whole chat is read, `labels` say which tokens are the last answer's.

B chats, S tokens. Chats of one length share a call of the calibration, so it has no padding: a layer of experts or of an image encoder
could not tell which rows of its input to leave out of statistics. Where nothing but answers is read, chats are padded on the left.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aerogel.data import files, messages, sources
from aerogel.data.files import Record
from aerogel.data.records import CHATS
from aerogel.data.unpacking import PACKED
from aerogel.errors import AerogelError
from aerogel.model.calls import Call

IGNORED = -100
"""The label of a token that is no part of an answer."""
MOST_STREAMED = 1024
"""Chats that are read of a dataset of the hub at most."""
_IMAGES = ("images", "image")
"""Columns with what a chat shows."""
_PLACE = "<image>"
"""Mark in the text of ShareGPT's format where an image is shown."""
_FILLING = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}


@dataclass(frozen=True)
class Chat:
    """Messages that end with an answer, and the images they show, in order."""

    messages: list[dict[str, Any]]
    images: tuple[Any, ...] = ()
    place: str = "a chat"
    """Where it was read, for errors."""

    @property
    def answer(self) -> str:
        """Text of the last message."""
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@dataclass(frozen=True)
class Chats:
    """Chats that a vision-language model is calibrated on."""

    source: str | Path
    """Records with `messages` or `conversations`, and `images` or `image`: in a .jsonl, say, with the paths of the images beside it."""
    count: int = 256
    """Chats, drawn by seed."""
    batch: int = 8
    """Chats in one call at most; those of one call are equally long."""
    column: str | None = None
    """Column with the chat; None finds it by its name."""


def read(source: str | Path, column: str | None = None, most: int | None = None) -> list[Chat]:
    """Return the chats of a file of records, a folder of them or a dataset; with `most` so many of its first ones.

    Raises AerogelError, with the line, for what is no chat or an image that is not there or cannot be opened.
    """
    if _is_text(source):
        raise AerogelError(f"no chats at {source}; give a .jsonl file whose lines have messages and images, or another file of records")
    bound = MOST_STREAMED if most is None and sources.is_streamed(source) else None
    records = sources.records(source)
    found = [_chat(record, Path(source).parent, column) for record in islice(records, most or bound)]
    if bound is not None and next(records, None) is not None:
        warnings.warn(f"{source} is read up to its first {bound:,} chats", stacklevel=2)
    if not found:
        raise AerogelError(f"{source} holds no chat; expected one on each line")
    return found


def are_at(source: str | Path) -> bool:
    """Return True if a source has chats about images, by its first record."""
    if _is_text(source):
        return False
    try:
        first = next(sources.records(source), None)
    except AerogelError:  # which is said where it is read as text
        return False
    value = None if first is None else first.value
    return isinstance(value, Mapping) and any(name in value for name in CHATS) and any(name in value for name in _IMAGES)


def _is_text(source: str | Path) -> bool:
    """True for shipped text, and for what by its name is a file of text."""
    is_streamed = sources.is_streamed(source)
    there = not is_streamed and not Path(source).is_dir() and files.format_of(Path(source)) == ".txt"
    return there or (is_streamed and Path(source).suffix.lower() in (*files.FORMATS, *PACKED))


def drawn(chats: Sequence[Chat], count: int, seed: int) -> list[Chat]:
    """So many of the chats, by seed; all of them, in another order, where there are no more."""
    return random.Random(seed).sample(list(chats), min(count, len(chats)))


def calls(chats: Sequence[Chat], processor: Any, batch: int = 8, device: torch.device | str = "cpu", *, padded: bool = False) -> list[Call]:
    """Return the forwards that read these chats: those of one length together, or `padded` as many as go into a batch in their order.

    `labels` are the last answer's tokens, its end among them, and -100 elsewhere. Raises AerogelError for a processor without a chat
    template or image processor.
    """
    parts = {"chat template": getattr(processor, "chat_template", None), "image processor": hasattr(processor, "image_processor")}
    if missing := [name for name, found in parts.items() if not found]:
        model = getattr(getattr(processor, "tokenizer", processor), "name_or_path", None) or "this model"
        raise AerogelError(
            f"chats about images need a processor with an image processor and a chat template; {model} has no {' and no '.join(missing)}"
        )
    alike: dict[Any, list[dict[str, Tensor]]] = {}
    for row in (_read(chat, processor) for chat in chats):
        alike.setdefault(None if padded else _shape_of(row), []).append(row)
    batches = [rows[start : start + batch] for rows in alike.values() for start in range(0, len(rows), batch)]
    return [Call((), {**_joined(rows, device), "use_cache": False}) for rows in batches]


def prompts(chats: Sequence[Chat], processor: Any, batch: int = 8, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """Yield what `generate` takes for chats without their last answers, so many at a time."""
    for start in range(0, len(chats), batch):
        some = [_processed(chat, processor, _asked(chat, processor)) for chat in chats[start : start + batch]]
        yield _joined(some, device)


def fingerprint(chats: Sequence[Chat]) -> str:
    """Return what identifies these chats in a run's provenance: `sha256:` of their messages and pixels."""
    digest = hashlib.sha256()
    for chat in chats:
        digest.update(json.dumps(chat.messages, sort_keys=True).encode())
        for image in chat.images:
            digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _chat(record: Record, folder: Path, column: str | None) -> Chat:
    value, place = record
    name = column or next((name for name in CHATS if isinstance(value, Mapping) and name in value), "messages")
    turns = value.get(name) if isinstance(value, Mapping) else None
    found = messages.messages_of(turns, place) if isinstance(turns, list) else []
    if not found or found[-1]["role"] != "assistant" or found[-1]["content"] is None:
        raise AerogelError(f"{place} is no chat with an answer; expected {name}, the last with the role assistant")
    shown: Any = next((value[key] for key in _IMAGES if value.get(key) is not None), [])
    images = tuple(_image(image, folder, place) for image in (shown if isinstance(shown, list) else [shown]))
    chat = Chat(_with_places(found) if name != "messages" else found, images, place)
    if not chat.answer:
        raise AerogelError(f"{place}: its answer, the last turn, has no text")
    files.require_unicode(json.dumps(chat.messages, ensure_ascii=False, default=str), place)
    return chat


def _with_places(turns: list[messages.Message]) -> list[messages.Message]:
    """Turns of ShareGPT's format with parts of content where their text has the mark of an image."""
    return [{**turn, "content": _parts(turn["content"])} if _PLACE in str(turn["content"]) else turn for turn in turns]


def _parts(content: str) -> list[dict[str, str]]:
    first, *others = content.split(_PLACE)
    parts: list[dict[str, str]] = [{"type": "text", "text": first.strip()}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other.strip()}]
    return [part for part in parts if part.get("text") != ""]


def _image(given: Any, folder: Path, place: str) -> Image.Image:
    """An image in RGB: from a path beside the file, from bytes, or one that is open."""
    opened = given.get("bytes") or given.get("path") if isinstance(given, Mapping) else given
    if isinstance(opened, str) and not (folder / opened).is_file():
        raise AerogelError(f"{place} shows {opened}, which is not beside the file")
    if not isinstance(opened, str | bytes | Image.Image):
        raise AerogelError(f"{place} has an image that is {type(given).__name__}, expected a path beside the file or an image")
    try:
        if isinstance(opened, Image.Image):
            return opened.convert("RGB")
        with Image.open(folder / opened if isinstance(opened, str) else io.BytesIO(opened)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
        what = opened if isinstance(opened, str) else "an image"
        raise AerogelError(f"{place} shows {what}, which cannot be opened ({' '.join(str(error).split())[:120]})") from error


def _asked(chat: Chat, processor: Any) -> str:
    with messages.explained(chat.messages, chat.place):
        return str(processor.apply_chat_template(chat.messages[:-1], tokenize=False, add_generation_prompt=True))


def _read(chat: Chat, processor: Any) -> dict[str, Tensor]:
    asked = _asked(chat, processor)
    with messages.explained(chat.messages, chat.place):
        whole = str(processor.apply_chat_template(chat.messages, tokenize=False)).rstrip()
    if not whole.startswith(asked):
        raise AerogelError("this chat template writes a prompt otherwise once it is answered, so answers cannot be told from prompts")
    inputs = _processed(chat, processor, whole)
    asking = len(_processed(chat, processor, asked)["input_ids"][0])
    labels = inputs["input_ids"].clone()
    labels[:, :asking] = IGNORED
    return {**inputs, "labels": labels}


def _processed(chat: Chat, processor: Any, text: str) -> dict[str, Any]:
    """Run the processor on a chat; raises AerogelError for whatever its code raises, of settings or of images without a place."""
    try:
        return dict(processor(text=text, images=list(chat.images) or None, return_tensors="pt"))
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise AerogelError(
            f"{chat.place}: the model's processor cannot read this chat with {len(chat.images)} images ({reason}); "
            "see that every image has one place in the text, and that the processor's files are sound"
        ) from error


def _shape_of(row: dict[str, Tensor]) -> tuple[Any, ...]:
    """Return what rows of one call have in common: their tokens, and the shape of an image, of which a row may have any number."""
    return tuple((name, tensor.shape[1:]) for name, tensor in row.items())


def _joined(rows: Sequence[dict[str, Tensor]], device: torch.device | str) -> dict[str, Any]:
    length = max(row["input_ids"].shape[1] for row in rows)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if name in _FILLING:
            parts = [torch.nn.functional.pad(part, (length - part.shape[1], 0), value=_FILLING[name]) for part in parts]
        found[name] = torch.cat(parts).to(device)
    return found
