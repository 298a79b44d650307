"""Monte Carlo arithmetic for torch."""

from bids_varaug.numerics.context import MonteCarloArithmetic, RoundingWarning
from bids_varaug.numerics.noise import GENERATOR

__all__ = ["GENERATOR", "MonteCarloArithmetic", "RoundingWarning"]
