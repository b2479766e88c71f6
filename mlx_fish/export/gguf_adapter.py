"""A LoRA adapter -> a GGUF file that llama.cpp (`--lora`) and Ollama (`ADAPTER`) put on a GGUF base.

The format is that of llama.cpp's convert_lora_to_gguf: `general.type` adapter, tensors `blk.N.attn_q.weight.lora_a` (r, in)
and `.lora_b` (out, r) in float32, one `adapter.lora.alpha`; each layer is scaled by alpha / its own r. For llama the rows
of B of q and k lie in llama.cpp's rotary order, as those of the weights do.
"""

from pathlib import Path

import numpy as np

from mlx_fish.adapters.peft import Adapter
from mlx_fish.export.gguf import add_model_keys, rotary_heads, tensor_names, to_rotary_pairs
from mlx_fish.export.writer import MergedModel


def write_gguf_adapter(path: Path, adapter: Adapter, model: MergedModel) -> int:
    """Write plain LoRA (no DoRA); returns the bytes of its tensors."""
    import gguf

    assert not adapter.magnitudes, "refused before"
    spec = adapter.spec
    names = tensor_names({f"{module}.weight": layer.shape for module, layer in spec.layers.items()}, model.config)
    heads = rotary_heads(model.config)
    alphas = {module: layer.scale * layer.rank for module, layer in spec.layers.items()}
    shared = np.ptp(list(alphas.values())) < 1e-9 * max(map(abs, alphas.values()))
    alpha = next(iter(alphas.values())) if shared else 1.0  # llama.cpp and Ollama know one: others go into B
    writer = gguf.GGUFWriter(path, str(model.config["model_type"]))
    writer.add_type("adapter")
    add_model_keys(writer, model)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    size = 0
    for module in spec.layers:
        a, b = adapter.factors(module)
        if not shared:
            b = b * np.float32(alphas[module])
        if rotary := heads.get(module.rsplit(".", 1)[-1]):
            b = to_rotary_pairs(b, rotary)
        name = names[f"{module}.weight"]
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
        size += a.nbytes + b.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size
