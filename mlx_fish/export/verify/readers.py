"""Read exported models with other programs: transformers, PEFT, mlx-lm and llama.cpp, each in its own process.

    python -m mlx_fish.export.verify.readers < request.json        writes the .npz file that the request names

Each reader has its own process, because two ggml libraries, or MLX and torch, should not be loaded together,
and because a reader may crash. Independent of the writers: a check that shares code with what it checks
proves nothing. `compare.Check` builds the requests.
"""

import json
import os
import sys
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SMALL_VOCABULARY = 20_000

LogProbs = npt.NDArray[np.float32]
Forward = Callable[[list[int]], LogProbs]
"""ids (T,) -> logits (T, V)."""


def main() -> None:
    """Run the reader that the request on stdin names, and write its answers."""
    request = json.load(sys.stdin)
    np.savez(request["out"], **READERS[request["reader"]](request))


def log_softmax(logits: LogProbs) -> LogProbs:
    """Return the log-softmax over the last axis, computed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    logprobs: LogProbs = (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)
    return logprobs


def answer_rows(forward: Forward, request: dict[str, Any]) -> dict[str, Any]:
    """Return the log-probabilities at the last `positions` positions of each row, (N, V)."""
    last = request["positions"]
    return {"logprobs": np.concatenate([log_softmax(forward(ids)[-last:]) for ids in request["rows"]])}


def reference(tuned: Forward, base: Forward, request: dict[str, Any]) -> dict[str, Any]:
    """Return the adapter model's greedy answers, with its own and the base's log-probabilities along them."""
    texts, prompts = render(request)
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(request["positions"] - 1):
            ids.append(int(tuned(ids)[-1].argmax()))
        rows.append(ids)
    request = {**request, "rows": rows}
    return {
        **answer_rows(tuned, request),
        "base_logprobs": answer_rows(base, request)["logprobs"],
        "rows": np.array(json.dumps(rows)),
        "prompts": np.array(json.dumps(list(zip(texts, [len(prompt) for prompt in prompts], strict=True)))),
    }


def render(request: dict[str, Any]) -> tuple[list[str], list[list[int]]]:
    """Return the questions rendered with the tuned chat template, as texts and as token ids."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(request["tokenizer"], local_files_only=True)
    texts = []
    for question in request["questions"]:
        messages = [{"role": "user", "content": question}]
        options = {"chat_template": request["template"], "tokenize": False, "add_generation_prompt": True}
        texts.append(tokenizer.apply_chat_template(messages, **options) if request["template"] else question)
    return texts, [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _torch_forward(model: Any) -> Forward:
    import torch

    def forward(ids: list[int]) -> LogProbs:
        with torch.no_grad():
            logits: LogProbs = model(torch.tensor([ids])).logits[0].float().numpy()
            return logits

    return forward


def _load_torch(folder: str) -> Any:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    options = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def read_transformers(request: dict[str, Any]) -> dict[str, Any]:
    """Read a Hugging Face folder with transformers, in float32."""
    return answer_rows(_torch_forward(_load_torch(request["path"])), request)


def read_peft(request: dict[str, Any]) -> dict[str, Any]:
    """Compute the reference with PEFT's adapter model, unmerged."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT only warns about them
        model = PeftModel.from_pretrained(_load_torch(request["path"]), request["adapter"]).eval()

    def base(ids: list[int]) -> LogProbs:
        with model.disable_adapter():
            return _torch_forward(model)(ids)

    return reference(_torch_forward(model), base, request)


def _load_mlx_lm(folder: str, adapter: str | None = None, config: dict[str, Any] | None = None) -> Forward:
    """Load a model with mlx-lm on the CPU in float32, to exclude mlx-lm's own rounding from the comparison."""
    from mlx_fish.backends.blas import load_openblas

    load_openblas()
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    import mlx_lm
    from mlx.utils import tree_map

    model = mlx_lm.load(folder, adapter_path=adapter, model_config=config or {})[0]
    half_dtypes = (mx.bfloat16, mx.float16)
    model.update(tree_map(lambda a: a.astype(mx.float32) if a.dtype in half_dtypes else a, model.parameters()))
    return lambda ids: np.array(model(mx.array([ids]))[0].astype(mx.float32))


def read_mlx_lm(request: dict[str, Any]) -> dict[str, Any]:
    """Read a folder, and an adapter if there is one, with mlx-lm."""
    return answer_rows(_load_mlx_lm(request["path"], request["adapter"], request["config"]), request)


def read_mlx_lm_reference(request: dict[str, Any]) -> dict[str, Any]:
    """Compute the reference for an adapter in mlx-lm's layout."""
    tuned = _load_mlx_lm(request["path"], request["adapter"], request["config"])
    return reference(tuned, _load_mlx_lm(request["path"], None, request["config"]), request)


def read_mlx_fish_reference(request: dict[str, Any]) -> dict[str, Any]:
    """Compute the reference with mlx-fish's own model, as it was trained.

    Used if PEFT cannot: without torch, or on a base that MLX quantised.
    """
    from mlx_fish.adapters.peft import load_adapter
    from mlx_fish.backends.blas import load_openblas
    from mlx_fish.models.folder import ModelFolder

    load_openblas()
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    from mlx_fish.backends.mlx import MlxBackend

    adapter, backend = load_adapter(Path(request["adapter"])), MlxBackend(ModelFolder(Path(request["path"]), "base"))
    backend.attach(adapter.spec, adapter.arrays)

    def forward(enabled: bool) -> Forward:
        def compute(ids: list[int]) -> LogProbs:
            backend.use_adapter(enabled)
            return backend.logits(np.array(ids, np.int32))

        return compute

    return reference(forward(True), forward(False), request)


def read_llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """Read a GGUF file with llama.cpp (PyPI `xllamacpp`), and check its tokenizer and chat template."""
    import xllamacpp

    server = xllamacpp.Server(_llama_parameters(xllamacpp, request))
    size, last = request["vocab_size"], request["positions"]

    def post(path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(server.listening_address + path, data, headers)) as answer:
            return json.load(answer)

    # The server omits the probabilities if it samples an end token or part of a character. They do not depend on the
    # sampled token, so force the same letter every time.
    letter = post("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
    options = {"n_predict": 1, "n_probs": size, "temperature": 0.0, "cache_prompt": True, "logit_bias": [[letter, 1e9]]}
    rows = []
    for ids in request["rows"]:
        for end in range(len(ids) - last + 1, len(ids) + 1):
            answer = server.handle_completions({"prompt": ids[:end], **options})
            logprobs = np.full(size, -np.inf, np.float32)
            for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                logprobs[token["id"]] = token["logprob"]
            rows.append(logprobs)
    errors = []
    for question, (text, length), ids in zip(request["questions"], request["prompts"], request["rows"], strict=True):
        tokens = post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        if tokens != ids[:length]:
            errors.append(f"its tokenizer reads {text!r} as {tokens}, not as {ids[:length]}")
        if request["template"]:
            rendered = post("/apply-template", {"messages": [{"role": "user", "content": question}]})["prompt"]
            if rendered != text and request["bos"] + rendered != text:
                errors.append(f"its template renders {rendered!r}, not {text!r}")
    # The server's float32 sum over a large vocabulary is off by about 1e-4, so normalise again.
    return {"logprobs": log_softmax(np.stack(rows)), "wrong": np.array(json.dumps(errors))}


def _llama_parameters(xllamacpp: Any, request: dict[str, Any]) -> Any:
    """Return parameters that keep llama.cpp within about 1e-6 of float32.

    They disable flash attention and the GPU, and keep the KV cache in float32.
    """
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["path"]
    parameters.n_ctx = 2 * max(map(len, request["rows"])) + 64
    parameters.n_gpu_layers = 0
    parameters.n_parallel = 1
    parameters.warmup = False
    for threads in (parameters.cpuparams, parameters.cpuparams_batch):  # a second thread slows a tiny model down
        threads.n_threads = 1 if request["vocab_size"] <= SMALL_VOCABULARY else os.cpu_count() or 1
        threads.poll = 0
    parameters.verbosity = -1
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if request["adapter"]:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
    return parameters


READERS = {
    "transformers": read_transformers,
    "peft": read_peft,
    "mlx-lm": read_mlx_lm,
    "mlx-lm-reference": read_mlx_lm_reference,
    "mlx-fish-reference": read_mlx_fish_reference,
    "llama.cpp": read_llama_cpp,
}

if __name__ == "__main__":
    main()
