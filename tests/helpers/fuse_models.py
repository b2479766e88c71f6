"""Tiny random models, adapters on them, and what transformers and PEFT compute with both."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_fish.adapters.peft import Adapter, load_adapter, peft_config, save_adapter
from mlx_fish.adapters.spec import AdapterSpec, choose_layers, initial_arrays, tensor_key
from mlx_fish.backends.blas import load_openblas
from mlx_fish.export.fuse import fuse
from mlx_fish.export.targets import Target
from mlx_fish.models.folder import ModelFolder
from mlx_fish.storage.files import read_json, write_json

load_openblas()
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = 300
IDS = [[1, 5, 9, 33, 71, 2, 64, 8]]
TEMPLATE = "{%- for message in messages -%}{{- message['content'] + '<end>' -}}{%- endfor -%}"
RANK, ALPHA = 4, 12.0


def make_model(
    folder: Path, kind: str, *, tied: bool, dtype: str = "float32", seed: int = 0, num_blocks: int = 3
) -> ModelFolder:
    """A random model as transformers 5 writes it: `rope_parameters`, no `rope_theta`."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    names = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}[kind]
    config, model_class = (getattr(transformers, name) for name in names)
    model = model_class(config(**sizes)).to(getattr(torch, dtype))
    with torch.no_grad():  # the norms and biases start at 1 and 0, which would hide a wrong one
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    assert "rope_theta" not in read_json(folder / "config.json")
    make_tokenizer(folder)
    return ModelFolder(folder, "Owner/Base", "abc123")


def make_tokenizer(folder: Path) -> None:
    """A byte is a token, in the byte-level form that both architectures' tokenizers have, and one merge: llama.cpp needs one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:4])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make_adapter(folder: Path, base: ModelFolder, *, size: float = 0.1, target: str = "all") -> Adapter:
    layers = choose_layers(base.linear_layers, target=target)
    spec = AdapterSpec.uniform(layers, rank=RANK, alpha=ALPHA)
    arrays = initial_arrays(spec, 7)
    generator = np.random.default_rng(3)
    for module in layers:
        b = generator.standard_normal(arrays[tensor_key(module, "lora_B")].shape)
        arrays[tensor_key(module, "lora_B")] = (size * b).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    config = peft_config(spec, rank=RANK, alpha=ALPHA, num_blocks=3, base=str(base.path), revision=None)
    save_adapter(folder, arrays, config)
    return load_adapter(folder)


def add_run_files(adapter: Adapter, base: ModelFolder) -> None:
    """What `mlx-fish train` leaves beside the adapter."""
    make_tokenizer(adapter.path)
    (adapter.path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_json(adapter.path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [3]})
    run = {
        "version": "0.1.0",
        "settings": {"lora_rank": RANK, "lora_alpha": ALPHA},
        "base": {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint},
        "template": {"name": "alpaca", "end_token_id": 3},
        "data": {"name": "fish_care", "rows": 280},
        "results": {"loss_before": 3.5, "loss_after": 1.25},
    }
    write_json(adapter.path / "run.json", run)


def hf_logits(folder: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits[0].numpy()


def peft_logits(base: Path, adapter: Path) -> tuple[Any, Any]:
    """(with the adapter beside the base, merged by PEFT), float32."""
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT goes on without them
        tuned = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        beside = tuned(torch.tensor(IDS)).logits[0].numpy()
        return beside, tuned.merge_and_unload()(torch.tensor(IDS)).logits[0].numpy()


def run_fuse(base: ModelFolder, adapter: Adapter, out: Path, *, dtype: str | None = None, **options: Any) -> Any:
    """Fuse to one Hugging Face folder: what the artifact and the result tell, in one."""
    result = fuse(base=base, adapter=adapter, targets=[Target("hf", out, dtype=dtype)], **options)
    return SimpleNamespace(**{**vars(result), **vars(result.artifacts[0])})
