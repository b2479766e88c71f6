"""The most memory held since a reset, in bytes: the GPU's where one computes, else this process's."""

import contextlib
import sys
from pathlib import Path

import torch


def reset(device: torch.device) -> None:
    """Start anew, where the system can: macOS and Windows keep a process's peak for its whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(PermissionError):  # some containers forbid it; then the peak is that of the whole life
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: torch.device) -> int:
    """Bytes at the most since `reset`, the weights included."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())  # torch gives nothing back on its own, so this is the peak
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:", 1)[1].split()[0])
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
