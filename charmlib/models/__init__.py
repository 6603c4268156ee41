"""Whole networks by name."""

from charmlib.models.charm import CharmNet
from charmlib.models.registry import Network, create

__all__ = ["CharmNet", "Network", "create"]
