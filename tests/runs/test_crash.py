"""A run killed at every single touch of the disk: opening, writing (half of it done), flushing, renaming, removing.

After each death the adapter at the top of the folder is whole and one that the run really had, and the resumed run ends equal to
the bit. The backend is NumPy, so that hundreds of runs take seconds; `test_resume.py` does the same with the real one.
"""

import gc
import shutil

import pytest
from crashing import EXIT_CODE, Touches
from numpy_backend import NumpyBackend
from rotation import rotating
from runs import SMALL, in_child, outcome, resume, train, write_rows

from mlx_fish.adapters.peft import WEIGHTS_FILE, load_adapter
from mlx_fish.runs.checkpoint import checkpoints, newest_valid
from mlx_fish.runs.folder import RUN_FILE
from mlx_fish.storage.files import write_bytes
from mlx_fish.tracking import picture

pytestmark = pytest.mark.slow
PARTS = 4  # a day tests a quarter of the crash points


@pytest.fixture(scope="module", autouse=True)
def quick_picture():
    """Drawing is half of such a run's time, and only its last write matters here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            picture, "draw", lambda folder, losses, eval_losses: write_bytes(folder / "training_loss.png", b"PNG" * 9)
        )
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """The folder of a run that nothing disturbed, its settings, and the weights it had at each of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    gc.freeze()  # so that a fork does not copy every page that the collector looks at
    settings = {**SMALL, "data": str(write_rows(folder / "rows.jsonl"))}
    train(NumpyBackend(), **settings, output_dir=str(folder / "run"))
    train(NumpyBackend(), **settings, output_dir=str(folder / "all"), keep=99)
    return (
        folder,
        settings,
        {(path / WEIGHTS_FILE).read_bytes() for path in checkpoints(folder / "all" / "checkpoints")},
    )


def killed(output, settings, number, work=train):
    """Run until touch `number`; the touches counted when it was not reached."""
    report = output.parent / "count"

    def child():
        touches = Touches(output, number)
        touches.install()
        work(NumpyBackend(), **settings, output_dir=str(output))
        report.write_text(f"{touches.count}\n" + "\n".join(touches.unflushed_renames))

    code = in_child(child, output.parent / "stderr")
    assert code in (0, EXIT_CODE), (output.parent / "stderr").read_text()
    return None if code else report.read_text().splitlines()


def check_top(output, possible):
    if (output / WEIGHTS_FILE).exists():
        load_adapter(output)
        assert (output / WEIGHTS_FILE).read_bytes() in possible


def test_killed_at_every_touch_of_the_disk(whole, tmp_path):
    folder, settings, possible = whole
    expected = outcome(folder / "run")
    (count, *unflushed) = killed(tmp_path / "counted", settings, 0)
    assert not unflushed, "renamed before it was flushed"
    assert int(count) > 150
    for number in rotating(range(1, int(count) + 1), PARTS):
        output = tmp_path / "run"
        assert killed(output, settings, number) is None, number
        check_top(output, possible)
        again = resume if (output / RUN_FILE).exists() else train
        kept = {} if again is resume else settings
        assert in_child(lambda: again(NumpyBackend(), **kept, output_dir=str(output)), tmp_path / "stderr") == 0, (  # noqa: B023
            number,
            (tmp_path / "stderr").read_text(),
        )
        assert outcome(output) == expected, number
        assert not list(output.rglob(".*")), "leftovers"
        shutil.rmtree(output)


def test_killed_at_every_touch_of_a_resumed_run(whole, tmp_path):
    """From a folder whose newest checkpoint is damaged: also while that one is replaced."""
    folder, _, possible = whole
    expected = outcome(folder / "run")
    start = tmp_path / "start"
    shutil.copytree(folder / "run", start)
    damaged = checkpoints(start / "checkpoints")[-1]
    (damaged / "manifest.json").unlink()
    (start / WEIGHTS_FILE).write_bytes((newest_valid(start / "checkpoints") / WEIGHTS_FILE).read_bytes())
    shutil.copytree(start, tmp_path / "counted")
    (count, *unflushed) = killed(tmp_path / "counted", {}, 0, resume)
    assert not unflushed
    for number in rotating(range(1, int(count) + 1), PARTS):
        output = tmp_path / "run"
        shutil.copytree(start, output)
        assert killed(output, {}, number, resume) is None, number
        check_top(output, possible)
        assert newest_valid(output / "checkpoints"), number
        assert in_child(lambda: resume(NumpyBackend(), output_dir=str(output))) == 0, number  # noqa: B023
        assert outcome(output) == expected, number
        shutil.rmtree(output)


def test_killed_at_every_touch_of_an_overwriting_run(whole, tmp_path):
    """What is left is always known as a run, so that it can be overwritten or resumed; an old adapter never mixes with a new one."""
    folder, settings, possible = whole
    changed = {**settings, "seed": 7, "overwrite": True}
    train(NumpyBackend(), **changed, output_dir=str(tmp_path / "all"), keep=99)
    possible = possible | {(path / WEIGHTS_FILE).read_bytes() for path in checkpoints(tmp_path / "all" / "checkpoints")}
    shutil.copytree(folder / "run", tmp_path / "counted")
    (count, *_) = killed(tmp_path / "counted", changed, 0)
    expected = outcome(tmp_path / "counted")
    for number in rotating(range(1, 60), PARTS):
        assert number < int(count)
        output = tmp_path / "run"
        shutil.copytree(folder / "run", output)
        assert killed(output, changed, number) is None, number
        check_top(output, possible)
        code = in_child(lambda: train(NumpyBackend(), **changed, output_dir=str(output)), tmp_path / "stderr")  # noqa: B023
        assert code == 0, (number, (tmp_path / "stderr").read_text())
        assert outcome(output) == expected, number
        shutil.rmtree(output)
