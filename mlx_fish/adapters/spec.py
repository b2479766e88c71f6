"""Specify an adapter: the adapted layers, the shapes of their tensors, and the initial values.

LoRA (arXiv 2106.09685) computes y = W x + scale * B (A x), with W (out, in) frozen, and A (r, in) and B (out, r)
trained. The scale is alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732). Independent of file formats.
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
    """The adapter of one linear layer.

    Attributes:
        shape: (out, in) of the frozen weight.
        rank: r.
        scale: the factor on B A.
    """

    shape: tuple[int, int]
    rank: int
    scale: float

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of each trained tensor, in the order of the flat vector."""
        out_features, in_features = self.shape
        return {"lora_A": (self.rank, in_features), "lora_B": (out_features, self.rank)}

    @property
    def num_parameters(self) -> int:
        """Return the number of trainable parameters of the layer."""
        return sum(math.prod(shape) for shape in self.tensors.values())


@dataclass(frozen=True)
class AdapterSpec:
    """The layers of an adapter, with their ranks, scales and dropout.

    Attributes:
        kind: one of KINDS.
        layers: module path (`model.layers.0.mlp.up_proj`) -> the layer's adapter, in model order.
        dropout: dropout probability on the adapter's input during training, 0 to 1.
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
        """Return a spec with the same rank and alpha on every layer.

        Args:
            shapes: module path -> (out, in) of the layer's weight.
            rank: r.
            alpha: LoRA's alpha, which determines the scale.
            dropout: dropout probability.
            kind: one of KINDS.
        """
        scale = scale_of(kind, rank=rank, alpha=alpha)
        return cls(kind, {module: LayerSpec(shape, rank, scale) for module, shape in shapes.items()}, dropout)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return PEFT's key -> shape of every trained tensor, in the order of the flat vector."""
        return {
            tensor_key(module, name): shape
            for module, layer in self.layers.items()
            for name, shape in layer.tensors.items()
        }

    @property
    def num_parameters(self) -> int:
        """Return the number of trainable parameters (P)."""
        return sum(layer.num_parameters for layer in self.layers.values())


class FlatLayout:
    """The layout of an adapter's tensors in one float32 vector (P,), on which the optimizer works.

    Attributes:
        keys, shapes: PEFT's key and the shape of each tensor, in order.
        sizes: number of elements of each tensor.
        ends: end of each tensor except the last in the vector.
    """

    def __init__(self, spec: AdapterSpec):
        self.keys = list(spec.shapes)
        self.shapes = list(spec.shapes.values())
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.ends: list[int] = np.cumsum(self.sizes)[:-1].tolist()
        self._tensors_per_layer = [len(layer.tensors) for layer in spec.layers.values()]

    def flatten(self, arrays: Mapping[str, Float32]) -> Float32:
        """Concatenate tensors under PEFT's keys into a vector (P,), float32."""
        for key, shape in zip(self.keys, self.shapes, strict=True):
            assert arrays[key].shape == shape, (key, arrays[key].shape, shape)
        return np.concatenate([arrays[key].reshape(-1) for key in self.keys])

    def unflatten(self, flat: Float32) -> Arrays:
        """Return views of a vector (P,), float32, under PEFT's keys."""
        pieces = np.split(flat, self.ends)
        return {key: piece.reshape(shape) for key, piece, shape in zip(self.keys, pieces, self.shapes, strict=True)}

    def by_layer(self, values: Iterable[T]) -> list[list[T]]:
        """Group a sequence with one value per tensor by layer."""
        remaining = iter(values)
        grouped = [[next(remaining) for _ in range(count)] for count in self._tensors_per_layer]
        assert not list(remaining), "more values than tensors"
        return grouped


def tensor_key(module: str, name: str) -> str:
    """Return PEFT's key: (`model.layers.0.mlp.up_proj`, `lora_A`) -> `base_model.model.….lora_A.weight`."""
    return f"base_model.model.{module}.{name}.weight"


def scale_of(kind: str, *, rank: int, alpha: float) -> float:
    """Return the factor on B A: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    assert kind in KINDS, kind
    return alpha / math.sqrt(rank) if kind == "rslora" else alpha / rank


def initial_arrays(spec: AdapterSpec, seed: int) -> Arrays:
    """Return the initial tensors under PEFT's keys, float32.

    A ~ U(-1/sqrt(in), 1/sqrt(in)), as in MLX and PEFT, and B = 0, so that an untrained adapter does not change the
    model. Each layer has its own generator, seeded with (seed, module path), so that its initial values depend neither
    on the other adapted layers nor on the backend.
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
    """Return the layers to adapt: module path -> (out, in), in model order.

    Args:
        linear_layers: every linear layer of every block, in any order (`ModelFolder.linear_layers`).
        target: `all`, or comma-separated names such as `q_proj,v_proj`.
        num_layers: adapt only the last `num_layers` blocks; None: all blocks.

    Raises:
        FishError: the model does not have these layers, or fewer blocks than `num_layers`.
    """
    known = sorted({module.rsplit(".", 1)[-1] for module in linear_layers})
    targets = _parse_targets(target, known)
    num_blocks = count_blocks(linear_layers)
    if num_layers is not None and not 1 <= num_layers <= num_blocks:
        raise FishError(
            f"--num-layers {num_layers}: the model has {num_blocks} layers; use a number from 1 to {num_blocks}."
        )
    first = num_blocks - num_layers if num_layers else 0
    # Sort, since a file may store its tensors in any order. MLX computes gradients in the order of the layers. If that
    # is not the model's order, it keeps the activations that checkpointing recomputed: 1.43 GB above the weights
    # instead of 0.42 GB for Qwen2-0.5B, 4 rows of 144 tokens.
    return {
        module: shape
        for module, shape in sorted(linear_layers.items(), key=lambda item: block_of(item[0]))
        if block_of(module) >= first and ("all" in targets or module.rsplit(".", 1)[-1] in targets)
    }


def _parse_targets(target: str, known: Sequence[str]) -> list[str]:
    """Split the value of --lora-target, and check its names against the model's layer names."""
    names = [name.strip() for name in target.split(",") if name.strip()]
    for name in names:
        if name not in (*known, "all"):
            hint = did_you_mean(name, [*known, "all"])
            raise FishError(
                f"--lora-target {name}: expected `all` or some of the model's linear layers, {', '.join(known)}.{hint}"
            )
    if not names:
        raise FishError(f"--lora-target is empty; expected `all` or some of {', '.join(known)}.")
    return names


def block_of(module: str) -> int:
    """Return the index of a module's block: `model.layers.7.mlp.up_proj` -> 7."""
    return int(module.split(".layers.", 1)[1].split(".", 1)[0])


def count_blocks(modules: Iterable[str]) -> int:
    """Return the number of blocks of a model, from the paths of their modules."""
    return 1 + max(map(block_of, modules))
