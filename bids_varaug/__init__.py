"""How far can a segmentation be trusted? Numerical ensembles for T1w MRI, as a BIDS App.

The names below are promised to stay. They are imported when they are first used, so that
``import bids_varaug`` takes no time.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["MonteCarloArithmetic", "Segmentation", "__version__", "segment"]


def __getattr__(name: str) -> Any:
    if name == "MonteCarloArithmetic":
        from bids_varaug.numerics import MonteCarloArithmetic

        return MonteCarloArithmetic
    if name in ("Segmentation", "segment"):
        from bids_varaug import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
