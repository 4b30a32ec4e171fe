"""Feature caching: outputs of earlier denoising steps returned for modules, block ranges, tokens and branches of guidance."""
