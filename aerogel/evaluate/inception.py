"""Inception v3 as published Fréchet distances use it: the network of TensorFlow's 2015-12-05 file, with its peculiarities.

Tensor names are those of pytorch-fid and torch-fidelity, whose files it reads. What differs from torchvision's: averages leave the
padding out, the last block pools by maximum, there are 1008 classes, and images are resized without half a pixel's shift.

N images, C channels, H and W pixels, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

SIDE = 299

_average = partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(max_pool2d, kernel_size=3, stride=2)


class _Conv(nn.Module):
    """A convolution, its norm and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (sides[0] // 2, sides[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return relu(self.bn(self.conv(maps_NCHW)))


class _Block(nn.Module):
    """Branches side by side; subclasses say which."""

    def chain(self, name: str, maps_NCHW: Tensor, steps: Sequence[str]) -> Tensor:
        """Run the convolutions `name` + step one after another."""
        for step in steps:
            maps_NCHW = getattr(self, name + step)(maps_NCHW)
        return maps_NCHW


class _A(_Block):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = _Conv(inputs, 48), _Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = _Conv(inputs, 64), _Conv(64, 96, 3), _Conv(96, 96, 3)
        self.branch_pool = _Conv(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        fives, threes = self.chain("branch5x5_", x, "12"), self.chain("branch3x3dbl_", x, "123")
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_average(x))], 1)


class _B(_Block):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, 2, pad=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = _Conv(inputs, 64), _Conv(64, 96, 3), _Conv(96, 96, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), self.chain("branch3x3dbl_", x, "123"), _halve(x)], 1)


class _C(_Block):
    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 192)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = _Conv(inputs, inner), _Conv(inner, inner, (1, 7)), _Conv(inner, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(inputs, inner), _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(inner, inner, (1, 7)), _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_5 = _Conv(inner, 192, (1, 7))
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        sevens, double = self.chain("branch7x7_", x, "123"), self.chain("branch7x7dbl_", x, "12345")
        return torch.cat([self.branch1x1(x), sevens, double, self.branch_pool(_average(x))], 1)


class _D(_Block):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(inputs, 192), _Conv(192, 320, 3, 2, pad=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(inputs, 192), _Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, (7, 1)), _Conv(192, 192, 3, 2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.chain("branch3x3_", x, "12"), self.chain("branch7x7x3_", x, "1234"), _halve(x)], 1)


class _E(_Block):
    def __init__(self, inputs: int, pool: partial[Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = _Conv(inputs, 384), _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 448), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        threes, double = self.branch3x3_1(x), self.chain("branch3x3dbl_", x, "12")
        forked = [self.branch3x3_2a(threes), self.branch3x3_2b(threes), self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *forked, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Inception v3 (arXiv:1512.00567) with 1008 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _B(288), _C(768, 128), _C(768, 160), _C(768, 160), _C(768, 192),
        )  # fmt: skip
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _D(768), _E(1280, _average), _E(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images_NCHW: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return maps of six depths, features_ND and logits_NK without bias, as published scores take them, of images in [-1, 1]."""
        small = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images_NCHW))))
        smaller = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(small)))
        fifth = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(smaller)))
        # Its first channels are those that the published spatial distance takes (mixed_6/conv of the TensorFlow file).
        sixth = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(fifth))))
        late = self.Mixed_6e(sixth)
        last = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(late)))
        features_ND = last.mean((2, 3))
        return [small, smaller, fifth, sixth, late, last], features_ND, features_ND @ self.fc.weight.T


def resized(images_NCHW: Tensor) -> Tensor:
    """Return images in [0, 1], rounded to 256 shades, at 299 x 299 in [-1, 1] by TensorFlow 1's bilinear rule."""
    shades = (images_NCHW * 255).round()
    for axis in (2, 3):
        size = shades.shape[axis]
        at = torch.arange(SIDE, device=shades.device) * torch.tensor(size / SIDE, dtype=torch.float32)
        low = at.long()
        weight = (at - low).reshape((-1, 1) if axis == 2 else (-1,))
        below, above = shades.index_select(axis, low), shades.index_select(axis, (low + 1).clamp(max=size - 1))
        shades = below + weight * (above - below)
    return (shades - 128) / 128
