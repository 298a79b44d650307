"""Monte Carlo arithmetic for torch."""

from bids_varaug.numerics.rounding import MonteCarloArithmetic

__all__ = ["MonteCarloArithmetic"]
