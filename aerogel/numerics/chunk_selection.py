"""Keys of a prompt in small factors, and the choice of its chunks by their means: ShadowKV (arXiv:2410.21465).

B rows, H heads of keys, N tokens, C chunks, D channels, E channels of all heads, R rank, G queries that share a head of keys, T tokens
that ask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the channels (..., D) of tokens by rotary angles, the first half of the channels against the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def rotated_back(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Undo `rotated`; cosines and sines may have been scaled."""
    return rotated(x, cosine, -sine) / (cosine.square() + sine.square())


def factors(x_BNE: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return left (B, N, R) and right (B, R, E) factors of the nearest matrix of this rank."""
    left, size_BR, right = torch.linalg.svd(x_BNE.float(), full_matrices=False)
    return left[..., :rank].to(x_BNE.dtype), (size_BR[:, :rank, None] * right[:, :rank]).to(x_BNE.dtype)


def chunk_means(x_BHND: Tensor, real_BN: Tensor, chunk: int) -> Tensor:
    """Return the mean of each chunk of tokens (B, H, C, D), over those that are real."""
    real_BHCT1 = real_BN.unflatten(1, (-1, chunk))[:, None, :, :, None]
    sum_BHCD = (x_BHND.unflatten(2, (-1, chunk)) * real_BHCT1).sum(3)
    return sum_BHCD / real_BHCT1.sum(3).clamp(min=1)


def least_alike(key_BHND: Tensor, mean_BHCD: Tensor, real_BN: Tensor) -> Tensor:
    """Return how unlike its mean the most unlike real key of a chunk is (B, H, C): 1 minus the cosine."""
    chunks = mean_BHCD.shape[2]
    alike_BHCT = cosine_similarity(key_BHND.unflatten(2, (chunks, -1)).float(), mean_BHCD.float()[:, :, :, None], dim=-1)
    return 1 - alike_BHCT.masked_fill(~real_BN.unflatten(1, (chunks, -1))[:, None], 1).amin(-1)


def chunk_scores(query_BHGTD: Tensor, mean_BHCD: Tensor, real_BHC: Tensor, scale: float) -> Tensor:
    """Return the attention to the means of chunks (B, H, C): a sum over the tokens that ask, the largest of a group of heads.

    Chunks that are not real get less than nothing.
    """
    score_BHGTC = (query_BHGTD @ mean_BHCD[:, :, None].transpose(-2, -1)).float() * scale
    score_BHGTC = score_BHGTC.masked_fill(~real_BHC[:, :, None, None], -torch.inf)
    return score_BHGTC.softmax(-1).nan_to_num().sum(3).amax(2).masked_fill(~real_BHC, -1)


def tokens_of(chunk_BHC: Tensor, chunk: int) -> Tensor:
    """Return the numbers of the tokens of some chunks, by their numbers (B, H, N)."""
    return (chunk_BHC[..., None] * chunk + torch.arange(chunk, device=chunk_BHC.device)).flatten(2)


def taken(x_BHND: Tensor, number_BHC: Tensor) -> Tensor:
    """Return the entries (B, H, C, D) of these numbers."""
    return x_BHND.gather(2, number_BHC[..., None].expand(-1, -1, -1, x_BHND.shape[3]))
