"""Scattered items: what is asked and answered is what lies in the image."""

from __future__ import annotations

import random

from tests.questions import zoo

scattered, collages = zoo("scattered"), zoo("collages")
ITEMS = collages.Items.held_out()


def test_places_hold_what_the_scene_says() -> None:
    """Nothing is brighter than the ground outside of the items' places; a tag is white, and only one item has one."""
    for seed in range(20):
        laid, image_HWC = scattered.scene(ITEMS, random.Random(seed))
        assert len({item.place for item in laid}) == len(laid) in range(3, 7)
        assert sum(item.tagged for item in laid) == 1
        for place in range(9):
            top, left = (scattered.CELL * at for at in divmod(place, 3))
            cell_HWC = image_HWC[top : top + scattered.CELL, left : left + scattered.CELL]
            there = [item for item in laid if item.place == place]
            assert (cell_HWC.max() >= scattered.NOISE) == bool(there)
            assert (cell_HWC.min(2) == 255).sum() == scattered.TAG**2 * (bool(there) and there[0].tagged)


def test_answers_follow_from_the_scene() -> None:
    for seed in range(50):
        dice = random.Random(seed)
        laid, _ = scattered.scene(ITEMS, dice)
        turns = scattered.asked(laid, dice)
        labels = [item.label for item in laid]
        question, answer = turns["count"]
        wanted = [label for label in range(10) if f"How many {collages.PLURALS[label]} " in question]
        number = labels.count(wanted[0]) if wanted else len(laid)
        assert f" {collages.NUMBERS[number]} " in answer
        asked_place = next(place for place in range(9) if scattered.PLACES[place] in turns["kind"][0])
        there = [collages.an(collages.NAMES[item.label]) for item in laid if item.place == asked_place]
        assert f"There is {there[0] if there else 'nothing'} in" in turns["kind"][1]
        assert ("place" in turns) == (1 in map(labels.count, labels))


def test_chats_of_two_turns_ask_two_things_about_one_image() -> None:
    drawn = scattered.draw(ITEMS, 16, seed=3, turns=2)
    assert [chat.kind for chat in drawn] == ["place", "kind", "count", "detail"] * 4
    assert all(len({question for question, _ in chat.turns}) == 2 and len(chat.images) == 1 for chat in drawn)
    again = scattered.draw(ITEMS, 16, seed=3, turns=2)
    assert [chat.turns for chat in again] == [chat.turns for chat in drawn]
    assert [len(chat.messages()) for chat in drawn] == [4] * 16
