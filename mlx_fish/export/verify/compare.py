"""Verify exported models: compare each artifact, read by another program, with the base plus adapter.

The adapter model, which is the base with the unmerged adapter, answers a few questions greedily. Its
log-probabilities along these answers are compared with those that each artifact's reader computes for the
same tokens. If the top token agrees at every position, the greedy answers are the same. Independent of how
the artifacts are written: the readers run in their own processes (`readers.py`).
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_fish.adapters.peft import WEIGHTS_FILE, Adapter
from mlx_fish.errors import FishError
from mlx_fish.export.base import PlainBase, plain_base
from mlx_fish.export.gguf import GgufWriter
from mlx_fish.export.targets import Artifact
from mlx_fish.export.verify.readers import SMALL_VOCABULARY
from mlx_fish.export.writer import MergedModel
from mlx_fish.models.convert import convert
from mlx_fish.models.folder import ModelFolder
from mlx_fish.storage.files import read_json

SMALL = 200_000_000
"""Number of parameters up to which verification takes only seconds."""
QUESTIONS = ("今天应该做什么？", "请用一句话介绍你自己。", "What should I do first?")
_NEEDS = {"transformers": "torch", "peft": "peft", "mlx-lm": "mlx_lm", "llama.cpp": "xllamacpp"}
_TIMEOUT = 1800


@dataclass(frozen=True)
class Tolerance:
    """How far an artifact may deviate from the adapter model.

    Attributes:
        difference: maximum absolute difference of any log-probability, nats; infinite if only the mean
            counts.
        divergence: maximum mean KL(adapter model || artifact), nats.
        agreement: minimum share of positions with the same top token.
    """

    difference: float
    divergence: float
    agreement: float


_INFINITE = float("inf")
TOLERANCES = {
    "float32": Tolerance(1e-3, 1e-6, 0.99),
    "f32": Tolerance(1e-3, 1e-6, 0.99),
    "float16": Tolerance(_INFINITE, 1e-3, 0.95),
    "f16": Tolerance(_INFINITE, 1e-3, 0.95),
    "bfloat16": Tolerance(_INFINITE, 5e-3, 0.9),
    "bf16": Tolerance(_INFINITE, 5e-3, 0.9),
    "q8_0": Tolerance(_INFINITE, 5e-3, 0.9),
    "8 bits": Tolerance(_INFINITE, 1e-2, 0.9),
    "q4_k_m": Tolerance(_INFINITE, 0.3, 0.4),
    "q4_0": Tolerance(_INFINITE, 0.5, 0.3),
    "4 bits": Tolerance(_INFINITE, 0.5, 0.3),
}


@dataclass(frozen=True)
class Comparison:
    """The deviation of one artifact from the adapter model.

    Attributes:
        reader: the program that read the artifact.
        difference, divergence, agreement: see `Tolerance`.
        base_divergence: mean KL(adapter model || base), nats, to put `divergence` in proportion.
        wrong: errors that the reader found in the tokenizer or the chat template.
    """

    artifact: Artifact
    reader: str
    difference: float
    divergence: float
    agreement: float
    base_divergence: float
    wrong: tuple[str, ...] = ()

    @property
    def faults(self) -> list[str]:
        """Descriptions of everything that is outside the tolerance."""
        limit = tolerance(self.artifact.dtype)
        faults = list(self.wrong)
        if not self.difference <= limit.difference:
            faults.append(
                f"a log-probability differs by {self.difference:.2g}, at most {limit.difference:g} is allowed"
            )
        if not self.divergence <= limit.divergence:
            faults.append(f"the mean KL is {self.divergence:.2g}, at most {limit.divergence:g} is allowed")
        if not self.agreement >= limit.agreement:
            faults.append(
                f"the top token agrees at {self.agreement:.0%} of positions, at least {limit.agreement:.0%} is required"
            )
        return faults

    def __str__(self) -> str:
        kept = "" if self.artifact.kept is None else f", {self.artifact.kept:.1%} of the adapter's change kept"
        return (
            f"{self.artifact.path} read by {self.reader}: max difference {self.difference:.2g}, KL {self.divergence:.2g} "
            f"(the base's: {self.base_divergence:.2g}), top-1 {self.agreement:.0%}{kept}"
        )


def tolerance(dtype: str) -> Tolerance:
    """Return the tolerance for an artifact's dtype, such as `q8_0` or `bfloat16 in 4 bits`."""
    return TOLERANCES[dtype.split(" in ")[-1]]


def verify_artifacts(
    base: ModelFolder,
    adapter: Adapter,
    artifacts: Sequence[Artifact],
    *,
    required: bool,
    say: Callable[[str], None] = lambda text: None,
) -> list[Comparison]:
    """Compare every artifact with the adapter model.

    Args:
        required: treat a reader that is not installed as an error; otherwise report it, and skip its
            artifacts.
        say: called with each line of the report.

    Raises:
        FishError: an artifact is outside its tolerance, a reader cannot read it, or the adapter changes no
            answer.
    """
    readers = {artifact: _reader_of(artifact) for artifact in artifacts}
    for reader in dict.fromkeys(readers.values()):
        if not _installed(reader):
            missing = f"{reader} is not installed (`pip install 'mlx-fish[verify]'`), so its files were not read back"
            if required:
                raise FishError(f"--verify: {missing}.")
            say(f"! {missing}")
    if not _has_peft() and not _installed("mlx-lm"):
        missing = "neither PEFT nor MLX is installed to compute the adapter model, so nothing was read back"
        if required:
            raise FishError(f"--verify: {missing}; run `pip install 'mlx-fish[verify]'`.")
        say(f"! {missing}")
        return []
    readable = [artifact for artifact, reader in readers.items() if _installed(reader)]
    if not readable:
        return []
    with tempfile.TemporaryDirectory(prefix="mlx-fish-verify-") as folder:
        check = Check(base, adapter, Path(folder))
        comparisons = []
        for artifact in readable:
            comparison = check.compare(artifact, readers[artifact])
            say(str(comparison))
            comparisons.append(comparison)
    faults = [f"{comparison.artifact.path}: {fault}" for comparison in comparisons for fault in comparison.faults]
    if faults:
        raise FishError(f"the exported files differ from the adapter model, do not use them: {'; '.join(faults)}.")
    return comparisons


class Check:
    """The reference answers of the adapter model, computed once, and the comparison of artifacts with them.

    Attributes:
        expected, base_logprobs: log-probabilities of the adapter model and of the base, (N, V).
        rows: token ids of each prompt with its answer.
        prompts: text and number of tokens of each prompt.
        positions: positions compared per row.
    """

    def __init__(
        self,
        base: ModelFolder,
        adapter: Adapter,
        folder: Path,
        ask: "Callable[[dict[str, Any], Path], dict[str, Any]] | None" = None,
    ):
        """Compute the reference answers.

        Args:
            folder: folder for temporary files.
            ask: sends a request to a reader and returns its answers; default: `ask_reader`.

        Raises:
            FishError: the adapter changes no answer of the base.
        """
        self.base, self.adapter, self.folder, self.ask = base, adapter, folder, ask or ask_reader
        self.values = plain_base(base)
        self.model = _model(base, adapter, self.values)
        self.vocab_size = int(self.values.config["vocab_size"])
        # For a large vocabulary, each of llama.cpp's answers is megabytes long.
        self.positions = 12 if self.vocab_size <= SMALL_VOCABULARY else 4
        reference = self._run(self._reference_reader(), path=str(self._reference_base()), adapter=str(adapter.path))
        self.expected, self.base_logprobs = reference["logprobs"], reference["base_logprobs"]
        self.rows, self.prompts = json.loads(str(reference["rows"])), json.loads(str(reference["prompts"]))
        if np.array_equal(self.expected, self.base_logprobs):
            raise FishError(f"the adapter {adapter.path} changes no answer of {base.name}; there is nothing to verify.")

    def compare(self, artifact: Artifact, reader: str) -> Comparison:
        """Read an artifact with `reader` and compare its answers with the reference."""
        path, adapter = artifact.path, artifact.adapter
        if artifact.kind == "mlx-adapter":
            path, adapter = self._reference_base(), artifact.path
        elif artifact.kind == "gguf-adapter":
            path, adapter = self._base_gguf(), artifact.path
        answers = self._run(reader, path=str(path), adapter=str(adapter) if adapter else None)
        logprobs = answers["logprobs"]
        return Comparison(
            artifact=artifact,
            reader=reader,
            difference=float(np.abs(logprobs - self.expected).max()),
            divergence=mean_kl(self.expected, logprobs),
            agreement=float((logprobs.argmax(-1) == self.expected.argmax(-1)).mean()),
            base_divergence=mean_kl(self.expected, self.base_logprobs),
            wrong=tuple(json.loads(str(answers["wrong"]))) if "wrong" in answers else (),
        )

    def _reference_reader(self) -> str:
        """Return the reader that computes the adapter model."""
        if not (self.adapter.path / WEIGHTS_FILE).is_file():
            return "mlx-lm-reference"
        return "peft" if not self.values.expanded and _has_peft() else "mlx-fish-reference"

    def _reference_base(self) -> Path:
        """Return the folder with the weights that were fused; a GGUF original is converted to one."""
        if self.values.path.is_dir():
            return self.values.path
        folder = self.folder / "original"
        if not folder.is_dir():
            convert(model=str(self.values.path), out=folder, dtype="float32")
        return folder

    def _run(self, reader: str, *, path: str, adapter: str | None) -> dict[str, Any]:
        """Return a reader's answers for a file or folder."""
        return self.ask(
            {
                "reader": reader,
                "path": path,
                "adapter": adapter,
                # mlx-lm reads only the older form of rope_theta. Exported folders contain it, but a base may not.
                "config": {"rope_theta": self.values.config.get("rope_theta")}
                if path == str(self._reference_base())
                else None,
                "tokenizer": str(self.model.tokenizer_folder),
                "template": self.model.own_template(),
                "bos": _bos(self.model.tokenizer_folder),
                "questions": QUESTIONS,
                "positions": self.positions,
                "vocab_size": self.vocab_size,
                "rows": getattr(self, "rows", None),
                "prompts": getattr(self, "prompts", None),
            },
            self.folder,
        )

    def _base_gguf(self) -> Path:
        """Write the base as a float32 GGUF file, which an adapter file needs, and return its path."""
        path = self.folder / "base.gguf"
        if not path.is_file():
            writer = GgufWriter(path, self.model, file_type="f32")
            for name in self.values.shapes:
                writer.put(name, self.values.read(name))
            writer.close()
        return path


def ask_reader(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a reader in its own process and return its answers.

    The exit code is ignored if there are answers, because some readers crash on exit.

    Raises:
        FishError: the reader wrote no answers.
    """
    out = folder / "answers.npz"
    out.unlink(missing_ok=True)
    process = subprocess.run(
        [sys.executable, "-m", "mlx_fish.export.verify.readers"],
        input=json.dumps({**request, "out": str(out)}),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if not out.is_file():
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise FishError(f"{request['reader']} cannot read {request['path']}: {reason}")
    with np.load(out) as stored:
        return dict(stored)


def mean_kl(expected: npt.NDArray[np.float32], actual: npt.NDArray[np.float32]) -> float:
    """Return the mean over rows of KL(expected || actual) in nats, from log-probabilities (N, V)."""
    p = expected.astype(np.float64)
    return float((np.exp(p) * (p - actual)).sum(axis=-1).mean())


def _model(base: ModelFolder, adapter: Adapter, values: PlainBase) -> MergedModel:
    """Return the metadata that rendering prompts and writing the base as GGUF need."""
    template = adapter.path / "chat_template.jinja"
    return MergedModel(
        shapes=values.shapes,
        config=values.config,
        generation_config=base.generation_config,
        tokenizer_folder=adapter.path if (adapter.path / "tokenizer.json").is_file() else base.path,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def _reader_of(artifact: Artifact) -> str:
    """Return the name of the program that reads an artifact."""
    if artifact.kind in ("gguf", "ollama", "gguf-adapter"):
        return "llama.cpp"
    if artifact.kind == "hf" and _installed("transformers"):
        return "transformers"
    return "mlx-lm"


def _installed(reader: str) -> bool:
    return importlib.util.find_spec(_NEEDS[reader]) is not None


def _has_peft() -> bool:
    return _installed("transformers") and _installed("peft")


def _bos(folder: Path) -> str:
    """Return the BOS token of a tokenizer folder; empty if it has none."""
    path = folder / "tokenizer_config.json"
    token = read_json(path).get("bos_token") if path.is_file() else None
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""
