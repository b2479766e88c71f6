"""What several tests share. torch is imported before OpenBLAS is loaded, and OpenBLAS before anything imports mlx."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers: one thread each, or they wait for each other's
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")

import pytest
import torch  # noqa: F401  (bound to its own BLAS: with OpenBLAS's threads beside its own it crawls)

from mlx_fish.backends.blas import load_openblas

load_openblas()

# A shell's background job ignores SIGINT, `nohup` SIGHUP, and so would every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


BACKENDS = ("mlx", "torch")
_ran = dict.fromkeys(BACKENDS, 0)


@pytest.fixture(scope="module", params=BACKENDS)
def backend_name(request):
    """Each backend in turn, chosen as a person does, for this process and for those that a test starts."""
    from mlx_fish.backends.choose import VARIABLE, choose_backend
    from mlx_fish.errors import FishError

    try:
        choose_backend(request.param)
    except FishError as error:
        pytest.skip(str(error))  # counted below: --each-backend fails when a backend ran none
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, request.param)
        yield request.param


def pytest_collection_modifyitems(items):
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("process", "slow")):
            item.add_marker("unit")


def pytest_addoption(parser):
    parser.addoption("--each-backend", action="store_true", help="fail unless tests ran on every backend")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    name = getattr(item, "callspec", None) and item.callspec.params.get("backend_name")
    if name and report.when == "call" and report.outcome != "skipped":
        report.user_properties.append(("backend", name))  # the way to the process that counts, with several workers
    return report


def pytest_runtest_logreport(report):
    for key, name in report.user_properties if report.when == "call" else ():
        if key == "backend":
            _ran[name] += 1


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("tests run " + ", ".join(f"on {name}: {count}" for name, count in _ran.items()))


def pytest_sessionfinish(session, exitstatus):
    is_worker = hasattr(session.config, "workerinput")
    if session.config.getoption("--each-backend") and not is_worker and not all(_ran.values()) and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def tiny():
    """The built-in model's folder."""
    from mlx_fish.models.hub import find_model

    return find_model("tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from mlx_fish.data.templates.tokenizer import load_tokenizer

    return load_tokenizer(tiny)


@pytest.fixture(scope="session")
def real_model():
    """A real 0.5B model's folder, named by MLX_FISH_TEST_MODEL."""
    from mlx_fish.models.hub import find_model

    path = os.environ.get("MLX_FISH_TEST_MODEL")
    if not path:
        pytest.skip("MLX_FISH_TEST_MODEL names no model")
    return find_model(path)


@pytest.fixture(params=["qwen2", "llama"])
def pair(request, tmp_path):
    """A random model of each architecture, and an adapter on it."""
    from fuse_models import make_adapter, make_model

    base = make_model(tmp_path / "base", request.param, tied=request.param == "qwen2")
    return base, make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def qwen(tmp_path):
    """A random tied qwen2 model, and an adapter on it."""
    from fuse_models import make_adapter, make_model

    base = make_model(tmp_path / "base", "qwen2", tied=True)
    return base, make_adapter(tmp_path / "adapter", base)
