"""Describe the memory and speed of this machine and of the Mac minis that mlx-fish is made for.

Imports no framework.

Metal lets a program use part of the memory (its recommended working set). Beyond that, the system swaps or
kills the process, and there is no error to catch, so a plan leaves a share of the working set free.
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
    """A machine as the planner sees it.

    Attributes:
        memory: bytes of RAM, or of GPU memory for `cuda`; None if unknown.
        device: the CPU, Apple's GPU (which shares the RAM) or an NVIDIA GPU.
        flops: floating-point operations per second in a matrix product; None if unknown.
        bandwidth: memory bandwidth, bytes per second; None if unknown.
    """

    name: str
    memory: int | None
    device: Literal["cpu", "metal", "cuda"]
    flops: float | None = None
    bandwidth: float | None = None

    @property
    def working_set(self) -> int | None:
        """Bytes that a program may hold; None if unknown.

        Metal recommends two thirds of the memory up to 32 GiB, and three quarters above.
        """
        if self.memory is None or self.device != "metal":
            return self.memory
        return self.memory * 2 // 3 if self.memory <= 32 * GIB else self.memory * 3 // 4

    @property
    def usable(self) -> int | None:
        """Bytes that a plan allows a run to use; None if unknown."""
        return None if self.working_set is None else int(USABLE_MEMORY * self.working_set)


# Bandwidth as published by Apple. Matrix products were measured at 2.7 to 2.9 TFLOP/s, float16 no faster than
# float32.
M4_FLOPS, M4_BANDWIDTH = 2.8e12, 120e9
MAC_MINIS = tuple(
    Machine(f"Mac mini M4 {size} GB", size * GIB, "metal", M4_FLOPS, M4_BANDWIDTH) for size in (16, 24, 32)
)


def this_machine(backend: str) -> Machine:
    """Return this machine, with the device that a backend (`mlx` or `torch`) would compute on."""
    if _has_cuda(backend):
        return _nvidia_machine()
    memory, chip = total_memory(), _chip_name()
    if sys.platform == "darwin" and platform.machine() == "arm64":
        known = chip == "Apple M4"
        return Machine(chip, memory, "metal", M4_FLOPS if known else None, M4_BANDWIDTH if known else None)
    return Machine(chip, memory, "cpu", *_measure_speed())


def total_memory() -> int | None:
    """Return the bytes of RAM, or the container's limit if that is lower; None if unknown."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.virtual_memory().total)
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return min([installed, *_container_limits()]) if installed > 0 else None


def _container_limits() -> list[int]:
    paths = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    texts = [Path(path).read_text(encoding="ascii").strip() for path in paths if Path(path).is_file()]
    return [int(text) for text in texts if text.isdigit() and int(text) > 0]


def _visible_gpu() -> str | None:
    """Return the nvidia-smi id (index or UUID) of the first visible GPU; None if all are hidden.

    CUDA_VISIBLE_DEVICES hides GPUs.

    On a machine with different GPU models, CUDA numbers the fastest first and nvidia-smi by slot, unless
    CUDA_DEVICE_ORDER is PCI_BUS_ID. Without that setting, an index may refer to another GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return "0"
    first = visible.split(",")[0].strip()
    return first if first.isdigit() or first.startswith(("GPU-", "MIG-")) else None


def _has_cuda(backend: str) -> bool:
    """Return whether the installed framework supports CUDA, a driver is present and a GPU is visible."""
    if shutil.which("nvidia-smi") is None or _visible_gpu() is None:
        return False
    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    if backend == "mlx":
        return any(name.startswith("mlx-cuda") for name in installed)
    return not installed.get("torch", "+cpu").endswith("+cpu")


def _nvidia_machine() -> Machine:
    """Return the first visible NVIDIA GPU; its memory is None if the driver does not report it."""
    result = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits", f"--id={_visible_gpu()}"],
        capture_output=True,
        text=True,
        check=False,
    )
    name, _, size = result.stdout.strip().rpartition(",")
    return Machine(name or "NVIDIA GPU", int(size) << 20 if size.strip().isdigit() else None, "cuda")


def _chip_name() -> str:
    """Return the processor's name, such as `Apple M4`."""
    if sys.platform == "darwin":
        result = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return result.stdout.strip() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _measure_speed() -> tuple[float, float]:
    """Measure float32 matrix-product throughput (FLOP/s) and copy bandwidth (bytes/s).

    Uses NumPy and takes some tens of milliseconds.
    """
    left = np.ones((768, 768), np.float32)
    source = np.ones(1 << 23, np.float32)
    target = np.empty_like(source)
    product = _fastest(lambda: left @ left)
    copy = _fastest(lambda: np.copyto(target, source))
    return 2 * 768**3 / product, 2 * source.nbytes / copy


def _fastest(function: Callable[[], object]) -> float:
    """Return the shortest of four timings, in seconds."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def parse_memory(text: str) -> int:
    """Parse a memory size such as `16GB` into bytes. Memory is sold in powers of 1024, so GB means GiB here.

    Raises:
        ValueError: the text is not a positive, finite size with a unit.
    """
    digits = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = {"M": 1 << 20, "G": GIB, "T": 1 << 40}.get(digits[-1:])
    if factor is None:
        raise ValueError(text)
    size = float(digits[:-1]) * factor
    if not 0 < size < float("inf"):
        raise ValueError(text)
    return int(size)
