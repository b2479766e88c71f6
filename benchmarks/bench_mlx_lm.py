"""mlx-lm's own tuner on `bench.py`'s task: its LoRA layers, loss, padding, compiled step and loop, called as its `lora` command does.

Three things are set so that it computes what mlx-fish computes, and none of them makes it slower by more than a few additions:

- Adam with bias correction, and gradients clipped to norm 1 (mlx-lm has neither by default).
- LoRA's A starts from the same numbers.
- Its loss mask reaches one token too far (it learns to predict a pad after every answer). Each row is handed over as one token
  shorter, so that the mask ends at the answer's end token; what is computed stays the same.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_task import DEFAULTS, MAX_LENGTH, WARM_UPDATES, Report, Task

from mlx_fish.adapters.spec import tensor_key
from mlx_fish.data.tokens import Tokens
from mlx_fish.models.folder import ModelFolder

MASKED_TOO_FAR = 1  # the tokens by which mlx-lm's mask passes a row's end
Batches = Iterator[tuple[Any, Any]]  # (rows, padded length) ids and (rows, 2) of (first supervised, length)


def run_mlx_lm(task: Task, report: Report) -> None:
    """Its own batching: after the warm updates, rows in the order of the file, whole batches shuffled."""
    met = {row.where for step in range(WARM_UPDATES) for row in task.rows_of(step)}
    rest = [row for row in task.rows if row.where not in met]

    def batches() -> Batches:
        for step in range(WARM_UPDATES):
            yield padded(task.rows_of(step))
        yield from own_batches(rest, task.updates.rows_per_update, DEFAULTS.seed)

    tune(task, report, batches)


def run_mlx_lm_ours(task: Task, report: Report) -> None:
    """The rows of mlx-fish's updates together; the padding is still mlx-lm's."""

    def batches() -> Batches:
        for step in range(task.updates.per_epoch):
            yield padded(task.rows_of(step))

    tune(task, report, batches)


def tune(task: Task, report: Report, batches: Callable[[], Batches]) -> None:
    """Train over `batches` with mlx-lm's loop, reporting each update."""
    memory, model = load(task)
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train

    import mlx_fish.backends.mlx.runtime as runtime

    class ClippedAdam(optim.AdamW):  # type: ignore[misc]
        def update(self, model: Any, gradients: Any) -> None:
            clipped, _ = optim.clip_grad_norm(gradients, 1.0)
            super().update(model, clipped)

    sizes: list[tuple[int, int]] = []

    def iterate(**named: Any) -> Batches:
        for ids, spans in batches():
            rows, length = ids.shape
            sizes.append((int(spans[:, 1].sum()) - rows, rows * (length - 1)))
            yield ids, spans - mx.array([0, MASKED_TOO_FAR])

    class Reporter(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            tokens, computed = sizes[info["iteration"] - 1]
            report("update", loss=info["train_loss"], tokens=tokens, computed=computed)

    dtype = str(model.model.norm.weight.dtype).removeprefix("mlx.core.")
    report("loaded", wait=True, device="gpu" if runtime.on_gpu else "cpu", dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            iters=task.updates.per_epoch,
            steps_per_report=1,
            steps_per_save=task.updates.per_epoch + 1,
            max_seq_length=MAX_LENGTH + 32,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=task.grad_checkpoint,
        )
        adam = ClippedAdam(DEFAULTS.learning_rate, [0.9, 0.999], 1e-8, weight_decay=0.0, bias_correction=True)
        train(model, adam, None, args=arguments, iterate_batches=iterate, training_callback=Reporter())
    report("done", wait=True, memory=memory.above_weights())


class MlxMemory:
    """MLX's own count of bytes: the peak above what is held now. To be made when the weights are there and nothing else is."""

    def __init__(self) -> None:
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()
        self._held = mx.get_active_memory()

    def above_weights(self) -> int:
        import mlx.core as mx

        return int(mx.get_peak_memory()) - int(self._held)


def load(task: Task) -> tuple[MlxMemory, Any]:
    """mlx-lm's model with its LoRA layers, and the memory that its weights took."""
    model = load_plain(task.folder)
    memory = MlxMemory()
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    layer = next(iter(task.spec.layers.values()))
    rank, scale = layer.rank, layer.scale
    linear_to_lora_layers(model, len(model.layers), {"rank": rank, "scale": scale, "dropout": 0.0})
    initial = task.initial
    start = {f"{module}.lora_a": initial[tensor_key(module, "lora_A")].T for module in task.spec.layers}
    start |= {f"{module}.lora_b": initial[tensor_key(module, "lora_B")].T for module in task.spec.layers}
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trainable == set(start), trainable ^ set(start)
    model.load_weights([(name, mx.array(values)) for name, values in start.items()], strict=False)
    mx.eval(model.parameters())
    return memory, model


def load_plain(folder: ModelFolder) -> Any:
    """mlx-lm's model in the dtype that mlx-fish computes in."""
    import mlx_fish.backends.mlx.runtime as runtime  # isort: skip
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import load_model

    model, _ = load_model(folder.path, lazy=True, model_config=folder.config)
    if not runtime.on_gpu:  # half precision crawls on a CPU
        halves = (mx.bfloat16, mx.float16)
        model.update(tree_map(lambda x: x.astype(mx.float32) if x.dtype in halves else x, model.parameters()))
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    return model


def padded(rows: Sequence[Tokens]) -> tuple[Any, Any]:
    """One batch of these rows, padded by mlx-lm."""
    return next(own_batches(rows, len(rows), seed=None))


def own_batches(rows: Sequence[Tokens], batch_size: int, seed: int | None) -> Batches:
    """mlx-lm's batches of a data set, for ever when it shuffles (a seed is given)."""
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    batches: Batches = iterate_batches(
        CacheDataset(Rows(rows)), batch_size, MAX_LENGTH + 32, loop=seed is not None, seed=seed
    )
    return batches


class Rows:
    """A data set as mlx-lm's own are: items are dictionaries (whose number of keys its sort takes for the length), `process`
    makes (ids, prompt length) of one, as with --mask-prompt."""

    def __init__(self, rows: Sequence[Tokens]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tokens]:
        return {"row": self._rows[index]}

    def process(self, item: dict[str, Tokens]) -> tuple[list[int], int]:
        row = item["row"]
        prompt = len(row.ids) - row.num_supervised
        assert row.supervised[prompt:].all(), f"{row.where}: mlx-lm masks a prompt, and no part of an answer"
        return row.ids.tolist(), prompt
