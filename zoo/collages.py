"""Collages of Fashion-MNIST items with questions and full-sentence answers: `python zoo/collages.py FOLDER` writes held-out ones.

The folder holds images and `samples.jsonl`, as `aerogel compress --samples` reads it. Items are those of zoo/reference, which no
training saw, so that nothing has to be installed; zoo/fashion_vlm.py learns from the training set in the same way.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fashion
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

NAMES = fashion.CLASSES
PLURALS = ("tops", "trousers", "pullovers", "dresses", "coats", "sandals", "shirts", "sneakers", "bags", "boots")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third")
SHOES, SIDES = ("sandal", "sneaker", "boot"), ((2, 2), (2, 3), (3, 2), (3, 3))
SIZE = 28


@dataclass(frozen=True)
class Items:
    """Images of single items by class."""

    pictures_NHW: np.ndarray
    labels_N: np.ndarray

    @classmethod
    def held_out(cls, half: int | None = None) -> Items:
        """The 300 items of zoo/reference, without their border; or every second of them, from 0 or 1 on."""
        kept = load_file(Path(__file__).parent / "reference" / "images.safetensors")
        chosen = slice(half, None, None if half is None else 2)
        return cls(kept["images_NCHW"][chosen, 0, 2:-2, 2:-2], kept["labels_N"][chosen])

    def of(self, label: int, dice: random.Random) -> np.ndarray:
        """Any item of a class."""
        found = np.flatnonzero(self.labels_N == label)
        image: np.ndarray = self.pictures_NHW[found[dice.randrange(len(found))]]
        return image


@dataclass(frozen=True)
class Turn:
    """A question about images, or about none."""

    kind: str
    images: tuple[np.ndarray, ...]
    question: str
    answer: str

    def messages(self) -> list[dict[str, object]]:
        """The turn as a chat, images first."""
        content = [{"type": "image"} for _ in self.images] + [{"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": self.answer}]}]


def an(name: str) -> str:
    """A name with its article."""
    return f"a {name}" if name != "trouser" else "a pair of trousers"


def counted(number: int, label: int) -> str:
    """So many items of a class."""
    return f"{NUMBERS[number]} {NAMES[label] if number == 1 else PLURALS[label]}"


def place(position: int, columns: int) -> str:
    """Where an item is."""
    return f"row {position // columns + 1}, column {position % columns + 1}"


def listed(parts: list[str]) -> str:
    """One, two and three."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def collage(items: Items, labels: list[int], columns: int, dice: random.Random) -> np.ndarray:
    """Items side by side, row after row."""
    images = [items.of(label, dice) for label in labels]
    return np.concatenate([np.concatenate(images[row : row + columns], axis=1) for row in range(0, len(labels), columns)], axis=0)


def what(items: Items, dice: random.Random) -> Turn:
    """What is at a place."""
    labels, columns = _mixed(dice)
    at = dice.randrange(len(labels))
    answer = f"The item in {place(at, columns)} is {an(NAMES[labels[at]])}."
    return Turn("what", (collage(items, labels, columns, dice),), f"What is in {place(at, columns)}?", answer)


def count(items: Items, dice: random.Random) -> Turn:
    """How many items of a class there are; half of the time some are put there."""
    labels, columns = _mixed(dice)
    wanted = dice.choice(labels) if dice.random() < 0.7 else dice.randrange(10)
    if dice.random() < 0.5:
        labels = [wanted if dice.random() < 0.4 else label for label in labels]
    number = labels.count(wanted)
    answer = f"There {'is' if number == 1 else 'are'} {counted(number, wanted)} in the picture."
    return Turn("count", (collage(items, labels, columns, dice),), f"How many {PLURALS[wanted]} are there?", answer)


def differ(items: Items, dice: random.Random) -> Turn:
    """Which item is not like the others."""
    rows, columns = dice.choice(SIDES)
    usual, odd = dice.sample(range(10), 2)
    labels = [usual] * (rows * columns)
    at = dice.randrange(len(labels))
    labels[at] = odd
    answer = f"The item in {place(at, columns)} differs: it is {an(NAMES[odd])}, the others are {PLURALS[usual]}."
    return Turn("differ", (collage(items, labels, columns, dice),), "Which item differs from the others?", answer)


def describe(items: Items, dice: random.Random) -> Turn:
    """All items in order."""
    labels, columns = _mixed(dice)
    rows = [labels[start : start + columns] for start in range(0, len(labels), columns)]
    said = [f"The {ORDINALS[number]} row shows {listed([an(NAMES[label]) for label in row])}." for number, row in enumerate(rows)]
    return Turn("describe", (collage(items, labels, columns, dice),), "Describe the picture.", " ".join(said))


def which(items: Items, dice: random.Random) -> Turn:
    """Which of two images shows something."""
    labels = dice.sample(range(10), 8)
    at = dice.randrange(8)
    images = tuple(collage(items, half, 2, dice) for half in (labels[:4], labels[4:]))
    answer = f"The {ORDINALS[at // 4]} picture shows {an(NAMES[labels[at]])}."
    return Turn("which", images, f"Which picture shows {an(NAMES[labels[at]])}?", answer)


def text(_: Items, dice: random.Random) -> Turn:
    """Sums and kinds of things, without any image."""
    one, other, label = dice.randrange(50), dice.randrange(50), dice.randrange(10)
    shoe = NAMES[label] in SHOES
    turns = [
        (f"What is {one} plus {other}?", f"{one} plus {other} is {one + other}."),
        (f"Is {an(NAMES[label])} worn on the feet?", f"{'Yes' if shoe else 'No'}, {PLURALS[label]} are {'' if shoe else 'not '}shoes."),
        (f"What comes after {one}?", f"After {one} comes {one + 1}."),
    ]
    return Turn("text", (), *turns[dice.randrange(3)])


KINDS: dict[str, Callable[[Items, random.Random], Turn]] = {
    "what": what, "count": count, "differ": differ, "describe": describe, "which": which, "text": text,
}  # fmt: skip
SHARES = {"what": 3, "count": 2, "differ": 1, "describe": 3, "which": 1, "text": 2}
"""How often each kind is asked."""


def draw(items: Items, number: int, seed: int) -> list[Turn]:
    """So many turns, the same for the same seed."""
    dice = random.Random(seed)
    kinds = dice.choices(list(SHARES), list(SHARES.values()), k=number)
    return [KINDS[kind](items, dice) for kind in kinds]


def write(turns: list[Turn], folder: Path) -> Path:
    """Write images and `samples.jsonl`, and return the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, turn in enumerate(turns):
        names = [f"{number:04d}-{place}.png" for place in range(len(turn.images))]
        for name, image in zip(names, turn.images, strict=True):
            Image.fromarray(image).save(folder / name)
        lines.append(json.dumps({"images": names, "messages": turn.messages(), "kind": turn.kind}))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _mixed(dice: random.Random) -> tuple[list[int], int]:
    rows, columns = dice.choice(SIDES)
    return [dice.randrange(10) for _ in range(rows * columns)], columns


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(write(draw(Items.held_out(), given.count, given.seed), given.folder))


if __name__ == "__main__":
    main()
