"""SparseGPT by Aerogel, driven like the rivals.

    .venv/bin/python benchmarks/rivals/aerogel_sparsegpt.py MODEL TOKENS OUTPUT [--sparsity 0.5 --batch 8 --dtype float32]

`seconds` is the whole of aerogel.compress without measures, as for GPTQ.
"""

from __future__ import annotations

from aerogel_gptq import compress
from driver import arguments

if __name__ == "__main__":
    asked = arguments(__doc__)
    compress(asked, {"sparsegpt": {"sparsity": asked.sparsity}})
