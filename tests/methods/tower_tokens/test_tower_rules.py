"""Rules of the vision tower: planted salience stays, questions do not matter, duplicates are not all kept, counts are those published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.tower_tokens.fastervlm import Fastervlm
from aerogel.methods.tower_tokens.mustdrop import Mustdrop
from aerogel.methods.tower_tokens.policy import TowerPolicy
from aerogel.methods.tower_tokens.tome import Tome
from aerogel.methods.tower_tokens.visionzip import Visionzip, taken_up
from aerogel.methods.tower_tokens.vispruner import Vispruner, thinned
from aerogel.model.network import Network
from aerogel.runtime.tokens.images import Image, image_path_of
from tests.tiny import FAMILIES, IMAGE_TOKEN, opened

IMAGE_FAMILIES = ["internvl", "llava", "qwen2_5_vl", "qwen3_vl_moe"]
RULES: list[Any] = [Fastervlm(keep=2), Vispruner(keep=2), Visionzip(dominant=1, contextual=1)]


def image(tokens: int, seed: int = 0) -> Image:
    random = torch.Generator().manual_seed(seed)
    score_P = torch.rand(tokens, generator=random)
    return Image(score_P, torch.randn(tokens, 8, generator=random), torch.randn(tokens, 16, generator=random))


def dropped(network: Network, policy: Any, state: Any, call: Any) -> Tensor:
    with policy.on(network, state):
        return network.run(call).logits.isnan().any(-1)


@pytest.mark.parametrize("policy", RULES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_as_many_stay_as_asked_for_whatever_the_question(name: str, policy: TowerPolicy) -> None:
    network = opened(name)
    call = FAMILIES[name].calls(2)[1]
    state = policy.calibrate(network, [call])
    ids_BN = call.kwargs["input_ids"]
    tokens_B = (ids_BN == IMAGE_TOKEN).sum(1)
    gone_BN = dropped(network, policy, state, call)
    assert torch.equal(gone_BN.sum(1), tokens_B - 2)
    assert not (gone_BN & (ids_BN != IMAGE_TOKEN)).any()
    text_BN = (ids_BN < 100) & (ids_BN > 2)
    other = type(call)((), {**call.kwargs, "input_ids": torch.where(text_BN, (ids_BN + 7) % 90 + 3, ids_BN)})
    assert torch.equal(dropped(network, policy, state, other), gone_BN)
    assert state.kept == pytest.approx(2 / float(tokens_B[0]))


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_the_path_of_an_image(name: str) -> None:
    network = opened(name)
    path = image_path_of(network, FAMILIES[name].calls(1)[0])
    expected = {
        # Of three blocks the second: its output is what the decoder gets.
        "llava": ("model.vision_tower.encoder.layers.1.self_attn", "model.multi_modal_projector", True, True),
        "internvl": ("model.vision_tower.encoder.layer.1.attention", "model.multi_modal_projector", True, True),
        # The first block sees windows only.
        "qwen2_5_vl": ("model.visual.blocks.1.attn", "model.visual.merger", False, False),
        "qwen3_vl_moe": ("model.visual.blocks.1.attn", "model.visual.merger", False, False),
    }
    assert tuple(path.saved().values()) == expected[name]


def test_scores_are_those_of_the_class_token() -> None:
    """What FasterVLM reads equals the attention that transformers gives when it computes step by step."""
    network = opened("llava")
    call = FAMILIES["llava"].calls(1)[0]
    seen: list[Image] = []

    class Look(Fastervlm):
        def choose(self, image: Image) -> None:
            seen.append(image)

    state = Fastervlm().calibrate(network, [call])
    with Look().on(network, state):
        network.run(call)
    tower = network.module.model.vision_tower
    tower.set_attn_implementation("eager")
    probability_IHSS = tower(call.kwargs["pixel_values"], output_attentions=True).attentions[-2]
    for one, probability_HSS in zip(seen, probability_IHSS, strict=True):
        torch.testing.assert_close(one.score_P, probability_HSS.mean(0)[0, 1:])


@pytest.mark.parametrize("policy", [Fastervlm(keep=20), Visionzip(dominant=20, contextual=5), Vispruner(keep=40)])
def test_planted_salience_stays(policy: TowerPolicy) -> None:
    planted = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:20]
    one = image(64)
    one.score_P[planted] += 2
    chosen = policy.choose(one)
    assert chosen is not None
    assert chosen.keep_P[planted].all()


@pytest.mark.parametrize("policy", [Vispruner(keep=8, important=0.0), Visionzip(dominant=2, contextual=6)])
def test_one_of_each_kind_stays(policy: TowerPolicy) -> None:
    """An image of four distinct patches, repeated."""
    kinds = image(4)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)) % 4
    one = Image(torch.rand(24, generator=torch.Generator().manual_seed(0)), kinds.key_PD[order], kinds.row_PC[order])
    chosen = policy.choose(one)
    assert chosen is not None
    assert set(order[chosen.keep_P].tolist()) == {0, 1, 2, 3} if isinstance(policy, Vispruner) else int(chosen.keep_P.sum()) == 8


def test_thinning_drops_the_most_alike() -> None:
    x_PC = torch.eye(6)
    x_PC[2] = x_PC[1] + 0.01 * x_PC[0]
    assert thinned(x_PC, torch.arange(6), 5).tolist() == [0, 1, 3, 4, 5]
    assert thinned(x_PC, torch.arange(6), 1).tolist() != []
    assert len(thinned(torch.randn(575, 4), torch.arange(575), 96)) == 96


def test_a_contextual_token_is_itself_plus_the_mean_of_its_own() -> None:
    key_PD = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.9, 0], [0.1, 1]])
    row_PC = torch.tensor([[1.0], [2], [4], [8], [16]])
    changed_PC = taken_up(row_PC, key_PD, torch.tensor([0, 1]), torch.tensor([2, 3, 4]))
    assert changed_PC.flatten().tolist() == [1 + (4 + 8) / 2, 2 + 16, 4, 8, 16]


@pytest.mark.parametrize(("dominant", "contextual"), [(161, 30), (107, 20), (53, 10)])
def test_published_counts_of_visionzip(dominant: int, contextual: int) -> None:
    chosen = Visionzip(dominant=dominant, contextual=contextual).choose(image(576))
    assert chosen is not None
    assert int(chosen.keep_P.sum()) == dominant + contextual


@pytest.mark.parametrize(("keep", "windows"), [(192, 48), (128, 56), (64, 64)])
def test_published_counts_of_mustdrop(keep: int, windows: int) -> None:
    chosen = Mustdrop(keep=keep).choose(image(576))
    assert chosen is not None
    assert int(chosen.keep_P.sum()) == 576 - 8 * windows == keep


def test_windows_that_are_alike_are_merged() -> None:
    one = image(36)
    one.row_PC[torch.tensor([0, 1, 2, 6, 7, 8, 12, 13, 14])] = one.row_PC[0] + 0.01 * one.row_PC[1:10]
    chosen = Mustdrop(threshold=0.9).choose(one)
    assert chosen is not None
    assert (~chosen.keep_P).nonzero()[:, 0].tolist() == [0, 1, 2, 6, 7, 8, 12, 13]
    assert chosen.row_PC is not None
    torch.testing.assert_close(chosen.row_PC[14], one.row_PC[[0, 1, 2, 6, 7, 8, 12, 13, 14]].mean(0))
    assert Mustdrop(threshold=1.0).choose(image(36)) is None


def test_pairs_of_tome() -> None:
    assert sum(Tome().counts(576, 23)) == 368
    assert Tome(keep=192).counts(576, 23) == (17,) * 16 + (16,) * 7
    assert Tome(pairs=(3, 2)).counts(4, 2) == (3, 2)
    with pytest.raises(AerogelError, match="pairs has 2 numbers, and 23 blocks"):
        Tome(pairs=(3, 2)).counts(576, 23)


@pytest.mark.parametrize("as_lightcompress", [False, True])
def test_tome_equals_blocks_written_out(as_lightcompress: bool) -> None:
    """The tower of CLIP, block by block in plain tensors, with merging between attention and feed-forward."""
    network = opened("llava")
    call = FAMILIES["llava"].calls(1)[0]
    policy = Tome(pairs=1, as_lightcompress=as_lightcompress)
    state = policy.calibrate(network, [call])
    read: list[Tensor] = []
    handle = network.module.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with policy.on(network, state):
        network.run(call)
    handle.remove()
    tower = network.module.model.vision_tower
    for number, pixels in enumerate(call.kwargs["pixel_values"]):
        x = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
        size, place = torch.ones(len(x)), list(range(len(x)))
        for block in list(tower.encoder.layers)[:2]:
            attention = block.self_attn
            y = block.layer_norm1(x)
            layers = attention.q_proj, attention.k_proj, attention.v_proj
            q, k, v = (layer(y).unflatten(-1, (attention.num_heads, -1)) for layer in layers)
            mass = torch.ones(len(x)) if as_lightcompress else size
            heads = [((q[:, h] @ k[:, h].T) * attention.scale + mass.log()).softmax(-1) @ v[:, h] for h in range(attention.num_heads)]
            x = x + attention.out_proj(torch.cat(heads, dim=-1))
            key = torch.nn.functional.normalize(k.mean(1), dim=-1)
            pairs = [(a, b) for a in range(2, len(x), 2) for b in range(1, len(x), 2)]
            one, other = max(pairs, key=lambda pair: float(key[pair[0]] @ key[pair[1]]))
            whole = mass.clone()
            x[other] = (whole[one] * x[one] + whole[other] * x[other]) / (whole[one] + whole[other])
            size = mass.clone()
            size[other] += mass[one]
            left = [token for token in range(len(x)) if token != one]
            x, size, place = x[left], size[left], [place[token] for token in left]
            x = x + block.mlp(block.layer_norm2(x))
        torch.testing.assert_close(read[0][number], x[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", [*RULES, Tome(pairs=1)], ids=lambda policy: type(policy).__name__)
def test_generation_runs_and_leaves_the_network_as_it_was(policy: Any) -> None:
    network = opened("llava")
    call = FAMILIES["llava"].calls(2)[1]
    state = policy.calibrate(network, [call])
    given = {key: value for key, value in call.kwargs.items() if key != "use_cache"}
    before = network.run(call).logits
    with policy.on(network, state):
        made = network.module.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert made.shape[1] == call.kwargs["input_ids"].shape[1] + 5
    assert torch.equal(network.run(call).logits, before)
