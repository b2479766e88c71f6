"""Define the export targets of `fuse`: their kinds, their folders and their writers.

Independent of how the tensors are merged.
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
        out: the folder.
        dtype: for hf and mlx: float32, float16 or bfloat16; None: the base's dtype.
        file_types: for gguf and ollama: keys of `gguf_types.GGUF_TYPES`.
        bits, group_size: for mlx: bits per weight and weights per group; `bits` None: do not quantise.
        name: for ollama: the model's name.
        as_adapter: for ollama: write base and adapter to separate files instead of merging them.
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
        """Whether the target contains model weights, not only the adapter."""
        return self.kind not in ("gguf-adapter", "mlx-adapter")


def with_folders(targets: Sequence[Target], out: Path | None) -> list[Target]:
    """Return the targets with their folders set.

    Without `out`, each target has its default folder. With `out`, a single target uses it, and several
    targets use one subfolder each, named after their kind.

    Raises:
        FishError: `out` looks like a file.
    """
    if out is not None and out.suffix in (".gguf", ".safetensors"):
        raise FishError(f"--out {out}: expected a folder; the files in it are named after their types.")
    if out is None:
        return [replace(target, out=DEFAULT_OUT[target.kind]) for target in targets]
    if len(targets) == 1:
        return [replace(targets[0], out=out)]
    return [replace(target, out=out / target.kind) for target in targets]


@dataclass(frozen=True)
class Artifact:
    """One result of an export: a folder, or a GGUF file in it.

    Attributes:
        kind: the target's kind.
        dtype: the stored type.
        num_bytes: size of the stored tensors, bytes.
        kept, changed: see `merge.Survival`; None if the adapter is stored separately.
        adapter: the GGUF adapter that belongs to a base file.
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
    """An open writer and the artifact that it produces.

    Attributes:
        unmerged: the writer receives the base's tensors instead of the merged ones.
        survival: how much of the adapter the stored type keeps.
    """

    artifact: Artifact
    writer: Writer
    unmerged: bool = False
    survival: Survival = field(default_factory=Survival)

    def done(self) -> Artifact:
        """Return the artifact, with the measured survival of the adapter unless it is stored separately."""
        if self.unmerged:
            return self.artifact
        return replace(self.artifact, kept=self.survival.kept, changed=self.survival.changed)


def check_target_kind(target: Target, config: Mapping[str, Any], adapter: Adapter) -> None:
    """Check, before any work, that a target's format supports this model and adapter.

    Args:
        config: the base's config.json.

    Raises:
        FishError: an unknown dtype or type, an invalid name, or a model or adapter that the format cannot
            express.
    """
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
class ExportContext:
    """The input that all writers of one `fuse` share.

    Attributes:
        model: the merged model without its weights.
        cards: dtype -> content of README.md.
        record: content of mlx_fish.json, the origin of the files.
        base_dtype: dtype of the base's weights.
        shard_bytes: maximum size of one safetensors file, bytes.
    """

    model: MergedModel
    adapter: Adapter
    cards: Mapping[str, str]
    record: Mapping[str, Any]
    base_dtype: str
    shard_bytes: int = SHARD_BYTES


def open_target(target: Target, folder: Path, context: ExportContext) -> tuple[list[WriterTask], list[Artifact]]:
    """Start writing a target into its empty folder.

    Returns:
        the writers that still need the tensors, and the artifacts that are already complete.
    """
    model, record = context.model, {**context.record, "target": target.kind}
    if target.kind in ("hf", "mlx"):
        dtype = target.dtype or context.base_dtype
        metadata: dict[str, Any] = {"card": context.cards[dtype], "record": {**record, "dtype": dtype}}
        writer: Writer
        if target.bits is None:
            writer = HfWriter(folder, model, dtype=dtype, shard_bytes=context.shard_bytes, **metadata)
        else:
            writer = QuantizedWriter(
                folder, model, dtype=dtype, bits=target.bits, group_size=target.group_size, **metadata
            )
        artifact = Artifact(target.kind, target.out, writer.dtype, writer.num_bytes)
        return [WriterTask(artifact, writer, survival=Survival(quantized=target.bits is not None))], []
    write_json(folder / RECORD, record)
    if target.kind == "gguf-adapter":
        size = write_gguf_adapter(folder / "adapter.gguf", context.adapter, model)
        return [], [Artifact(target.kind, target.out / "adapter.gguf", "float32", size)]
    if target.kind == "mlx-adapter":
        size = write_mlx_adapter(folder, context.adapter, model)
        return [], [Artifact(target.kind, target.out, "float32", size)]
    return [_gguf_task(target, folder, file_type, context) for file_type in target.file_types], []


def _gguf_task(target: Target, folder: Path, file_type: str, context: ExportContext) -> WriterTask:
    """Open the writer of one GGUF file; for Ollama, also write the Modelfile and the adapter."""
    name = f"{'base' if target.as_adapter else 'model'}-{file_type}.gguf"
    adapter_name = None
    if target.kind == "ollama":
        if target.as_adapter:
            adapter_name = "adapter.gguf"
            write_gguf_adapter(folder / adapter_name, context.adapter, context.model)
        write_modelfile(folder, context.model, name=target.name, file_name=name, adapter_name=adapter_name)
    writer = GgufWriter(folder / name, context.model, file_type=file_type)
    adapter = target.out / adapter_name if adapter_name else None
    artifact = Artifact(target.kind, target.out / name, file_type, writer.num_bytes, adapter=adapter)
    return WriterTask(
        artifact, writer, unmerged=target.as_adapter, survival=Survival(quantized=file_type.startswith("q"))
    )
