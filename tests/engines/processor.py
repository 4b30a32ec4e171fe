"""Instruction sets of the processor at hand, for tests whose engine has kernels for some only."""

from __future__ import annotations

import pytest
import torch

from aerogel.io.engines import Instructions


def present() -> Instructions:
    """Return the best instruction set of this processor."""
    if torch.cpu._is_amx_tile_supported():
        return Instructions.AMX
    if torch.cpu._is_vnni_supported():
        return Instructions.VNNI
    return Instructions.AVX512 if torch.cpu._is_avx512_supported() else Instructions.ANY


def require(needed: Instructions) -> None:
    """Skip the test where this processor lacks the instructions."""
    if present() < needed:
        pytest.skip(f"vLLM's kernels for this need {needed}, which this processor does not have")
