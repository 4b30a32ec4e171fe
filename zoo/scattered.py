"""Small coloured items of Fashion-MNIST scattered over an empty image, with questions on place, kind, count and detail.

`python zoo/scattered.py FOLDER` writes held-out ones as zoo/collages.py does. An image is 168 pixels wide and high, 144 tokens of
zoo/scattered-vlm, and most of it shows nothing. With --turns 2 a chat asks twice about one image.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import collages
import numpy as np

SIDE, CELL, STEP = 168, 56, 14
"""Pixels of an image, of one of its nine places, and between positions of an item, which is two tokens wide and high."""
PLACES = tuple(f"{row} {column}" for row in ("upper", "middle", "lower") for column in ("left", "center", "right"))
COLOURS = {"red": (255, 60, 60), "green": (60, 220, 60), "blue": (80, 110, 255), "yellow": (240, 220, 50)}
NOISE = 24
"""Brightest shade of the ground."""
TAG = 6
"""Pixels of the white square that one item wears at a corner."""


@dataclass(frozen=True)
class Item:
    """What lies at a place."""

    place: int
    label: int
    colour: str
    tagged: bool


@dataclass(frozen=True)
class Chat:
    """Questions about one image with their answers."""

    kind: str
    """The last question's kind."""
    images: tuple[np.ndarray, ...]
    turns: tuple[tuple[str, str], ...]

    def messages(self) -> list[dict[str, object]]:
        """The chat, its image first."""
        said: list[dict[str, object]] = []
        for number, (question, answer) in enumerate(self.turns):
            image = [{"type": "image"}] * (number == 0)
            said.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return said


def scene(items: collages.Items, dice: random.Random) -> tuple[list[Item], np.ndarray]:
    """Three to six items at places of their own, some of them of one kind, and their image."""
    number = dice.randint(3, 6)
    labels = [dice.randrange(10) for _ in range(number)]
    if dice.random() < 0.5:
        labels = [dice.choice(labels[:2]) for _ in labels]
    places, tagged = dice.sample(range(9), number), dice.randrange(number)
    colours = dice.choices(list(COLOURS), k=number)
    laid = [Item(places[at], labels[at], colours[at], at == tagged) for at in range(number)]
    return laid, _drawn(items, laid, dice)


def asked(laid: list[Item], dice: random.Random) -> dict[str, tuple[str, str]]:
    """A question of each kind with its answer; none for a place where no kind is there once only."""
    single, one = _single(laid), dice.choice(laid)
    turns = {"kind": _kind(laid, dice), "count": _count([item.label for item in laid], dice)}
    turns["detail"] = dice.choice([*_details(laid, one)])
    if single:
        turns["place"] = _where(dice.choice(single))
    return turns


def one_each(laid: list[Item], dice: random.Random) -> list[tuple[str, str]]:
    """A question for each item, mostly for the place of one whose kind is there once, and one for a place with nothing."""
    single = _single(laid)
    empty = dice.choice([place for place in range(9) if place not in {item.place for item in laid}])
    turns = [_where(item) if item in single and dice.random() < 0.7 else _what(item.place, item.label) for item in laid]
    return [*turns, _what(empty, None)]


def described(laid: list[Item]) -> tuple[str, str]:
    """A question for everything, with its answer, from the upper left to the lower right."""
    said = (f"The {PLACES[one.place]} shows a {one.colour} {collages.NAMES[one.label]}." for one in sorted(laid, key=lambda one: one.place))
    return "Describe the image.", " ".join(said)


def draw(items: collages.Items, number: int, seed: int, turns: int = 1) -> list[Chat]:
    """So many chats of so many turns, the same for the same seed; the kinds take turns."""
    dice = random.Random(f"{seed} {turns}")
    drawn: list[Chat] = []
    while len(drawn) < number:
        laid, image = scene(items, dice)
        found = asked(laid, dice)
        wanted = ("place", "kind", "count", "detail")[len(drawn) % 4]
        if wanted in found:
            before = dice.sample([kind for kind in found if kind != wanted], turns - 1)
            drawn.append(Chat(wanted, (image,), tuple(found[kind] for kind in [*before, wanted])))
    return drawn


def _single(laid: list[Item]) -> list[Item]:
    labels = [item.label for item in laid]
    return [item for item in laid if labels.count(item.label) == 1]


def _where(item: Item) -> tuple[str, str]:
    name = collages.NAMES[item.label]
    return f"Where is the {name}?", f"The {name} is in the {PLACES[item.place]}."


def _kind(laid: list[Item], dice: random.Random) -> tuple[str, str]:
    taken = {item.place: item.label for item in laid}
    place = dice.choice(list(taken)) if dice.random() < 0.85 else dice.randrange(9)
    return _what(place, taken.get(place))


def _what(place: int, label: int | None) -> tuple[str, str]:
    there = "nothing" if label is None else collages.an(collages.NAMES[label])
    return f"What is in the {PLACES[place]}?", f"There is {there} in the {PLACES[place]}."


def _count(labels: list[int], dice: random.Random) -> tuple[str, str]:
    if dice.random() < 0.3:
        return "How many items are there?", f"There are {collages.NUMBERS[len(labels)]} items."
    wanted = dice.choice(labels) if dice.random() < 0.85 else dice.randrange(10)
    number = labels.count(wanted)
    return f"How many {collages.PLURALS[wanted]} are there?", f"There {'is' if number == 1 else 'are'} {collages.counted(number, wanted)}."


def _details(laid: list[Item], one: Item) -> Iterator[tuple[str, str]]:
    yield f"What colour is the item in the {PLACES[one.place]}?", f"It is {one.colour}."
    tagged = next(item for item in laid if item.tagged)
    yield "Which item has a tag?", f"The tag is on {collages.an(collages.NAMES[tagged.label])}."


def _drawn(items: collages.Items, laid: list[Item], dice: random.Random) -> np.ndarray:
    noise = np.random.default_rng(dice.randrange(2**32))
    image_HWC = np.repeat(noise.integers(0, NOISE, (SIDE, SIDE, 1), dtype=np.uint8), 3, axis=2)
    for item in laid:
        top, left = (CELL * at + STEP * dice.randrange((CELL - collages.SIZE) // STEP + 1) for at in divmod(item.place, 3))
        shade_HW1 = items.of(item.label, dice)[..., None].astype(np.float32) / 255
        tinted_HWC = (shade_HW1 * np.array(COLOURS[item.colour], np.float32)).astype(np.uint8)
        if item.tagged:
            tinted_HWC[:TAG, :TAG] = 255
        ground_HWC = image_HWC[top : top + collages.SIZE, left : left + collages.SIZE]
        np.maximum(ground_HWC, tinted_HWC, out=ground_HWC)
    return image_HWC


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--turns", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(collages.write(draw(collages.Items.held_out(), given.count, given.seed, given.turns), given.folder))


if __name__ == "__main__":
    main()
