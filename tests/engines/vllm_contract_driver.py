"""Asks vLLM which quantization_configs its CPU build has a reader and a kernel for. Runs in vLLM's own environment.

python vllm_contract_driver.py ASKED.json ANSWERED.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace


def require_one_scale(scheme: object, layer: object) -> None:
    """Raise RuntimeError where two layers with a scale per tensor each, which differ, do not become one."""
    import torch

    layer.weight.data.copy_(torch.zeros(layer.weight.shape))
    layer.weight_scale.data.copy_(torch.tensor([1.0, 2.0]))
    layer.input_scale.data.fill_(1.0)
    scheme.process_weights_after_loading(layer)


def require_operator(scheme: object) -> None:
    """Raise RuntimeError where a kernel is chosen whose operator is not compiled for this processor."""
    import torch

    if type(getattr(scheme, "kernel", None)).__name__ == "CPUWNA16LinearKernel" and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise RuntimeError("cpu_gemm_wna16 is not compiled for this processor")


def main() -> None:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    asked, answered = sys.argv[1:]
    found, settings = {}, VllmConfig()
    with set_current_vllm_config(settings):
        init_distributed_environment(1, 0, f"file://{Path(answered).absolute()}.group", 0, "gloo")
        initialize_model_parallel()
        settings.model_config = SimpleNamespace(dtype=torch.bfloat16)  # all that kernels ask of a model
        for name, (config, inputs, outputs) in json.loads(Path(asked).read_text()).items():
            try:
                read = CompressedTensorsConfig.from_config(config)
                parts = next(iter(read.target_scheme_map.values()))
                scheme = read._get_scheme_from_parts(parts["weights"], parts["input_activations"], format=parts["format"])
                parts_of_set = [outputs - outputs // 3, outputs // 3]  # as if two layers were loaded as one
                made = {"output_partition_sizes": parts_of_set, "input_size_per_partition": inputs, "params_dtype": torch.bfloat16}
                layer = torch.nn.Module()
                scheme.create_weights(layer, input_size=inputs, output_size=outputs, weight_loader=lambda *_: None, **made)
                require_operator(scheme)
                if layer._parameters.get("weight_scale") is not None and tuple(layer.weight_scale.shape) == (2,):
                    require_one_scale(scheme, layer)
                found[name] = None
            except (ValueError, NotImplementedError, RuntimeError) as error:
                found[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    Path(answered).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
