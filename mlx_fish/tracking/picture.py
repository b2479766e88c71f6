"""Plot the loss curve of a run to `training_loss.png`."""

import io
from pathlib import Path

from mlx_fish.storage.files import write_bytes
from mlx_fish.tracking.course import RunMetrics
from mlx_fish.tracking.events import Event, Finished

LOSS_CURVE_FILE = "training_loss.png"


class LossCurve:
    """The sink that plots the losses in `metrics` when the run is complete."""

    def __init__(self, folder: Path, metrics: RunMetrics):
        self.folder = folder
        self.metrics = metrics

    def take(self, event: Event) -> None:
        if isinstance(event, Finished):
            draw(self.folder, self.metrics.losses, self.metrics.eval_losses)


def draw(folder: Path, losses: list[tuple[int, float]], eval_losses: list[tuple[int, float]]) -> Path:
    """Plot the training losses, their running mean and the validation losses to `folder/training_loss.png`.

    Args:
        losses, eval_losses: (step, loss in nats per supervised token).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    steps = [step for step, _ in losses]
    values = [loss for _, loss in losses]
    show_markers = len(steps) <= 20
    axes.plot(
        steps,
        values,
        color="#9ecae1",
        linewidth=1,
        marker="o" if show_markers else None,
        markersize=3,
        label="training, each update",
    )
    if not show_markers:
        axes.plot(
            steps,
            _running_mean(values, max(5, len(values) // 20)),
            color="#2171b5",
            linewidth=2,
            label="training, running mean",
        )
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), color="#d94801", marker="o", linewidth=1.5, label="validation")
        for step, loss in (eval_losses[0], eval_losses[-1]):
            axes.annotate(
                f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="optimizer updates", ylabel="loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    write_bytes(folder / LOSS_CURVE_FILE, png.getvalue())
    return folder / LOSS_CURVE_FILE


def _running_mean(values: list[float], width: int) -> list[float]:
    """Return the mean of the last `width` values at each position (fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means
