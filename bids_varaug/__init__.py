"""How far can a segmentation be trusted? Numerical ensembles for T1w MRI, as a BIDS App."""

__version__ = "0.1.0"
