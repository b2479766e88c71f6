"""Write a LoRA adapter as a GGUF file that llama.cpp (`--lora`) and Ollama (`ADAPTER`) apply to a GGUF base.

The file has the format of llama.cpp's convert_lora_to_gguf: `general.type` is adapter; the tensors are
`blk.N.attn_q.weight.lora_a` (r, in) and `.lora_b` (out, r) in float32; there is one `adapter.lora.alpha`, and
each layer is scaled by alpha / its own r. For llama, the rows of B of q and k are in llama.cpp's rotary
order, like the rows of the weights.
"""

from pathlib import Path

import numpy as np

from mlx_fish.adapters.peft import Adapter
from mlx_fish.export.gguf import add_model_keys, rotary_heads, tensor_names, to_rotary_pairs
from mlx_fish.export.writer import MergedModel


def write_gguf_adapter(path: Path, adapter: Adapter, model: MergedModel) -> int:
    """Write a plain LoRA adapter (not DoRA) and return the size of its tensors in bytes."""
    import gguf

    assert not adapter.magnitudes, "DoRA is rejected before"
    spec = adapter.spec
    names = tensor_names({f"{module}.weight": layer.shape for module, layer in spec.layers.items()}, model.config)
    heads = rotary_heads(model.config)
    alphas = {module: layer.scale * layer.rank for module, layer in spec.layers.items()}
    is_shared = np.ptp(list(alphas.values())) < 1e-9 * max(map(abs, alphas.values()))
    # llama.cpp and Ollama read a single alpha, so differing ones are folded into B.
    alpha = next(iter(alphas.values())) if is_shared else 1.0
    writer = gguf.GGUFWriter(path, str(model.config["model_type"]))
    writer.add_type("adapter")
    add_model_keys(writer, model)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    size = 0
    for module in spec.layers:
        a, b = adapter.factors(module)
        if not is_shared:
            b = b * np.float32(alphas[module])
        if num_heads := heads.get(module.rsplit(".", 1)[-1]):
            b = to_rotary_pairs(b, num_heads)
        name = names[f"{module}.weight"]
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
        size += a.nbytes + b.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return size
