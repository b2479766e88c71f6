"""What `fuse` can write: the kinds of target, where each goes, and the writers that each needs.

Knows nothing of how the tensors are merged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_fish.adapters.merge import Survival
from mlx_fish.adapters.peft import Adapter, check_plain
from mlx_fish.errors import FishError, did_you_mean
from mlx_fish.export.gguf import GgufWriter, check_architecture
from mlx_fish.export.gguf_adapter import write_gguf_adapter
from mlx_fish.export.gguf_types import check_type
from mlx_fish.export.hf import HfWriter
from mlx_fish.export.mlx_lm import QuantizedWriter, write_mlx_adapter
from mlx_fish.export.ollama import check_name, write_modelfile
from mlx_fish.export.writer import MergedModel, Writer
from mlx_fish.models.folder import RECORD
from mlx_fish.storage.files import write_json
from mlx_fish.storage.tensors import DTYPES, SHARD_BYTES

DEFAULT_OUT = {
    "hf": Path("fused_model"),
    "gguf": Path("fused_gguf"),
    "ollama": Path("fused_ollama"),
    "mlx": Path("fused_mlx"),
    "gguf-adapter": Path("adapter_gguf"),
    "mlx-adapter": Path("adapter_mlx"),
}


@dataclass(frozen=True)
class Target:
    """One folder to write.

    Attributes:
        kind: a key of DEFAULT_OUT.
        dtype: of hf and mlx: float32, float16 or bfloat16; None: the base's.
        file_types: of gguf and ollama, see `gguf_types.GGUF_TYPES`.
        bits, group_size: of mlx: quantise to so many bits; None: leave the weights as they are.
        name: ollama's name for the model.
        as_adapter: ollama: the base and the adapter, in a file each, in place of the merged model.
    """

    kind: str
    out: Path = Path()
    dtype: str | None = None
    file_types: tuple[str, ...] = ()
    bits: int | None = None
    group_size: int = 64
    name: str = "my-model"
    as_adapter: bool = False

    @property
    def needs_weights(self) -> bool:
        return self.kind not in ("gguf-adapter", "mlx-adapter")


def with_folders(targets: Sequence[Target], out: Path | None) -> list[Target]:
    """Give each target its folder: its own default one; with `out`, that one, or a folder each in it for several."""
    if out is not None and out.suffix in (".gguf", ".safetensors"):
        raise FishError(f"--out {out}: a folder was expected; the files in it get their names from their types.")
    if out is None:
        return [replace(target, out=DEFAULT_OUT[target.kind]) for target in targets]
    if len(targets) == 1:
        return [replace(targets[0], out=out)]
    return [replace(target, out=out / target.kind) for target in targets]


@dataclass(frozen=True)
class Artifact:
    """What a target left: a folder, or a GGUF file in one.

    Attributes:
        dtype: the stored type.
        kept, changed: see `merge.Survival`; None where the adapter is stored by itself.
        adapter: the GGUF adapter that goes with a base file.
    """

    kind: str
    path: Path
    dtype: str
    num_bytes: int
    kept: float | None = None
    changed: float | None = None
    adapter: Path | None = None


@dataclass
class WriterTask:
    """A writer at work. `of_base` takes the base's tensors in place of the merged ones."""

    artifact: Artifact
    writer: Writer
    of_base: bool = False
    survival: Survival = field(default_factory=Survival)

    def done(self) -> Artifact:
        if self.of_base:
            return self.artifact
        return replace(self.artifact, kept=self.survival.kept, changed=self.survival.changed)


def check_target_kind(target: Target, config: Mapping[str, Any], adapter: Adapter) -> None:
    """Refuse, before any work, what this target cannot hold."""
    if target.dtype is not None and target.dtype not in DTYPES:
        raise FishError(
            f"--dtype {target.dtype}: expected one of {', '.join(DTYPES)}.{did_you_mean(target.dtype, DTYPES)}"
        )
    if target.kind in ("gguf", "ollama", "gguf-adapter"):
        check_architecture(config)
        for file_type in target.file_types:
            check_type(file_type)
    if target.kind == "ollama":
        check_name(target.name)
    if not target.needs_weights or target.as_adapter:
        check_plain(adapter, {"mlx-adapter": "mlx-lm's adapter layout"}.get(target.kind, "a GGUF adapter"))


@dataclass(frozen=True)
class Opening:
    """What the writers of a run have in common. `card` makes a README.md for a stored type."""

    model: MergedModel
    adapter: Adapter
    cards: Mapping[str, str]
    record: Mapping[str, Any]
    base_dtype: str
    shard_bytes: int = SHARD_BYTES


def open_target(target: Target, folder: Path, opening: Opening) -> tuple[list[WriterTask], list[Artifact]]:
    """Begin to write a target into its empty folder: (writers that want the tensors, artifacts already complete)."""
    model, record = opening.model, {**opening.record, "target": target.kind}
    if target.kind in ("hf", "mlx"):
        dtype = target.dtype or opening.base_dtype
        beside: dict[str, Any] = {"card": opening.cards[dtype], "record": {**record, "dtype": dtype}}
        writer: Writer
        if target.bits is None:
            writer = HfWriter(folder, model, dtype=dtype, shard_bytes=opening.shard_bytes, **beside)
        else:
            writer = QuantizedWriter(
                folder, model, dtype=dtype, bits=target.bits, group_size=target.group_size, **beside
            )
        artifact = Artifact(target.kind, target.out, writer.dtype, writer.num_bytes)
        return [WriterTask(artifact, writer, survival=Survival(quantized=target.bits is not None))], []
    write_json(folder / RECORD, record)
    if target.kind == "gguf-adapter":
        size = write_gguf_adapter(folder / "adapter.gguf", opening.adapter, model)
        return [], [Artifact(target.kind, target.out / "adapter.gguf", "float32", size)]
    if target.kind == "mlx-adapter":
        size = write_mlx_adapter(folder, opening.adapter, model)
        return [], [Artifact(target.kind, target.out, "float32", size)]
    return [_gguf_task(target, folder, file_type, opening) for file_type in target.file_types], []


def _gguf_task(target: Target, folder: Path, file_type: str, opening: Opening) -> WriterTask:
    name = f"{'base' if target.as_adapter else 'model'}-{file_type}.gguf"
    adapter_name = None
    if target.kind == "ollama":
        if target.as_adapter:
            adapter_name = "adapter.gguf"
            write_gguf_adapter(folder / adapter_name, opening.adapter, opening.model)
        write_modelfile(folder, opening.model, name=target.name, file_name=name, adapter_name=adapter_name)
    writer = GgufWriter(folder / name, opening.model, file_type=file_type)
    adapter = target.out / adapter_name if adapter_name else None
    artifact = Artifact(target.kind, target.out / name, file_type, writer.num_bytes, adapter=adapter)
    return WriterTask(
        artifact, writer, of_base=target.as_adapter, survival=Survival(quantized=file_type.startswith("q"))
    )
