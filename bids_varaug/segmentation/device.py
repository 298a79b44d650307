"""Where networks run."""

from __future__ import annotations

import re

import torch

from bids_varaug.errors import UsageError


def resolve_device(wanted: str) -> str:
    """Return "cpu" or "cuda:N" for auto, cpu, cuda or cuda:N.

    Raises
    ------
    UsageError
        If a GPU is asked for and this machine or this torch has none.
    """
    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return wanted
    if not re.fullmatch(r"cuda(:\d+)?", wanted):
        raise UsageError(f"--device {wanted}: use auto, cpu, cuda or cuda:N.")
    number = int(wanted.partition(":")[2] or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise UsageError(
            f"--device {wanted}: torch {torch.__version__} sees {torch.cuda.device_count()} GPU(s) "
            "here. Use --device cpu, or install a CUDA build of torch and check nvidia-smi."
        )
    return f"cuda:{number}"
