"""Tiny drawn pictures and tables in the layouts of other people's data."""

from pathlib import Path

import numpy as np
from PIL import Image

NIH = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],"
       "OriginalImagePixelSpacing[x,y],")
LABELS = ("Mass", "No Finding", "Hernia|Effusion", "Nodule", "Pleural_Thickening", "Infiltration|Mass")


def png(path: Path, seed: int = 0) -> None:
    """A picture of 8 pixels; the suffix decides its kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)).save(path)


def own(root: Path, text: str | bytes, names=(), table: str = "mine.csv") -> dict:
    """A table and its pictures; returns the arguments of ``read_index``."""
    root.mkdir(parents=True, exist_ok=True)
    (root / table).write_bytes(text if isinstance(text, bytes) else text.encode())
    for i, name in enumerate(names):
        png(root / name, i)
    return {"root": root, "classes": "own", "csv": table}


def nih(root: Path, n: int = 24) -> list[str]:
    """The NIH layout without lists, two images a patient; returns the names."""
    rows = [(f"{i // 2 + 1:08d}_{i % 2:03d}.png", LABELS[i % 6], i % 2, i // 2 + 1, 40 + i, "M", "PA", 64, 64, 0.1, 0.1)
            for i in range(n)]
    own(root, NIH + "\n" + "".join(",".join(map(str, row)) + ",\n" for row in rows), [f"images/{row[0]}" for row in rows],
        "Data_Entry_2017.csv")
    return [row[0] for row in rows]
