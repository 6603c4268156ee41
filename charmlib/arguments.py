"""What commands take: the folder of a run or grid, one run, and how a table is read."""

from pathlib import Path

import click


class Folder(click.Path):
    """The existing folder of a run or grid; a typo is answered with the nearest one beside it."""

    def convert(self, value, param, ctx):
        from charmlib.params import nearest

        path = Path(value)
        if path.is_file():
            self.fail(f"{path} is a file; name the folder of a run or grid")
        if not path.exists():
            self.fail(f"no folder {path}.{nearest(path.name, (p.name for p in path.parent.glob('*') if p.is_dir()))}")
        return super().convert(value, param, ctx)


def one_run(folder: Path) -> Path:
    """A run's folder; of a grid's, the cell that is first by validation, which is said."""
    if not (folder / "grid.yaml").is_file():
        return folder
    from charmlib.grid.board import leaderboard

    board = leaderboard(folder, write=False).sort_values("rank", na_position="last")
    first, *_, last = [folder / cell for cell in board["cell"].iloc[[0, -1]]]
    if board["rank"].isna().all():
        raise click.UsageError(f"{folder} is a grid without a ranked cell: name the folder of one, such as {first}")
    click.echo(f"{folder} is a grid: taking its first cell by validation AUC, {first}; others are named like {last}")
    return first


def reading(assignments) -> dict:
    """The parameters of ``-p`` that say how a table is read; ParameterError for others."""
    from charmlib.param_sources import parse_assignments
    from charmlib.params import READING, ParameterError

    how = parse_assignments(assignments)
    allowed = [name for name in READING if name != "csv"]  # an option of its own
    if other := set(how) - set(allowed):
        raise ParameterError(f"parameter '{min(other)}' does not say how a table is read; -p takes {', '.join(allowed)}.")
    return how
