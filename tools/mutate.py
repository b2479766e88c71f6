"""Plant named faults one at a time in a copy of the project; each must turn its tests red.

    python tools/mutate.py               # every fault
    python tools/mutate.py --today 4     # four of them, other ones each day

Exits with 1 when a fault goes unnoticed.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# name, file, the code, the fault, the test module that should notice
FAULTS = [
    ("mask off by one", "data/batches.py", "row.supervised[1:])\n", "row.supervised[:-1])\n", "data/test_batches"),
    ("targets not shifted", "data/batches.py", "row.ids[1:][row_positions]", "row.ids[:-1][row_positions]", "data/test_batches"),
    ("owners of the wrong row", "data/batches.py", "index, np.int32)", "0, np.int32)", "backends/test_backends"),
    ("a row lost", "data/order.py", "-(-len(rows) // self.rows_per_update)", "len(rows) // self.rows_per_update", "data/test_batches"),
    ("largest not first", "data/order.py", "updates[0], updates[largest] = updates[largest], updates[0]", "pass", "data/test_batches"),
    ("id outside the vocabulary", "data/batches.py", "< vocab_size:", "< 10**9:", "backends/test_backends"),
    ("an epoch laid out to be counted", "data/order.py", "for micro in updates.micro_batches(step):", "for micro in updates[step] and updates.micro_batches(step):", "planning/test_plan"),
    ("torch planned by a CPU's pieces", "planning/outlook.py", "TORCH_POSITIONS[self.machine.device]", 'TORCH_POSITIONS["cpu"]', "planning/test_plan"),
    ("GPU 0 whatever is visible", "planning/machine.py", "--id={_visible_gpu()}", "--id=0", "planning/test_plan"),
    ("a validation promised away", "planning/plan.py", "if outlook.validation_fits():", "if True:", "planning/test_plan"),
    ("the run's rows forgotten", "evaluation/loss.py", 'data or settings["data"]', 'data or "fish_care"', "cli/test_cli"),
    ("the base asked after training", "training/loop.py", '"before" in state', 'state.get("before")', "runs/test_resume"),
    ("data of another folder", "runs/resume.py", 'None if settings.get("data") is not None else data_path(point.record)', "None", "runs/test_resume"),
    ("half a character shown", "data/templates/template.py", '.rstrip("\ufffd")', "", "data/test_template"),
    ("end token unsupervised", "data/templates/template.py", "(answer + end, True)", "(answer, True), (end, False)", "data/test_template"),
    ("a cut row called whole", "data/templates/template.py", "len(ids) > max_length", "False", "data/test_template"),
    ("a document's end lost", "data/templates/template.py", "*self._encode(text), self.end_token_id]", "*self._encode(text)]", "objectives/test_pt"),
    ("a token between two rows lost", "objectives/pt.py", "max_length - 1)", "max_length)", "objectives/test_pt"),
    ("mean of means", "backends/mlx/step.py", "np.float32(num_supervised)", "np.float32(batch.num_supervised)", "backends/test_backends"),
    ("missing transpose", "backends/mlx/lora.py", "x.shape[-1]) @ self.lora_a.T", "x.shape[-1]) @ self.lora_a.reshape(x.shape[-1], -1)", "backends/test_backends"),
    ("scale left out", "backends/mlx/lora.py", "alpha=self.scale", "alpha=1.0", "backends/test_backends"),
    ("no bias correction", "backends/mlx/step.py", "(1 - BETA1**step)", "1.0", "backends/test_backends"),
    ("no clipping", "backends/mlx/step.py", "mx.minimum(MAX_NORM / (norm + 1e-6), 1.0)", "1.0", "backends/test_backends"),
    ("poisoned update", "backends/mlx/step.py", "mx.where(good, new_flat, flat)", "new_flat", "backends/test_backends"),
    ("rows see each other", "backends/mlx/step.py", "hidden = block(hidden, rows)", 'hidden = block(hidden, "causal")', "backends/test_backends"),
    ("a row's end misplaced", "backends/mlx/attention.py", "_take(cotangent, slots)", "_take(cotangent, slots - 1)", "backends/test_backends"),
    ("Metal: a row's end misplaced", "backends/mlx/attention.py", "return _take(out, layout[1]) if layout else out\n\n\n@_fused", "return _take(out, layout[1] - 1) if layout else out\n\n\n@_fused", "backends/test_mlx_attention"),
    ("CUDA: a row's end misplaced", "backends/mlx/attention.py", "return _take(cotangent, grid.reshape(-1))", "return _take(cotangent, grid.reshape(-1) - 1)", "backends/test_mlx_attention"),
    ("an adapter left in the base", "backends/mlx/step.py", "            self.layers.unbind()  # generate()", "            pass  # generate()", "backends/test_backends"),
    ("the last key unseen", "backends/mlx/attention.py", "mx.arange(stop)[None] >", "mx.arange(stop)[None] >=", "backends/test_backends"),
    ("sum not rescaled", "backends/mlx/loss.py", "running_sum = running_sum * decay +", "running_sum = running_sum +", "backends/test_mlx_loss"),
    ("the target inside the maximum", "backends/mlx/loss.py", "mx.maximum(running_max, other_logits.max(", "mx.maximum(running_max, logits.max(", "backends/test_loss_truth"),
    ("one key for all tokens", "backends/mlx/generate.py", "key, sample_key = mx.random.split(key)", "sample_key = key", "backends/test_mlx_backend"),
    ("torch: rows see each other", "backends/torch/step.py", "(owners[:, None] == owners) &", "", "backends/test_backends"),
    ("torch: weights as marks", "backends/torch/step.py", "weights=weights[in_piece],", "weights=np.ones(in_piece.sum(), np.float32),", "backends/test_backends"),
    ("torch: no clipping", "backends/torch/step.py", "self.layers.master, MAX_NORM", "self.layers.master, 1e9", "backends/test_backends"),
    ("torch: poisoned update", "backends/torch/step.py", "if updated:", "if loss is not None:", "backends/test_backends"),
    ("torch: a read for every piece", "backends/torch/step.py", "loss.detach().double()", "loss.item()", "backends/test_torch_backend"),
    ("torch: scale left out", "backends/torch/lora.py", "= layer_spec.scale", "= 1.0", "backends/test_backends"),
    ("torch: moments lost", "backends/torch/step.py", "[self.layers.master] = state", "[self.layers.master] = {}", "backends/test_backends"),
    ("torch: sum not rescaled", "backends/torch/loss.py", "weighted_rows.mul_(decay).add_", "weighted_rows.add_", "backends/test_torch_backend"),
    ("torch: an exact target among rounded ones", "backends/torch/loss.py", "chunk_target_logit = logits.gather(1, columns)", "chunk_target_logit = (hidden.float() * weight[targets[:, 0]].float()).sum(-1, keepdim=True)", "backends/test_loss_truth"),
    ("torch: gradient of A not scaled", "backends/torch/products.py", "(gradient @ b).mul_(ctx.scale)", "gradient @ b", "backends/test_torch_backend"),
    ("torch: adapter left out of dx", "backends/torch/products.py", ".addmm_(narrow_gradient, a).view", ".view", "backends/test_torch_backend"),
    ("torch: a piece cut short", "backends/torch/step.py", "columns + 1)", "columns)", "backends/test_torch_backend"),
    ("rsLoRA as LoRA", "adapters/spec.py", "alpha / math.sqrt(rank)", "alpha / rank", "adapters/test_spec"),
    ("rsLoRA not folded", "adapters/peft.py", "alpha=alpha) * rank", "alpha=alpha) * 1", "adapters/test_spec"),
    ("moments forgotten", "training/train.py", "backend.restore_optimizer(checkpoint.optimizer, checkpoint.step)", "pass", "runs/test_resume"),
    ("log not cut", "tracking/jsonl.py", "splitlines(keepends=True)[:count]", "splitlines(keepends=True)", "runs/test_resume"),
    ("damage unseen", "runs/checkpoint.py", "if _sha256(checkpoint / name) != digest:", "if False:", "runs/test_resume"),
    ("fish in every card", "runs/card.py", 'find("data", "warning", dict) or {}', '{"en": "Check every dose of a medicine."}', "runs/test_card"),
    ("not flushed", "storage/files.py", "            os.fsync(file.fileno())\n        os.replace", "        os.replace", "runs/test_crash"),
    ("written in place", "storage/files.py", 'with open(temporary, "wb") as file:', 'with open(path, "wb") as file:', "runs/test_crash"),
    ("values changed while they are cast", "storage/tensors.py", "stored = array.astype(", "stored = (array * np.float32(0.999)).astype(", "export/test_fuse"),
    ("second signal unheard", "signals.py", "if num_signals == 2:", "if num_signals == 3:", "training/test_signals"),
    ("merge not scaled", "adapters/merge.py", "np.float32(adapter.spec.layers[module].scale)", "np.float32(1)", "export/test_fuse"),
    ("a library that others can write", "backends/blas.py", "or status.st_mode & 0o022", "", "backends/test_blas"),
]  # fmt: skip


def todays(count: int) -> list[tuple[str, ...]]:
    """`count` faults; in some weeks every one has been planted."""
    start = datetime.date.today().toordinal() * count
    return [FAULTS[(start + number) % len(FAULTS)] for number in range(min(count, len(FAULTS)))]


def noticed(file: str, old: str, new: str, test: str) -> bool:
    """Run one test file against the planted fault, in a copy."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("mlx_fish", "tests", "data", "tools", "benchmarks", "scripts"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--today", type=int, metavar="N", help="plant N faults, other ones each day")
    parser.add_argument("--only", default="", metavar="TEXT", help="plant those whose name holds the text")
    arguments = parser.parse_args()
    faults = todays(arguments.today) if arguments.today else [fault for fault in FAULTS if arguments.only in fault[0]]
    missed = []
    for name, *fault in faults:
        red = noticed(*fault)
        print(f"{'red     ' if red else 'UNNOTICED'} {name}", flush=True)
        missed += [] if red else [name]
    print(f"{len(faults) - len(missed)} of {len(faults)} faults noticed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
