"""Forwards of a vision tower, as rules of the decoder read them: grids, attention to each image token, and what a pooling head attends to.

I images or frames, L patches of each, V image tokens, P places, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from aerogel.errors import AerogelError
from aerogel.layers.signature import arguments_of
from aerogel.model.network import Network
from aerogel.runtime.tokens.decoder import Decoder
from aerogel.runtime.tokens.scores import QueryKey, attention_in_image, watching


@dataclass(frozen=True)
class VisionTower:
    """Blocks that read images, and how their patches become tokens."""

    module: str
    """Full name of the module around the blocks."""
    merge: int
    """Patches along the side of the square that becomes a token, where the tower is given a grid."""
    window: int
    """Tokens along the side of a window, by which tokens are ordered; 0: they are in the order of the image."""
    attention: str = ""
    """Full name of the attention that is read; empty where grids alone are."""
    class_token: bool = False
    """True where the first position of that attention stands for the whole image."""

    @classmethod
    def of(cls, network: Network, decoder: Decoder, attention: str = "", class_token: bool = False) -> VisionTower:
        """Find it; raises AerogelError where there is none, or several."""
        found = [tower for tower in network.towers if not set(tower.blocks) & set(decoder.blocks)]
        if len(found) != 1:
            raise AerogelError(
                f"this rule asks a vision tower, and this {network.family.name} model has {len(found)}; choose a rule that needs none"
            )
        vision = getattr(network.config, "vision_config", None)
        merge = getattr(vision, "spatial_merge_size", 1)
        ordered = hasattr(vision, "window_size") and hasattr(vision, "fullatt_block_indexes")
        window = vision.window_size // merge // vision.patch_size if vision is not None and ordered else 0
        return cls(found[0].name.rpartition(".")[0], merge, window, attention, class_token)

    def tokens(self, grid_N3: Tensor) -> list[int]:
        """Return the number of tokens of each image or video of a grid."""
        return [patches // self.merge**2 for patches in grid_N3.prod(1).tolist()]

    @contextmanager
    def watching(self, network: Network, see: Callable[[TowerPass], None]) -> Iterator[None]:
        """Call `see` with what every forward of the tower is about to find; `generate` of transformers runs it before the model."""
        around = network.module.get_submodule(self.module)
        names = arguments_of(around)
        passes: list[TowerPass] = []

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            passes[:] = [TowerPass(self, (dict(zip(names, args, strict=False)) | kwargs).get("grid_thw"))]
            see(passes[0])

        def attended(_: int, seen: QueryKey) -> None:
            passes[0].received.append(attention_in_image(seen, self.class_token))

        def pooled(head: Any, args: tuple[Any, ...], output: Tensor) -> None:
            probe_I1C = head.probe.expand(len(args[0]), -1, -1)
            weight_I1L = head.attention(probe_I1C, args[0], args[0], need_weights=True)[1]
            passes[0].head_IL, passes[0].vector_IC = weight_I1L[:, 0], output

        with ExitStack() as stack:
            stack.callback(around.register_forward_pre_hook(begin, with_kwargs=True).remove)
            if self.attention:
                stack.enter_context(watching(network, {0: self.attention}, attended))
            for part in network.module.modules() if self.attention else ():
                if isinstance(getattr(part, "probe", None), nn.Parameter) and isinstance(
                    getattr(part, "attention", None), nn.MultiheadAttention
                ):
                    stack.callback(part.register_forward_hook(pooled).remove)
            yield


@dataclass
class TowerPass:
    """Findings of one forward of the tower."""

    tower: VisionTower
    grid_N3: Tensor | None
    """Grid of the images or videos, where the tower is given one."""
    received: list[Tensor] = field(default_factory=list)
    """Attention to patches (I, L), part by part: from the class token, or from all patches of an image where there is none."""
    head_IL: Tensor | None = None
    """Attention of the pooling head, where there is one; a mean over heads."""
    vector_IC: Tensor | None = None
    """Output of the pooling head."""

    @property
    def images(self) -> int:
        """Number of images or frames, as far as attention was read."""
        return sum(map(len, self.received))

    def head_of_tokens(self, tokens: int) -> Tensor | None:
        """Return the attention of the pooling head to each of so many image tokens (V), None where there is no such head."""
        return None if self.head_IL is None else _resized(self.head_IL.float(), tokens)

    def received_by_tokens(self, tokens: int) -> Tensor:
        """Return the attention to each of so many image tokens (V).

        Several patches that become one token count by their mean. Raises AerogelError where patches and tokens do not fit.
        """
        if self.grid_N3 is None:
            return _resized(torch.cat(self.received), tokens)
        received_L, merge = torch.cat([part.flatten() for part in self.received]), self.tower.merge
        if len(received_L) != tokens * merge**2:
            raise AerogelError(
                f"the vision tower read {len(received_L):,} patches for {tokens:,} image tokens of {merge} x {merge} patches"
            )
        token_V = received_L.view(tokens, -1).mean(1)
        if not self.tower.window:
            return token_V
        order_V = window_order(self.grid_N3, merge, self.tower.window).to(token_V.device)
        return torch.empty_like(token_V).index_copy_(0, order_V, token_V)


def window_order(grid_N3: Tensor, merge: int, window: int) -> Tensor:
    """Return the numbers of tokens in the order in which towers with windows hold them (Qwen2.5-VL).

    `merge` x `merge` patches become a token, `window` x `window` tokens a window; windows at the edges are smaller.
    """
    orders, start = [], 0
    for frames, height, width in grid_N3.tolist():
        rows, columns = height // merge, width // merge
        frame, row, column = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        key = (frame * rows + row // window) * columns + column // window
        key = (key * window + row % window) * window + column % window
        orders.append(start + key.flatten().argsort())
        start += key.numel()
    return torch.cat(orders)


def _resized(score_IL: Tensor, tokens: int) -> Tensor:
    """Scores of patches, row by row of square images, as scores of so many tokens (V): means where sides divide, else bilinear."""
    images, patches = score_IL.shape
    places, over = divmod(tokens, images)
    side, smaller = isqrt(patches), isqrt(places)
    if places == patches and not over:
        return score_IL.flatten()
    if over or side**2 != patches or smaller**2 != places:
        raise AerogelError(f"{images} images of {patches} patches became {tokens:,} image tokens, which are no smaller squares")
    square = score_IL.view(images, 1, side, side)
    if side % smaller == 0:
        return nn.functional.avg_pool2d(square, side // smaller).flatten()
    return interpolate(square, size=(smaller, smaller), mode="bilinear").flatten()
