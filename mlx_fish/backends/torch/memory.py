"""Measure peak memory since a reset, in bytes: GPU memory if the model runs on a GPU, else this process's memory."""

import contextlib
import sys
from pathlib import Path

import torch


def reset(device: torch.device) -> None:
    """Start a new measurement, if the system supports it. On a CPU, macOS and Windows cannot reset a process's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(PermissionError):  # forbidden in some containers; the peak is then since process start
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: torch.device) -> int:
    """Return the peak memory since `reset`, weights included, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())  # torch frees none of it by itself, so this is the peak
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:", 1)[1].split()[0])
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
