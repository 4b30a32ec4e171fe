"""Training: fitting a block or a model to its teacher, losses, distributed training."""
