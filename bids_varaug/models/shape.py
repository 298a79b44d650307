"""What a network is built from."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class NetworkShape:
    """What has to be known to build the network again (kept in the manifest)."""

    n_classes: int
    channels: tuple[int, ...] = (32, 64, 96, 96, 96)
    rim_channels: int = 16

    def to_json(self) -> dict:
        """Return plain types for the manifest."""
        return asdict(self) | {"channels": list(self.channels)}

    @classmethod
    def from_json(cls, values: dict) -> NetworkShape:
        """Rebuild from the manifest's dictionary."""
        return cls(**(values | {"channels": tuple(values["channels"])}))

    @property
    def multiple(self) -> int:
        """Input sides must be multiples of this many voxels."""
        return 2 ** len(self.channels)
