"""Chats about images as calls: the whole chat is read, `labels` say which tokens are the last answer's.

B chats, S tokens. Prompts differ in length; the shorter ones are padded on the left.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.io.json_files import parse_object
from aerogel.model.calls import Call

IGNORED = -100
"""The label of a token that is no part of an answer."""
_FILLING = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}


@dataclass(frozen=True)
class Chat:
    """Messages that end with an answer, and the images they show, in order."""

    messages: list[dict[str, Any]]
    images: tuple[Any, ...] = ()

    @property
    def answer(self) -> str:
        """Text of the last message."""
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@dataclass(frozen=True)
class Chats:
    """Chats that a vision-language model is calibrated on."""

    source: str | Path
    """A .jsonl whose lines have `messages` and `images` (paths beside it)."""
    count: int = 256
    """Chats, drawn by seed."""
    batch: int = 8
    """Chats in one call."""


def read(source: str | Path) -> list[Chat]:
    """Return the chats of a .jsonl file; raises AerogelError, with the line, for what is no chat or an image that is not there."""
    path = Path(source)
    if not path.is_file() or path.suffix != ".jsonl":
        raise AerogelError(f"no chats at {source}; give a .jsonl file whose lines have messages and images")
    found = [_chat(line, path, number) for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1) if line.strip()]
    if not found:
        raise AerogelError(f"{path} holds no chat; expected one on each line")
    return found


def are_at(source: str | Path) -> bool:
    """Return True if a source is a .jsonl of chats about images, by its first line."""
    path = Path(source)
    if not path.is_file() or path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "messages" in record and "images" in record


def drawn(chats: Sequence[Chat], count: int, seed: int) -> list[Chat]:
    """So many of the chats, by seed; all of them, in another order, where there are no more."""
    return random.Random(seed).sample(list(chats), min(count, len(chats)))


def calls(chats: Sequence[Chat], processor: Any, batch: int = 8, device: torch.device | str = "cpu") -> list[Call]:
    """Return the forwards that read these chats; `labels` are the last answer's tokens, its end among them, and -100 elsewhere.

    Raises AerogelError for a processor without a chat template or image processor.
    """
    if not getattr(processor, "chat_template", None) or not hasattr(processor, "image_processor"):
        raise AerogelError("chats about images need a processor with an image processor and a chat template; this model has none")
    rows = [_read(chat, processor) for chat in chats]
    return [Call((), {**_joined(rows[start : start + batch], device), "use_cache": False}) for start in range(0, len(rows), batch)]


def prompts(chats: Sequence[Chat], processor: Any, batch: int = 8, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """Yield what `generate` takes for chats without their last answers, so many at a time."""
    for start in range(0, len(chats), batch):
        some = [
            dict(processor(text=_asked(chat, processor), images=list(chat.images) or None, return_tensors="pt"))
            for chat in chats[start : start + batch]
        ]
        yield _joined(some, device)


def fingerprint(chats: Sequence[Chat]) -> str:
    """Return what identifies these chats in a run's provenance: `sha256:` of their messages and pixels."""
    digest = hashlib.sha256()
    for chat in chats:
        digest.update(json.dumps(chat.messages, sort_keys=True).encode())
        for image in chat.images:
            digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _chat(line: str, path: Path, number: int) -> Chat:
    place = f"{path} line {number}"
    record = parse_object(line, place, "one JSON object a line is expected")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not _is_answered(messages):
        raise AerogelError(f"{place} is no chat with an answer; expected messages, the last with the role assistant")
    names = record.get("images", [])
    if absent := [name for name in names if not (path.parent / name).is_file()]:
        raise AerogelError(f"{place} shows {absent[0]}, which is not beside {path.name}")
    images = []
    for name in names:
        with Image.open(path.parent / name) as image:
            images.append(image.convert("RGB"))
    return Chat(messages, tuple(images))


def _is_answered(messages: list[Any]) -> bool:
    spoken = all(isinstance(message, dict) and "content" in message for message in messages)
    return spoken and messages[-1].get("role") == "assistant"


def _asked(chat: Chat, processor: Any) -> str:
    return str(processor.apply_chat_template(chat.messages[:-1], tokenize=False, add_generation_prompt=True))


def _read(chat: Chat, processor: Any) -> dict[str, Tensor]:
    asked = _asked(chat, processor)
    whole = str(processor.apply_chat_template(chat.messages, tokenize=False)).rstrip()
    if not whole.startswith(asked):
        raise AerogelError("this chat template writes a prompt otherwise once it is answered, so answers cannot be told from prompts")
    images = list(chat.images) or None
    inputs = dict(processor(text=whole, images=images, return_tensors="pt"))
    asking = len(processor(text=asked, images=images, return_tensors="pt")["input_ids"][0])
    labels = inputs["input_ids"].clone()
    labels[:, :asking] = IGNORED
    return {**inputs, "labels": labels}


def _joined(rows: Sequence[dict[str, Tensor]], device: torch.device | str) -> dict[str, Any]:
    length = max(row["input_ids"].shape[1] for row in rows)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if name in _FILLING:
            parts = [torch.nn.functional.pad(part, (length - part.shape[1], 0), value=_FILLING[name]) for part in parts]
        found[name] = torch.cat(parts).to(device)
    return found
