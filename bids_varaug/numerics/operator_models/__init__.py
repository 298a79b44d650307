"""How the noise of torch operators of many instructions is modelled, from their arguments."""

from bids_varaug.numerics.operator_models import multiplying, normalising, summing
from bids_varaug.numerics.operator_models.context import Context

MODELS = multiplying.MODELS | summing.MODELS | normalising.MODELS
"""Name of an operator -> function (given, result, context) that perturbs the result in place."""

__all__ = ["MODELS", "Context"]
