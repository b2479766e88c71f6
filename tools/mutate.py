"""Plant named faults one at a time in a copy of the project; each must turn its tests red.

    python tools/mutate.py

Exits with 1 when a fault goes unnoticed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# name, file, what stands there, the fault, the tests that should notice
FAULTS = [
    ("mask off by one", "batches.py", "row.supervised[1:])\n", "row.supervised[:-1])\n", "test_batches"),
    ("targets not shifted", "batches.py", "row.ids[1:][labelled]", "row.ids[:-1][labelled]", "test_batches"),
    ("a row lost", "batches.py", "-(-len(rows) // self.rows_per_update)", "len(rows) // self.rows_per_update", "test_batches"),
    ("largest not first", "batches.py", "updates[0], updates[largest] = updates[largest], updates[0]", "pass", "test_batches"),
    ("id outside the vocabulary", "batches.py", "if not 0 <= wrong < vocab_size:", "if False:", "test_backends"),
    ("a validation promised away", "plan.py", "if outlook.validation_fits():", "if True:", "test_plan"),
    ("the run's rows forgotten", "evaluate.py", 'data or settings["data"]', "data", "test_cli"),
    ("half a character shown", "template.py", '.rstrip("�")', "", "test_template"),
    ("end token unsupervised", "template.py", "(answer + end, True)", "(answer, True), (end, False)", "test_template"),
    ("a cut row called whole", "template.py", "len(ids) > max_length", "False", "test_template"),
    ("mean of means", "backends/mlx/step.py", "np.float32(num_supervised)", "np.float32(batch.num_supervised)", "test_backends"),
    ("missing transpose", "backends/mlx/lora.py", "x.shape[-1]) @ self.lora_a.T", "x.shape[-1]) @ self.lora_a.reshape(x.shape[-1], -1)", "test_backends"),
    ("scale left out", "backends/mlx/lora.py", "alpha=self.scale", "alpha=1.0", "test_backends"),
    ("no bias correction", "backends/mlx/step.py", "(1 - BETA1**step)", "1.0", "test_backends"),
    ("no clipping", "backends/mlx/step.py", "mx.minimum(MAX_NORM / (norm + 1e-6), 1.0)", "1.0", "test_backends"),
    ("poisoned update", "backends/mlx/step.py", "mx.where(good, new_flat, flat)", "new_flat", "test_backends"),
    ("rows see each other", "backends/mlx/step.py", "hidden = block(hidden, rows)", 'hidden = block(hidden, "causal")', "test_backends"),
    ("a row's end misplaced", "backends/mlx/attention.py", "_take(cotangent, slots)", "_take(cotangent, slots - 1)", "test_backends"),
    ("Metal: a row's end misplaced", "backends/mlx/attention.py", "return _take(out, layout[1]) if layout else out\n\n\n@_fused", "return _take(out, layout[1] - 1) if layout else out\n\n\n@_fused", "test_mlx_attention"),
    ("CUDA: a row's end misplaced", "backends/mlx/attention.py", "return _take(cotangent, grid.reshape(-1))", "return _take(cotangent, grid.reshape(-1) - 1)", "test_mlx_attention"),
    ("an adapter left in the base", "backends/mlx/step.py", "            self.layers.unbind()  # generate()", "            pass  # generate()", "test_backends"),
    ("the last key unseen", "backends/mlx/attention.py", "mx.arange(stop)[None] >", "mx.arange(stop)[None] >=", "test_backends"),
    ("torch: rows see each other", "backends/torch/step.py", "(owners[:, None] == owners) &", "", "test_backends"),
    ("sum not rescaled", "backends/mlx/loss.py", "total = total * decay +", "total = total +", "test_mlx_loss"),
    ("torch: mean of means", "backends/torch/step.py", "piece) / num_supervised", "piece) / batch.num_supervised", "test_backends"),
    ("torch: no clipping", "backends/torch/step.py", "self.layers.master, MAX_NORM", "self.layers.master, 1e9", "test_backends"),
    ("torch: poisoned update", "backends/torch/step.py", "if updated:", "if loss is not None:", "test_backends"),
    ("torch: scale left out", "backends/torch/lora.py", "= self.spec.scales[module]", "= 1.0", "test_backends"),
    ("torch: moments lost", "backends/torch/step.py", "[self.layers.master] = state", "[self.layers.master] = {}", "test_backends"),
    ("torch: sum not rescaled", "backends/torch/loss.py", "blend.mul_(decay).add_", "blend.add_", "test_torch_backend"),
    ("torch: gradient of A not scaled", "backends/torch/products.py", "(gradient @ b).mul_(ctx.scale)", "gradient @ b", "test_torch_backend"),
    ("torch: adapter left out of dx", "backends/torch/products.py", ".addmm_(narrow_gradient, a).view", ".view", "test_torch_backend"),
    ("torch: a piece cut short", "backends/torch/step.py", "columns + 1)", "columns)", "test_torch_backend"),
    ("moments forgotten", "train.py", "backend.restore_optimizer(checkpoint.optimizer, checkpoint.step)", "pass", "test_resume"),
    ("log not cut", "report.py", "splitlines(keepends=True)[:count]", "splitlines(keepends=True)", "test_resume"),
    ("damage unseen", "checkpoint.py", "if _sha256(checkpoint / name) != digest:", "if False:", "test_resume"),
    ("not flushed", "files.py", "            os.fsync(file.fileno())\n", "", "test_crash"),
    ("written in place", "files.py", 'with open(beside, "wb") as file:', 'with open(path, "wb") as file:', "test_crash"),
    ("second signal unheard", "signals.py", "if came == 2:", "if came == 3:", "test_signals"),
    ("merge not scaled", "adapter.py", "product *= np.float32(adapter.spec.scales[module])", "product *= np.float32(1)", "test_fuse"),
]  # fmt: skip


def noticed(file: str, old: str, new: str, test: str) -> bool:
    """Run one test file against the planted fault, in a copy."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("mlx_fish", "tests", "data"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / "mlx_fish" / file
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{file} holds {old!r} {text.count(old)} times; the list of faults is out of date")
        path.write_text(text.replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{test}.py"]
        done = subprocess.run(command, cwd=copy, env=_environment(copy), capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"the tests could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1


def _environment(copy: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}


def main() -> None:
    missed = []
    for name, *fault in FAULTS:
        red = noticed(*fault)
        print(f"{'red     ' if red else 'UNNOTICED'} {name}", flush=True)
        missed += [] if red else [name]
    print(f"{len(FAULTS) - len(missed)} of {len(FAULTS)} faults noticed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
