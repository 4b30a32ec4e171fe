"""What parts of a denoiser give again from one step to the next: units, stretches of blocks, tokens, branches of guidance."""
