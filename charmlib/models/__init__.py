"""Whole networks by name."""

from charmlib.models.charm import CharmNet
from charmlib.models.registry import Network, create
from charmlib.models.two_path import TwoPathNet

__all__ = ["CharmNet", "Network", "TwoPathNet", "create"]
