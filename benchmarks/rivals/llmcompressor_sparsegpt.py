"""SparseGPT by llm-compressor, in its own environment.

    .envs/llmcompressor/bin/python benchmarks/rivals/llmcompressor_sparsegpt.py MODEL TOKENS OUTPUT [--sparsity 0.5 --batch 8]

Everything but the share of zeros as the library has it (blocks of 128, damping 0.01).
"""

from __future__ import annotations

from driver import arguments
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor_gptq import compress

if __name__ == "__main__":
    asked = arguments(__doc__)
    compress(asked, SparseGPTModifier(sparsity=asked.sparsity, targets=["Linear"], ignore=["lm_head"]))
