"""Grids: a YAML file becomes cells, cells become runs, runs become a leaderboard. Knows notebooks and files, never torch."""

from importlib import import_module

_WHERE = {"Cell": "spec", "Grid": "spec", "load_grid": "spec", "leaderboard": "board", "merge_grids": "bring",
          "run_grid": "runner"}

__all__ = ["Cell", "Grid", "leaderboard", "load_grid", "merge_grids", "run_grid"]


def __getattr__(name: str):
    """Import on first use, which spares a cell's process the tables and pictures."""
    if name in _WHERE:
        return getattr(import_module(f"charmlib.grid.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'charmlib.grid' has no attribute {name!r}")
