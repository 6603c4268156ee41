"""Boxes that radiologists drew around findings: ``BBox_List_2017.csv`` of the NIH set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.files import readable, reading
from charmlib.nih import canonical

FILE, SIDE = "BBox_List_2017.csv", 1024  # the file's coordinates are pixels of pictures of this side
CORNERS = ["x0", "y0", "x1", "y1"]
_SHORT = {"Infiltrate": "Infiltration"}


def read_boxes(path: str | Path, ids: Sequence[str], labels: np.ndarray, classes: Sequence[str]
               ) -> tuple[pd.DataFrame, list[str]]:
    """The boxes of some images, and a line for each row of the file that is left out.

    ``ids`` (n,) and ``labels`` (n, C) are the data set's. The table has the columns row (of ``ids``), id, finding, and
    :data:`CORNERS`, as shares of the picture's width and height. Rows of other images are left out without a word. Left out by
    name are rows of unknown findings or without a finding that the image is labelled with, and boxes outside the picture. The
    NIH's file has one such row, which repeats another image's coordinates under two findings.

    Raises FileNotFoundError without the file, and :class:`charmlib.files.Damaged` for one without the columns of the NIH's.
    """
    with reading(path, "list of boxes", "wanted the columns image, finding, x, y, width, height"):
        table = pd.read_csv(path, header=None, skiprows=1).dropna(how="all").iloc[:, :6]
        table.columns = ["id", "finding", "x", "y", "w", "h"]
        corner = table.iloc[:, 2:].to_numpy(float, copy=True)
    row_of, column_of = {name: i for i, name in enumerate(ids)}, {name: c for c, name in enumerate(classes)}
    corner[:, 2:] += corner[:, :2]
    corner /= SIDE
    kept, left = [], []
    for (name, finding), box in zip(table[["id", "finding"]].astype(str).to_numpy(), corner):
        if name not in row_of:
            continue
        row, finding = row_of[name], canonical(_SHORT.get(finding, finding))
        if finding not in column_of:
            left.append(f"{readable(name)}: box of {finding!r}, which is no class")
        elif labels[row, column_of[finding]] != 1:
            left.append(f"{readable(name)}: box of {finding}, which the image is not labelled with")
        elif not (0 <= box[0] < box[2] <= 1.001 and 0 <= box[1] < box[3] <= 1.001):
            left.append(f"{readable(name)}: box of {finding} outside the picture ({', '.join(f'{v:.3f}' for v in box)})")
        else:
            kept.append((row, name, finding, *np.minimum(box, 1)))
    return pd.DataFrame(kept, columns=["row", "id", "finding", *CORNERS]), left
