"""The loss curve of a run as `training_loss.png`."""

import io
from pathlib import Path

from mlx_fish.storage.files import write_bytes
from mlx_fish.tracking.course import Course
from mlx_fish.tracking.events import Event, Finished

PICTURE = "training_loss.png"


class Picture:
    """The sink that draws the curve of `course` when the run is finished."""

    def __init__(self, folder: Path, course: Course):
        self.folder = folder
        self.course = course

    def take(self, event: Event) -> None:
        if isinstance(event, Finished):
            draw(self.folder, self.course.losses, self.course.eval_losses)


def draw(folder: Path, losses: list[tuple[int, float]], eval_losses: list[tuple[int, float]]) -> Path:
    """Save the loss curve as `training_loss.png`: each update, a running mean, and the validations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=140, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    steps = [step for step, _ in losses]
    values = [loss for _, loss in losses]
    few = len(steps) <= 20
    axes.plot(
        steps,
        values,
        color="#9ecae1",
        linewidth=1,
        marker="o" if few else None,
        markersize=3,
        label="training, each update",
    )
    if not few:
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
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_bytes(folder / PICTURE, picture.getvalue())
    return folder / PICTURE


def _running_mean(values: list[float], width: int) -> list[float]:
    means = []
    for at in range(len(values)):
        near = values[max(0, at - width + 1) : at + 1]
        means.append(sum(near) / len(near))
    return means
