"""Rules that drop image tokens on zoo/scattered-vlm, at equal numbers of tokens: who beats chance, and what a second question costs.

    python benchmarks/token_rules.py                # an hour on one core -> results/token_rules.json, token_grid.json, token_turns.json
    python benchmarks/token_rules.py rules grid     # some of them
    python benchmarks/token_rules.py --quick        # few chats, one seed; nothing is written

An answer counts where the model, given its beginning, ranks each of its tokens first: then greedy decoding writes it. Rules see the prompt
alone. Chats are drawn by seeds that no setting was chosen with.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import write
from torch import Tensor

import aerogel
from aerogel.data import chats
from aerogel.engine.opening import open_model
from aerogel.methods.tokens.dart import Dart
from aerogel.methods.tokens.divprune import Divprune
from aerogel.methods.tokens.downsampling import Downsampling
from aerogel.methods.tokens.fastv import Fastv
from aerogel.methods.tokens.policy import Budget, TokenPolicy, keeping_best
from aerogel.methods.tokens.pyramid_drop import PyramidDrop
from aerogel.methods.tokens.random_tokens import RandomTokens
from aerogel.methods.tokens.sparsevlm import Sparsevlm
from aerogel.methods.tower_tokens.fastervlm import Fastervlm
from aerogel.methods.tower_tokens.visionzip import Visionzip
from aerogel.methods.tower_tokens.vispruner import Vispruner
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.metrics import kl_divergence
from aerogel.runtime.predictions import logits_at, predicted
from aerogel.runtime.token_types import VISION, Vocabulary
from aerogel.runtime.tokens.stage import Rule, Selection, Stage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "zoo"))
import collages
import scattered
import scattered_vlm

MODEL = Path(scattered_vlm.OUTPUT)
TOKENS, COUNTS, SEEDS, CHATS, BATCH = 144, (72, 36, 18), (1, 2, 3), 128, 16
TURNS_AT = 36
"""Image tokens that are kept where a chat asks twice."""
QUANTIZED: dict[str, Any] = {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}


@dataclass(frozen=True)
class Garments(TokenPolicy):
    """Keeps what differs most from the ground by its pixels: an upper bound, since it knows how the images were made."""

    keep: Budget = 0.5

    def rules(self, depth: int) -> dict[int, Rule]:
        """Return the rule."""
        return {0: self.choose}

    def choose(self, stage: Stage) -> Selection | None:
        """Rank tokens by their brightest pixel, then by all of them."""
        shade_TX = stage.inputs["pixel_values"].reshape(int(stage.vision_BK.sum()), -1).float()
        score_BK = torch.zeros(stage.kind_BK.shape)
        score_BK[stage.vision_BK] = shade_TX.amax(1) + shade_TX.mean(1)
        return keeping_best(stage, score_BK, self.keep)


RULES: dict[str, type[TokenPolicy]] = {
    "fastervlm": Fastervlm, "vispruner": Vispruner, "visionzip": Visionzip, "divprune": Divprune, "fastv": Fastv,
    "pyramid_drop": PyramidDrop, "sparsevlm": Sparsevlm, "dart": Dart,
}  # fmt: skip
BASELINES: dict[str, type[TokenPolicy]] = {"random_tokens": RandomTokens, "downsampling": Downsampling, "oracle": Garments}
OPTIONS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 2}, "dart": {"layer": 2, "exact": True}, "pyramid_drop": {"layers": (1, 2, 3)}, "sparsevlm": {"layers": (1, 2, 3)},
}  # fmt: skip
"""Blocks of a decoder of six; published ones are for 28 to 32."""


class Outcome(NamedTuple):
    """What came out for some chats."""

    right: dict[str, list[bool]]
    """By the kind of the question."""
    kl: float
    """Nats an answer token."""
    left: float
    """Image tokens behind the last block, a mean over chats."""
    computed: float
    """Image tokens that a block computes, a mean over blocks and chats."""

    @property
    def exact(self) -> float:
        """Share of right answers."""
        return statistics.mean(one for found in self.right.values() for one in found)


def rule(name: str, count: int, seed: int) -> TokenPolicy:
    """A rule that leaves so many tokens in the end."""
    cls = (RULES | BASELINES)[name]
    options = {**cls.strength(count / TOKENS), **OPTIONS.get(name, {})}
    return cls(**options, **({"seed": seed} if name == "random_tokens" else {}))


@dataclass(frozen=True)
class Asked:
    """Held-out chats as forwards, with the logits of all tokens at the answers."""

    network: Network
    kinds: list[str]
    calls: list[Call]
    whole: list[Tensor]

    @classmethod
    def of(cls, network: Network, drawn: Sequence[scattered.Chat]) -> Asked:
        """Read chats in batches, and what the model says with all tokens."""
        read = [scattered_vlm.read(chat) for chat in drawn]
        batches = [read[start : start + BATCH] for start in range(0, len(read), BATCH)]
        calls = [call for batch in batches for call in chats.calls(batch, network.processor, BATCH, padded=True)]
        return cls(network, [chat.kind for chat in drawn], calls, [answered(network, call)[0] for call in calls])

    def under(self, policy: TokenPolicy | None, network: Network | None = None) -> Outcome:
        """Return what comes out under a rule, in another network where one is given."""
        network, vocabulary = network or self.network, Vocabulary.of(self.network)
        right, left, kl = list[bool](), list[int](), 0.0
        acting = nullcontext() if policy is None else policy.acting(network, policy.fitted(network, self.calls))
        with acting as shortening:
            for call, whole_NV in zip(self.calls, self.whole, strict=True):
                logits_NV, rows = answered(network, call)
                right += rows
                kl += kl_divergence(whole_NV, logits_NV) * len(logits_NV)
                image_BS = vocabulary.kinds(call.kwargs) == VISION
                kept = None if shortening is None else shortening.left
                image_BK = image_BS if kept is None else kept.rows(image_BS)
                left += (image_BK if kept is None or kept.real_BK is None else image_BK & kept.real_BK).sum(1).tolist()
        dropped = 0 if shortening is None else shortening.dropped
        depth = network.config.get_text_config().num_hidden_layers
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for kind, one in zip(self.kinds, right, strict=True):
            by_kind[kind].append(one)
        computed = TOKENS - dropped / (len(right) * depth)
        return Outcome(by_kind, kl / sum(map(len, self.whole)), statistics.mean(left), computed)


def answered(network: Network, call: Call) -> tuple[Tensor, list[bool]]:
    """Return the logits at the answers of a call, and for each of its rows True if every token of it is ranked first."""
    at_BS, ids_BS = predicted(call, Vocabulary.of(network)), call.kwargs["input_ids"]
    logits_NV = logits_at(network, call, at_BS)
    wrong_BS = torch.zeros_like(at_BS)
    wrong_BS[at_BS] = logits_NV.argmax(1) != ids_BS.roll(-1, 1)[at_BS]
    return logits_NV, (~wrong_BS.any(1)).tolist()


def compare(network: Network, seeds: Sequence[int], count: int) -> list[list[Any]]:
    """Rows of the first table: every rule at every number of tokens, over all seeds."""
    asked = {seed: Asked.of(network, scattered.draw(HELD_OUT, count, seed)) for seed in seeds}
    rows = [row("all tokens", TOKENS, [one.under(None) for one in asked.values()])]
    for tokens in COUNTS:
        for name in [*RULES, *BASELINES]:
            rows.append(row(name, tokens, [one.under(rule(name, tokens, seed)) for seed, one in asked.items()]))
            print(*rows[-1], flush=True)
    return rows


def row(name: str, tokens: int, outcomes: Sequence[Outcome]) -> list[Any]:
    """A rule at one number of tokens: exact match of each seed, the mean by kind, and the rest in the mean."""
    kinds = [percent(statistics.mean(statistics.mean(one.right[kind]) for one in outcomes)) for kind in KINDS]
    means = [round(statistics.mean(getattr(one, key) for one in outcomes), 3) for key in ("left", "computed", "kl")]
    each = ", ".join(f"{percent(one.exact):g}" for one in outcomes)
    return [name, tokens, *means, percent(statistics.mean(one.exact for one in outcomes)), each, *kinds]


def second_turn(network: Network, seeds: Sequence[int], count: int) -> list[list[Any]]:
    """Rows of the second table: the second question on the first one's cache, and beside it a fresh choice for both."""
    drawn = {seed: scattered.draw(HELD_OUT, count, seed, turns=2) for seed in seeds}
    asked = {seed: Asked.of(network, some) for seed, some in drawn.items()}
    rows = []
    for name in [None, *RULES, *BASELINES]:
        policies = {seed: rule(name, TURNS_AT, seed) if name else None for seed in seeds}
        fresh = [asked[seed].under(policy).exact for seed, policy in policies.items()]
        reused = [statistics.mean(reusing(network, chat, policies[seed]) for chat in some) for seed, some in drawn.items()]
        worse = [percent(one - other) for one, other in zip(fresh, reused, strict=True)]
        means = percent(statistics.mean(fresh)), percent(statistics.mean(reused)), round(statistics.mean(worse), 1)
        rows.append([name or "all tokens", "yes" if name in SEE_THE_QUESTION else "no", *means, ", ".join(f"{one:g}" for one in worse)])
        print(*rows[-1], flush=True)
    return rows


def reusing(network: Network, chat: scattered.Chat, policy: TokenPolicy | None) -> bool:
    """Return True if the second answer is right where the first question chose the tokens and the cache is gone on with."""
    first = scattered.Chat(chat.kind, chat.images, chat.turns[:1])
    ((prompt, _), (both, labels_1S)) = (asked_and_labels(network, one) for one in (first, chat))
    length = prompt["input_ids"].shape[1]
    policy_on = nullcontext() if policy is None else policy.acting(network, policy.fitted(network, [Call((), prompt)]))
    with policy_on:
        before = network.run(Call((), {**prompt, "use_cache": True, "logits_to_keep": 1}))
        ids_1M, mask_1S = both["input_ids"][:, length:], torch.ones_like(both["input_ids"])
        at_1M = torch.arange(length, mask_1S.shape[1])[None] + network.module.model.rope_deltas
        given = {"input_ids": ids_1M, "attention_mask": mask_1S, "past_key_values": before.past_key_values, "use_cache": True}
        logits_1MV = network.run(Call((), {**given, "position_ids": at_1M[None].expand(3, -1, -1)})).logits
    at_M = labels_1S[0, length + 1 :] != chats.IGNORED
    return bool((logits_1MV[0, :-1].argmax(1) == ids_1M[0, 1:])[at_M].all())


def asked_and_labels(network: Network, chat: scattered.Chat) -> tuple[dict[str, Any], Tensor]:
    """The prompt of a chat of one turn, or all of one of two; and the labels of the last answer."""
    (call,) = chats.calls([scattered_vlm.read(chat)], network.processor, 1)
    labels_1S = call.kwargs["labels"]
    given = {key: value for key, value in call.kwargs.items() if key not in ("labels", "use_cache")}
    if len(chat.turns) > 1:
        return given, labels_1S
    length = int((labels_1S[0] != chats.IGNORED).nonzero()[0])
    return {key: value[:, :length] if key in BY_POSITION else value for key, value in given.items()}, labels_1S


def with_quantization(network: Network, seeds: Sequence[int], count: int) -> list[list[Any]]:
    """Rows of the third table: all tokens and half of them, before and after weights are quantized."""
    quantized = aerogel.compress(open_model(MODEL, dtype=torch.float32), QUANTIZED, measures=()).network
    asked = {seed: Asked.of(network, scattered.draw(HELD_OUT, count, seed)) for seed in seeds}

    def found(model: Network, tokens: int) -> tuple[float, float]:
        """Exact match in percent and KL of one corner of the table."""
        kept = [one.under(rule("visionzip", tokens, seed) if tokens < TOKENS else None, model) for seed, one in asked.items()]
        return percent(statistics.mean(one.exact for one in kept)), statistics.mean(one.kl for one in kept)

    rows, (dense, _), (four, four_kl) = [], found(network, TOKENS), found(quantized, TOKENS)
    for tokens in COUNTS:
        (fewer, fewer_kl), (both, both_kl) = found(network, tokens), found(quantized, tokens)
        parts = (dense - fewer) + (dense - four)
        share = round((dense - both) / parts, 2) if parts > 0 else None
        kl = [round(one, 4) for one in (fewer_kl, four_kl, both_kl)]
        rows.append([tokens, dense, fewer, four, both, share, *kl, round(both_kl / (fewer_kl + four_kl), 2)])
        print(*rows[-1], flush=True)
    return rows


def percent(share: float) -> float:
    """A share in percent."""
    return round(100 * share, 1)


def main() -> None:
    """Measure and write, each table when it is there."""
    quick, wanted = "--quick" in sys.argv, [name for name in TABLES if name in sys.argv] or list(TABLES)
    torch.set_num_threads(1)
    seeds, count = (SEEDS[:1], 32) if quick else (SEEDS, CHATS)
    network = open_model(MODEL, dtype=torch.float32, lazy=False)
    for name in wanted:
        table = TABLES[name]
        with torch.no_grad():
            rows = table.measure(network, seeds, count // table.fewer)
        if not quick:
            chats_each = f"{count // table.fewer} for each of seeds {seeds[0]} to {seeds[-1]}"
            settings = {"model": "zoo/scattered-vlm", "image tokens": TOKENS, "chats": chats_each, "threads": 1}
            write(f"token_{name}", table.title, settings, table.columns, rows, table.notes)


class Table(NamedTuple):
    """A table of results/token_NAME.json."""

    measure: Callable[[Network, Sequence[int], int], list[list[Any]]]
    fewer: int
    """The share of chats that it reads is one of so many."""
    title: str
    columns: list[str]
    notes: list[str]


HELD_OUT = collages.Items.held_out()
KINDS = ("place", "kind", "count", "detail")
SEE_THE_QUESTION = ("fastv", "pyramid_drop", "sparsevlm", "dart")
BY_POSITION = ("input_ids", "attention_mask", "mm_token_type_ids")
_OPTIONS = "; ".join(f"{name} {', '.join(f'{key} {value}' for key, value in options.items())}" for name, options in OPTIONS.items())
TABLES = {
    "rules": Table(
        compare, 1, "Answers with fewer image tokens",
        [
            "rule", "tokens asked for", "left", "computed, mean over blocks", "KL, nats", "exact match, %", "by seed",
            *(f"{kind}, %" for kind in KINDS),
        ],
        [
            "Rules that act inside the decoder leave as many tokens in the end and compute more on average over its six blocks.",
            "sparsevlm's merged token comes on top of those asked for.",
            f"Options other than the published ones, which are for deeper decoders: {_OPTIONS}.",
            "oracle ranks tokens by how much their pixels differ from the ground; it knows how the images were made.",
            "tome and mustdrop need a vision tower whose patches are tokens one by one, which this family's is not.",
        ],
    ),
    "grid": Table(
        with_quantization, 1, "Fewer image tokens (visionzip) and weights in 4 bits (rtn, W4A16_G32)",
        [
            "tokens", "neither, exact match, %", "fewer tokens, %", "4 bits, %", "both, %", "loss of both over sum of losses",
            "fewer tokens, KL", "4 bits, KL", "both, KL", "KL of both over sum",
        ],
        ["KL in nats an answer token, from the model with all tokens and unquantized weights."],
    ),
    "turns": Table(
        second_turn, 4, f"A second question about an image of which {TURNS_AT} tokens are left",
        ["rule", "sees the question", "fresh choice, exact match, %", "first choice, exact match, %", "worse by, points", "by seed"],
        ["A fresh choice reads both questions. With the first choice, the second question goes on behind the cache of the first."],
    ),
}  # fmt: skip


if __name__ == "__main__":
    main()
