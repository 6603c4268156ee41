"""Images by their id, for looking at: from the files of the data set that a run was made on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from charmlib.data.images import read_grey
from charmlib.data.index import read_index


class ImageReader:
    """``reader(metrics, image_id)`` -> (size, size) uint8, whatever run the metrics are of.

    Parameters
    ----------
    data_root : path
        Where the images are; '' asks each run's own parameters.
    size : int
        Pixels a side.

    Raises (when called)
    --------------------
    OSError, KeyError
        The data is not here, or has no such image.
    """

    def __init__(self, data_root: str | Path = "", size: int = 192):
        self.data_root, self.size = data_root, size
        self._paths: dict[tuple, dict[str, str]] = {}

    def __call__(self, metrics: Mapping, image_id: str) -> np.ndarray:
        params = metrics["params"]
        key = str(self.data_root or params["data_root"]), params["classes"], params["csv"]
        if key not in self._paths:
            self._paths[key] = {}  # looked for once, also where it is not here
            frame = read_index(Path(key[0]), classes=key[1], csv=key[2]).frame
            self._paths[key] = dict(zip(frame["id"].astype(str), frame["path"].astype(str)))
        return read_grey(self._paths[key][image_id], self.size)
