"""What hardware is here, in words, and how much of it to use; nothing is imported unasked."""

from __future__ import annotations

INSTALL = 'pip install "fused-backprop[cuda13]" (or [cuda12] for a CUDA 12 driver)'
MINIMUM_DRIVER = 12000  # as the CUDA runtime counts: 12.0


def cuda_problem() -> str:
    """Why CUDA cannot be used here, and what to do about it; empty where it can."""
    try:
        import cupy
    except ImportError:
        return f"cupy is not installed; {INSTALL}"
    except Exception as problem:
        return f"cupy is installed but does not import ({problem}); {INSTALL}"
    try:
        driver = cupy.cuda.runtime.driverGetVersion()
    except Exception as problem:
        return f"the NVIDIA driver is missing or does not answer ({problem}); install the driver"
    if driver == 0:
        return "the NVIDIA driver is missing; install it from your distribution or nvidia.com"
    if driver < MINIMUM_DRIVER:
        return f"the NVIDIA driver is too old: expected CUDA 12.0 or newer, got {_version(driver)}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as problem:
        return f"the NVIDIA driver reports no usable device ({problem}); see nvidia-smi"
    if count == 0:
        return "the NVIDIA driver is installed but there is no device; see nvidia-smi"
    return ""


def cuda_devices() -> int:
    """How many GPUs there are, where there is no `cuda_problem`."""
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def set_num_threads(count: int) -> None:
    """Let the CPU kernels use at most `count` threads. Results do not change, only time.

    The default is what the process may use: its affinity mask, cut by the cgroup's CPU quota.
    """
    from backprop_kernels.cpu import threads

    threads.set_num_threads(count)


def get_num_threads() -> int:
    """How many threads the CPU kernels use for large work."""
    from backprop_kernels.cpu import threads

    return threads.get_num_threads()
