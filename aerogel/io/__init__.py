"""Loading and saving: checkpoints, shards, quantization configs, pipelines, processors."""
