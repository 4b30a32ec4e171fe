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


def product(value: int) -> float:
    """Return what oneDNN makes of 64 products of 127 and a value."""
    import torch
    from vllm import _custom_ops as ops

    weight_IO, scale_O = torch.full((32, 64), value, dtype=torch.int8).t(), torch.ones(32, 1)
    kernel = ops.create_onednn_scaled_mm(weight_IO, scale_O, torch.float32, True, False, 32)
    x_BI, x_scale, _ = ops.onednn_scaled_int8_quant(torch.full((4, 64), 127.0), None, None, True)
    y_BO = torch.empty(4, 32)
    ops.onednn_scaled_mm(kernel, x_BI, y_BO, x_scale, None, None, None)
    return float(y_BO[0, 0])


def require_exact_products(scheme: object) -> None:
    """Raise RuntimeError where products of 8-bit integers are of oneDNN and overflow, as they do without VNNI."""
    if type(getattr(scheme, "kernel", None)).__name__ != "CPUInt8ScaledMMLinearKernel":
        return
    assert product(20) == 64 * 127 * 20
    if (found := product(127)) != 64 * 127 * 127:
        raise RuntimeError(f"64 products of 127 and 127 are {found:.0f} on this processor")


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
                require_exact_products(scheme)
                if layer._parameters.get("weight_scale") is not None and tuple(layer.weight_scale.shape) == (2,):
                    require_one_scale(scheme, layer)
                found[name] = None
            except (ValueError, NotImplementedError, RuntimeError) as error:
                found[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    Path(answered).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
