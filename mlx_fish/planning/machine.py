"""What a machine can hold and how fast it computes: this one, and the Mac minis that mlx-fish is made for. Imports no framework.

Metal lets a program use part of the memory (its recommended working set); beyond that the system swaps or ends the process, and
there is no error to catch. So a plan leaves a share of it free.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import numpy as np

from mlx_fish.backends.limits import USABLE_MEMORY

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """A computer, and what of it a training run may use.

    Attributes:
        memory: bytes of RAM, None where it is not known.
        device: what computes: a processor, Apple's GPU (which shares the memory), or NVIDIA's (then its memory is meant).
        flops: float operations a second in a matrix product, None where unknown.
        bandwidth: bytes a second from memory, None where unknown.
    """

    name: str
    memory: int | None
    device: Literal["cpu", "metal", "cuda"]
    flops: float | None = None
    bandwidth: float | None = None

    @property
    def working_set(self) -> int | None:
        """Bytes that a program may hold. Metal recommends two thirds of up to 32 GiB, three quarters of more."""
        if self.memory is None or self.device != "metal":
            return self.memory
        return self.memory * 2 // 3 if self.memory <= 32 * GIB else self.memory * 3 // 4

    @property
    def usable(self) -> int | None:
        """Bytes that a plan lets a run use."""
        return None if self.working_set is None else int(USABLE_MEMORY * self.working_set)


# Apple's figure for the bandwidth; matrix products were measured at 2.7 to 2.9 TFLOPS, float16 no faster than float32.
M4_FLOPS, M4_BANDWIDTH = 2.8e12, 120e9
MAC_MINIS = tuple(
    Machine(f"Mac mini M4 {size} GB", size * GIB, "metal", M4_FLOPS, M4_BANDWIDTH) for size in (16, 24, 32)
)


def this_machine(backend: str) -> Machine:
    """The machine that runs this, as far as a backend (`mlx` or `torch`) would compute on it."""
    if _has_cuda(backend):
        return _nvidia()
    memory, chip = memory_of_this_machine(), _chip()
    if sys.platform == "darwin" and platform.machine() == "arm64":
        known = chip == "Apple M4"
        return Machine(chip, memory, "metal", M4_FLOPS if known else None, M4_BANDWIDTH if known else None)
    return Machine(chip, memory, "cpu", *_speed())


def memory_of_this_machine() -> int | None:
    """Bytes of RAM, or what a container may have of it; None where the system does not say."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().total)
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return min([installed, *_container_limits()]) if installed > 0 else None


def _container_limits() -> list[int]:
    places = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    texts = [Path(place).read_text(encoding="ascii").strip() for place in places if Path(place).is_file()]
    return [int(text) for text in texts if text.isdigit() and int(text) > 0]


def _visible_gpu() -> str | None:
    """The GPU that a process would take, as nvidia-smi calls it (an index or a UUID); None where CUDA_VISIBLE_DEVICES hides all.

    Where GPUs of several kinds are mixed, CUDA counts the fastest first and nvidia-smi by slot, unless CUDA_DEVICE_ORDER says
    PCI_BUS_ID; then an index may be that of another one.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return "0"
    first = visible.split(",")[0].strip()
    return first if first.isdigit() or first.startswith(("GPU-", "MIG-")) else None


def _has_cuda(backend: str) -> bool:
    """Whether the framework installed was built for CUDA, a driver is there, and a GPU is visible. Imports no framework."""
    if shutil.which("nvidia-smi") is None or _visible_gpu() is None:
        return False
    installed = {found.name.lower(): found.version for found in distributions()}
    if backend == "mlx":
        return any(name.startswith("mlx-cuda") for name in installed)
    return not installed.get("torch", "+cpu").endswith("+cpu")


def _nvidia() -> Machine:
    """The first visible GPU; its memory is None if the driver does not say."""
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits", f"--id={_visible_gpu()}"],
        capture_output=True,
        text=True,
        check=False,
    )
    name, _, size = asked.stdout.strip().rpartition(",")
    return Machine(name or "NVIDIA GPU", int(size) << 20 if size.strip().isdigit() else None, "cuda")


def _chip() -> str:
    """The processor's name, such as `Apple M4`."""
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _speed() -> tuple[float, float]:
    """(operations a second in a float32 product, bytes a second of a copy), measured with NumPy in some tens of milliseconds."""
    left = np.ones((768, 768), np.float32)
    source = np.ones(1 << 23, np.float32)
    target = np.empty_like(source)
    product = _best(lambda: left @ left)
    copy = _best(lambda: np.copyto(target, source))
    return 2 * 768**3 / product, 2 * source.nbytes / copy


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def parse_memory(text: str) -> int:
    """`16GB` -> bytes. A machine's memory is sold in units of 1024, so that is what GB means here.

    Raises:
        ValueError: it is no such size.
    """
    digits = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = {"M": 1 << 20, "G": GIB, "T": 1 << 40}.get(digits[-1:])
    if factor is None:
        raise ValueError(text)
    size = float(digits[:-1]) * factor
    if not 0 < size < float("inf"):
        raise ValueError(text)
    return int(size)
