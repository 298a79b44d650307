"""Wiring only: which step feeds which."""

import os

# nipype would otherwise ask the network for its newest version when it is imported.
os.environ.setdefault("NO_ET", "1")
