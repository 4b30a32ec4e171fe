"""Methods that give again what parts of a denoiser gave at an earlier step."""
