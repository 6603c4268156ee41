"""Whole networks by name."""

from charmlib.models.charm import CharmNet

__all__ = ["CharmNet"]
