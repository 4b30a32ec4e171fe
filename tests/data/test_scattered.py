"""Scattered items: answers say what lies in the image; training asks for each item and masks what is empty."""

from __future__ import annotations

import random

import torch

import aerogel
from aerogel.data import chats
from tests.questions import ZOO, zoo

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


def test_training_asks_once_for_each_item_and_for_an_empty_place() -> None:
    for seed in range(50):
        dice = random.Random(seed)
        laid, _ = scattered.scene(ITEMS, dice)
        *turns, (question, answer) = scattered.one_each(laid, dice)
        assert len(turns) == len(laid)
        places = [next(place for place in range(9) if f" {scattered.PLACES[place]}." in answer) for _, answer in turns]
        assert places == [item.place for item in laid]
        assert "There is nothing" in answer
        assert not any(scattered.PLACES[place] in question for place in places)


def test_only_empty_tokens_are_masked_and_positions_stay() -> None:
    network = aerogel.load(ZOO / "scattered-vlm", lazy=False)
    trained = zoo("scattered_vlm")
    drawn = trained.taught(ITEMS, 2, seed=1)
    (call,) = chats.calls([trained.read(chat) for chat in drawn], network.processor, 2, padded=True)
    given = trained.fewer_empty_tokens(call.kwargs, network.module, torch.Generator().manual_seed(0))
    masked_BS = (call.kwargs["attention_mask"] == 1) & (given["attention_mask"] == 0)
    image_BS = call.kwargs["input_ids"] == network.config.image_token_id
    assert 0 < masked_BS.sum() < image_BS.sum()
    assert not (masked_BS & ~image_BS).any()
    for chat, masked_S, there_S in zip(drawn, masked_BS, image_BS, strict=True):
        image_HWC = torch.from_numpy(chat.images[0])
        lit_T = image_HWC.unfold(0, 14, 14).unfold(1, 14, 14).amax((2, 3, 4)).flatten() >= scattered.NOISE
        assert not (masked_S[there_S] & lit_T).any()
    with torch.no_grad():
        plain = network.module(**call.kwargs).logits
        placed = network.module(**call.kwargs, position_ids=given["position_ids"]).logits
    assert torch.equal(plain, placed)
