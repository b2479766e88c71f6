"""What is trained: which layers an adapter sits on, which tensors each of them gets, and with which values they start.

LoRA (arXiv 2106.09685): y = W x + scale * B (A x), with W (out, in) frozen, A (r, in) and B (out, r) trained. The scale is
alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732). Knows nothing of files.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.storage.tensors import Float32

KINDS = ("lora", "rslora")
Arrays = dict[str, Float32]
T = TypeVar("T")


@dataclass(frozen=True)
class LayerSpec:
    """What is trained on one linear layer.

    Attributes:
        shape: (out, in) of its frozen weight.
        rank: r.
        scale: the factor on B A.
    """

    shape: tuple[int, int]
    rank: int
    scale: float

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each trained tensor, in the order in which they lie in the flat vector."""
        out_features, in_features = self.shape
        return {"lora_A": (self.rank, in_features), "lora_B": (out_features, self.rank)}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())


@dataclass(frozen=True)
class AdapterSpec:
    """The shape of an adapter.

    Attributes:
        kind: one of KINDS.
        layers: module path (`model.layers.0.mlp.up_proj`) -> its layer, in model order.
        dropout: the share of a layer's input that is zeroed for the adapter in training.
    """

    kind: str
    layers: Mapping[str, LayerSpec]
    dropout: float = 0.0

    @classmethod
    def uniform(
        cls,
        shapes: Mapping[str, tuple[int, int]],
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        kind: str = "lora",
    ) -> "AdapterSpec":
        """The same rank and alpha on every layer. `shapes`: module path -> (out, in)."""
        scale = scale_of(kind, rank=rank, alpha=alpha)
        return cls(kind, {module: LayerSpec(shape, rank, scale) for module, shape in shapes.items()}, dropout)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """PEFT's key -> shape of every trained tensor, in the order of the flat vector."""
        return {
            tensor_key(module, name): shape
            for module, layer in self.layers.items()
            for name, shape in layer.tensors.items()
        }

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers.values())


class FlatLayout:
    """Where each tensor of an adapter lies in one float32 vector of P numbers, the form in which it is optimised.

    Attributes:
        keys, shapes: of each tensor in turn, under PEFT's keys.
        ends: where each tensor but the last ends in the vector.
    """

    def __init__(self, spec: AdapterSpec):
        self.keys = list(spec.shapes)
        self.shapes = list(spec.shapes.values())
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.ends: list[int] = np.cumsum(self.sizes)[:-1].tolist()
        self._per_layer = [len(layer.tensors) for layer in spec.layers.values()]

    def flatten(self, arrays: Mapping[str, Float32]) -> Float32:
        """Named tensors -> (P,)."""
        for key, shape in zip(self.keys, self.shapes, strict=True):
            assert arrays[key].shape == shape, (key, arrays[key].shape, shape)
        return np.concatenate([arrays[key].reshape(-1) for key in self.keys])

    def unflatten(self, flat: Float32) -> Arrays:
        """(P,) -> named tensors, which are views of it."""
        pieces = np.split(flat, self.ends)
        return {key: piece.reshape(shape) for key, piece, shape in zip(self.keys, pieces, self.shapes, strict=True)}

    def by_layer(self, values: Iterable[T]) -> list[list[T]]:
        """One value a tensor -> the values of each layer."""
        rest = iter(values)
        grouped = [[next(rest) for _ in range(count)] for count in self._per_layer]
        assert not list(rest), "more values than tensors"
        return grouped


def tensor_key(module: str, name: str) -> str:
    """PEFT's key of a tensor: (`model.layers.0.mlp.up_proj`, `lora_A`) -> `base_model.model.….lora_A.weight`."""
    return f"base_model.model.{module}.{name}.weight"


def scale_of(kind: str, *, rank: int, alpha: float) -> float:
    """The factor on B A."""
    assert kind in KINDS, kind
    return alpha / math.sqrt(rank) if kind == "rslora" else alpha / rank


def initial_arrays(spec: AdapterSpec, seed: int) -> Arrays:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), as MLX and PEFT both draw it, and B = 0: step 0 computes the base model.

    Each layer draws from a generator of its own, keyed by (seed, module path), so that its start depends neither on which
    other layers are adapted nor on the backend.
    """
    arrays: Arrays = {}
    for module, layer in spec.layers.items():
        generator = np.random.default_rng([seed, zlib.crc32(module.encode())])
        bound = 1.0 / math.sqrt(layer.shape[1])
        for name, shape in layer.tensors.items():
            values = generator.uniform(-bound, bound, shape) if name == "lora_A" else np.zeros(shape)
            arrays[tensor_key(module, name)] = values.astype(np.float32)
    return arrays


def choose_layers(
    linear_layers: Mapping[str, tuple[int, int]], *, target: str = "all", num_layers: int | None = None
) -> dict[str, tuple[int, int]]:
    """The layers to adapt: module path -> (out, in), in model order.

    Args:
        linear_layers: every linear layer of every block, in any order (`ModelFolder.linear_layers`).
        target: `all`, or names such as `q_proj,v_proj`.
        num_layers: adapt only the last so many blocks.

    Raises:
        FishError: the model has no such layer, or not so many blocks.
    """
    known = sorted({module.rsplit(".", 1)[-1] for module in linear_layers})
    wanted = _wanted_names(target, known)
    num_blocks = count_blocks(linear_layers)
    if num_layers is not None and not 1 <= num_layers <= num_blocks:
        raise FishError(f"--num-layers {num_layers}: the model has {num_blocks} layers; give 1 to {num_blocks}.")
    first = num_blocks - num_layers if num_layers else 0
    # A file may hold its tensors in any order. MLX computes gradients in the order of the layers, and out of the model's order keeps
    # what checkpointing computed again: 1.43 GB above the weights instead of 0.42 GB for Qwen2-0.5B, 4 rows of 144 tokens.
    return {
        module: shape
        for module, shape in sorted(linear_layers.items(), key=lambda item: block_of(item[0]))
        if block_of(module) >= first and ("all" in wanted or module.rsplit(".", 1)[-1] in wanted)
    }


def _wanted_names(target: str, known: Sequence[str]) -> list[str]:
    wanted = [name.strip() for name in target.split(",") if name.strip()]
    for name in wanted:
        if name not in (*known, "all"):
            hint = did_you_mean(name, [*known, "all"])
            raise FishError(f"--lora-target {name}: the model's linear layers are {', '.join(known)}, or all.{hint}")
    if not wanted:
        raise FishError(f"--lora-target is empty; name some of {', '.join(known)}, or all.")
    return wanted


def block_of(module: str) -> int:
    """`model.layers.7.mlp.up_proj` -> 7."""
    return int(module.split(".layers.", 1)[1].split(".", 1)[0])


def count_blocks(modules: Iterable[str]) -> int:
    """Blocks of a model, from the paths of their modules."""
    return 1 + max(map(block_of, modules))
