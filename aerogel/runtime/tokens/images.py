"""Choice of image tokens before the decoder, by what the vision tower attends to: rows that are not chosen are marked at the projector.

Whatever a model does with features between projector and decoder, such as cropping, reordering or separators, moves these rows as it moves
the others; before the first decoder block they are dropped. A mark is NaN in the first channel and zeros in the others: where a model makes
one row of several, a row that is half marked shows, and is refused.

I images (or crops, or frames), P tokens of one, S positions of its tower (patches, and a class token where there is one), H heads, D
channels of a head, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.attention import attentions
from aerogel.runtime.token_types import Vocabulary
from aerogel.runtime.tokens.decoder import Decoder, decoder_of
from aerogel.runtime.tokens.scores import QueryKey, attention_in_image, watching
from aerogel.runtime.tokens.stage import Selection, Stage


@dataclass(frozen=True)
class ImagePath:
    """Path of the features of images to the decoder."""

    attention: str
    """Full name of the attention of the vision tower that is read: the last before the features that sees a whole image."""
    projector: str
    """Full name of the module that gives rows of the decoder's width."""
    class_token: bool
    """True where the first position of the tower stands for the whole image."""
    tokenwise: bool
    """True where the projector gives a row for each row that it reads."""
    attentions: tuple[str, ...] = ()
    """Full names of the attentions of the tower up to that one."""

    def saved(self) -> dict[str, Any]:
        """Return what a policy saves of it."""
        return {name: value for name, value in vars(self).items() if name != "attentions"}


@dataclass(frozen=True)
class Image:
    """One image, crop or frame, as a rule sees it."""

    score_P: Tensor
    """Attention to each token from the class token; where there is none, from all patches. A mean over heads and the token's patches."""
    key_PD: Tensor
    """Keys of the tower, a mean over heads and over the patches of a token."""
    row_PC: Tensor
    """Rows that the projector reads, where it is tokenwise, or gives."""


class Chosen(NamedTuple):
    """Decision of a rule on one image."""

    keep_P: Tensor
    """True where a token stays."""
    row_PC: Tensor | None = None
    """Rows in place of the image's, where tokens are merged."""


Choose = Callable[[Image], Chosen | None]
"""Chooses among the tokens of one image; None keeps all."""


def marked(row_RC: Tensor, keep_R: Tensor) -> Tensor:
    """Return rows of which those that are not kept are marked."""
    mark_C = torch.zeros_like(row_RC[..., :1, :])
    mark_C[..., 0] = torch.nan
    return torch.where(keep_R[..., None], row_RC, mark_C)


@contextmanager
def whole_marks(network: Network) -> Iterator[None]:
    """Raise AerogelError for a while where the language model gets a row that is made of kept ones and others."""

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embedded_BNC = kwargs.get("inputs_embeds")
        if not isinstance(embedded_BNC, Tensor) or embedded_BNC.shape[1] == 1:
            return
        rest_BNC = embedded_BNC[..., 1:]
        if bool((embedded_BNC[..., :1].isnan() & (rest_BNC != 0) & rest_BNC.isfinite()).any()):
            raise AerogelError(_mixes(network))

    handle = network.module.get_submodule(decoder_of(network).module).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def mixed_videos(network: Network, calls: Sequence[Call]) -> Iterator[str]:
    """Yield why rules cannot choose among features of videos in these calls: there are fewer tokens than patches, and no grid says why."""
    vocabulary = Vocabulary.of(network)
    try:
        patches = patch_grid(network) ** 2
    except AerogelError:  # tokens are no patches anyway; what is mixed besides shows in a forward
        return
    for call in calls:
        frames = call.kwargs.get("pixel_values_videos")
        if not isinstance(frames, Tensor) or frames.ndim != 5:
            continue
        if 0 < int(vocabulary.of_video(call.kwargs["input_ids"]).sum()) < frames.shape[0] * frames.shape[1] * patches:
            yield _mixes(network)
            return


def _mixes(network: Network) -> str:
    return (
        f"this {network.family.name} model makes one token of several features behind its projector, as of videos or large images, "
        "so features cannot be chosen before; choose a rule of the decoder"
    )


def dropping_marked(stage: Stage) -> Selection | None:
    """Drop the tokens of images whose rows are marked: a rule for the first block."""
    marked_BK = stage.hidden_BKC[..., 0].isnan() & stage.vision_BK
    return Selection(~marked_BK) if bool(marked_BK.any()) else None


@contextmanager
def choosing(network: Network, path: ImagePath, choose: Choose) -> Iterator[None]:
    """Let a rule choose among the tokens of every image on its way through the projector."""
    chooser = _Chooser(path, choose)
    projector = network.module.get_submodule(path.projector)
    with ExitStack() as stack:
        stack.callback(network.module.register_forward_pre_hook(lambda *_: chooser.forget()).remove)
        stack.callback(network.module.register_forward_hook(lambda *_: chooser.forget(), always_call=True).remove)
        stack.callback(projector.register_forward_pre_hook(chooser.before).remove)
        stack.callback(projector.register_forward_hook(chooser.after).remove)
        stack.enter_context(watching(network, {0: path.attention}, chooser.see))
        stack.enter_context(whole_marks(network))
        yield


class _Chooser:
    """Goes along with the images of a forward."""

    def __init__(self, path: ImagePath, choose: Choose) -> None:
        self._path, self._choose = path, choose
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._keep: list[Tensor] = []

    def forget(self) -> None:
        self._seen.clear()
        self._keep.clear()

    def see(self, _: int, attention: QueryKey) -> None:
        """Keep scores (S) and keys (S, D) of each image that an attention of the tower computes."""
        key_ISD = attention.key_BHSD.mean(1)[:, int(self._path.class_token) :]
        self._seen += zip(attention_in_image(attention, self._path.class_token), key_ISD, strict=True)

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a projector that works token by token: choose, and merge what it reads."""
        if not self._path.tokenwise:
            return None
        rows = self._chosen(args[0])
        return None if rows is args[0] else (rows, *args[1:])

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the projector: mark what is not chosen."""
        rows = output if self._path.tokenwise else self._chosen(output)
        if not self._keep:
            return None
        keep_R = torch.cat(self._keep).reshape(rows.shape[:-1])
        self._keep.clear()
        return marked(rows, keep_R)

    def _chosen(self, rows: Tensor) -> Tensor:
        """Ask the rule image by image; returns the rows, merged where it merges."""
        row_RC = rows.reshape(-1, rows.shape[-1])
        positions = sum(len(score_S) for score_S, _ in self._seen)
        if not positions or positions % len(row_RC):
            raise AerogelError(f"a projector reads {len(row_RC)} rows of images, but the vision tower attended to {positions} patches")
        grouped = positions // len(row_RC)
        changed: list[Tensor] = []
        start = 0
        for score_S, key_SD in self._seen:
            score_P, key_PD = (_grouped(x_SD, grouped, self._path.tokenwise) for x_SD in (score_S[:, None], key_SD))
            image = Image(score_P[:, 0], key_PD, row_RC[start : start + len(key_PD)])
            start += len(key_PD)
            chosen = self._choose(image) or Chosen(torch.ones_like(image.score_P, dtype=torch.bool))
            self._keep.append(chosen.keep_P)
            changed.append(image.row_PC if chosen.row_PC is None else chosen.row_PC)
        self._seen.clear()
        return torch.cat(changed).reshape(rows.shape)


def _grouped(x_SD: Tensor, patches: int, in_a_grid: bool) -> Tensor:
    """The mean over the patches of each token: squares of a square grid, or patches behind each other."""
    if patches == 1:
        return x_SD
    if not in_a_grid:
        return x_SD.unflatten(0, (-1, patches)).mean(1)
    side, step = round(len(x_SD) ** 0.5), round(patches**0.5)
    grid = x_SD.unflatten(0, (side // step, step, side // step, step))
    return grid.mean((1, 3)).flatten(0, 1)


@torch.no_grad()
def image_path_of(network: Network, call: Call) -> ImagePath:
    """Find the path by watching a forward with images; raises AerogelError where there is none that can be read."""
    decoder = decoder_of(network)
    tower_blocks = [block for tower in network.towers if not set(tower.blocks) & set(decoder.blocks) for block in tower.blocks]
    watch = _Watch(network, tower_blocks, decoder)
    watch.run(call)
    names = [name for name in watch.projectors if not any(name.startswith(f"{other}.") for other in watch.projectors)]
    if not names or not watch.keys:
        raise AerogelError(
            f"the features of images could not be followed through this {network.family.name} model: expected a vision tower that calls "
            "scaled_dot_product_attention, and a module behind it that gives rows of the decoder's width; choose a rule of the decoder"
        )
    projector = names[-1]
    read, given = watch.projectors[projector]
    most = max(watch.keys.values())
    ran = list(watch.outputs)
    last = ran.index(watch.source(read) or ran[-1])
    before = [name for name, keys in watch.keys.items() if keys == most and ran.index(watch.block_of(name)) <= last]
    rows = given.numel() // given.shape[-1]
    class_token = bool(watch.positions[before[-1]] % watch.rows[projector])
    return ImagePath(before[-1], projector, class_token, read.numel() // read.shape[-1] == rows, tuple(before))


def patch_grid(network: Network) -> int:
    """Return the patches along a side of an image whose tokens are its patches, as the configuration says.

    Raises AerogelError where a token is another thing.
    """
    config = network.config
    vision = getattr(config, "vision_config", None)
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    merges = any(getattr(one, name, 1) not in (1, None) for one in (config, vision) for name in ("spatial_merge_size", "downsample_ratio"))
    if merges or not isinstance(size, int) or not isinstance(patch, int):
        raise AerogelError(
            f"a token of an image is no single patch of a square grid in this {network.family.name} model, and what follows its vision "
            "tower needs the whole grid; choose a rule that acts behind it"
        )
    return size // patch


class _Watch:
    """Sees what runs between the vision tower and the decoder."""

    def __init__(self, network: Network, blocks: Sequence[str], decoder: Decoder) -> None:
        self._network, self._blocks, self._decoder = network, blocks, decoder
        self._over = False
        self.outputs: dict[str, Tensor] = {}
        """What the blocks of the tower gave, in the order in which they ran."""
        self.projectors: dict[str, tuple[Tensor, Tensor]] = {}
        """What modules behind the tower read and give that give rows of the decoder's width, by full name, the latest last."""
        self.rows: dict[str, int] = {}
        """Rows that each of these modules gave in all runs of the tower: images and videos are read apart."""
        self.keys: dict[str, int] = {}
        """Positions that each attention of the tower attends to at once."""
        self.positions: dict[str, int] = {}
        """Positions of all images together."""

    def run(self, call: Call) -> None:
        """Watch a forward."""
        names = self._attentions(call)
        with ExitStack() as stack:
            decoder = self._network.module.get_submodule(self._decoder.blocks[0])
            stack.callback(decoder.register_forward_pre_hook(self._reached).remove)
            for name, part in self._network.module.named_modules():
                if name in self._blocks:
                    stack.callback(part.register_forward_hook(self._of_block(name)).remove)
                elif self._may_project(name):
                    stack.callback(part.register_forward_hook(self._of_module(name)).remove)
            stack.enter_context(watching(self._network, dict(enumerate(names)), self._of_attention(names)))
            self._network.run(call)

    def _may_project(self, name: str) -> bool:
        """True for a module that is neither in a block of the tower nor around one, and not of the language model."""
        inside = (*(f"{block}." for block in self._blocks), f"{self._decoder.module}.")
        around = any(block.startswith(f"{name}.") for block in self._blocks)
        return bool(name) and not around and not f"{name}.".startswith(inside)

    def block_of(self, name: str) -> str:
        """Return the block of the tower that a module is in."""
        return next(block for block in self._blocks if name.startswith(f"{block}."))

    def source(self, read: Tensor) -> str | None:
        """Return the block of the tower whose output a projector reads as it is, but for a class token."""
        for name, given in reversed(self.outputs.items()):
            for start in (0, 1):
                rows = given[..., start:, :]
                if rows.shape == read.shape and torch.equal(rows, read):
                    return name
        return None

    def _attentions(self, call: Call) -> list[str]:
        return [name for name in attentions(self._network, call) if name.startswith(tuple(f"{block}." for block in self._blocks))]

    def _of_attention(self, names: Sequence[str]) -> Callable[[int, QueryKey], None]:
        def see(number: int, seen: QueryKey) -> None:
            rows, _, keys, _ = seen.key_BHSD.shape
            self.keys[names[number]] = max(keys, self.keys.get(names[number], 0))
            self.positions[names[number]] = self.positions.get(names[number], 0) + rows * keys

        return see

    def _of_block(self, name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs[name] = output[0] if isinstance(output, tuple) else output
            self.projectors.clear()  # what ran between blocks is no projector of what the last one gives

        return seen

    def _of_module(self, name: str) -> Callable[..., None]:
        width = self._network.config.get_text_config().hidden_size

        def seen(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= 2 and output.shape[-1] == width
            if given and self.outputs and not self._over and args and isinstance(args[0], Tensor):
                self.projectors[name] = args[0], output
                self.rows[name] = self.rows.get(name, 0) + output.numel() // width

        return seen

    def _reached(self, *_: Any) -> None:
        self._over = True
