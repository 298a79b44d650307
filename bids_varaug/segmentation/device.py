"""Where networks run."""

from __future__ import annotations

import ctypes
import os
import re

from bids_varaug.errors import UsageError

DRIVER = "libcuda.so.1"
"""Shared library that comes with NVIDIA's driver, not with torch, which opens it by this name."""
AMD_DEVICE = "/dev/kfd"


def resolve_device(wanted: str) -> str:
    """Return "cpu" or "cuda:N" for auto, cpu, cuda or cuda:N.

    Raises
    ------
    UsageError
        If a GPU is asked for and this machine or this torch has none.
    """
    # torch takes seconds to import, and the main process needs it for nothing else.
    if wanted == "cpu" or (wanted == "auto" and not _has_driver()):
        return "cpu"
    if not re.fullmatch(r"auto|cuda(:\d+)?", wanted):
        raise UsageError(f"--device {wanted}: use auto, cpu, cuda or cuda:N.")
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    number = int(wanted.partition(":")[2] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise UsageError(
            f"--device {wanted}: torch {torch.__version__} sees {torch.cuda.device_count()} GPU(s) "
            "here. Use --device cpu, or install a CUDA build of torch and check nvidia-smi."
        )
    return f"cuda:{number}"


def _has_driver() -> bool:
    """Whether a GPU's driver is there, without which torch can use none."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return os.path.exists(AMD_DEVICE)  # torch for ROCm calls its devices "cuda" too
    return True
