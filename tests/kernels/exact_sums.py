"""A mark for tests of integer kernels, which are not used where a processor has no dot products of 8 bits that are exact."""

from __future__ import annotations

import pytest

from aerogel.kernels.affine import exact

needs_exact_sums = pytest.mark.skipif(not exact(), reason="this processor sums products of 8-bit integers in 16 bits (no VNNI)")
