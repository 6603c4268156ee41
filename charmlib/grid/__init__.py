"""Grids: a YAML file becomes cells, cells become runs, runs become a leaderboard. Knows notebooks and files, never torch."""

from charmlib.grid.leaderboard import leaderboard
from charmlib.grid.runner import run_grid
from charmlib.grid.spec import Cell, Grid, load_grid

__all__ = ["Cell", "Grid", "leaderboard", "load_grid", "run_grid"]
