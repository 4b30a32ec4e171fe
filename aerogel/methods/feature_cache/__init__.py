"""Methods that return what parts of a denoiser gave at an earlier step."""
