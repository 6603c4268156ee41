"""Draw the explore patients of a data set, and the split on which settings are chosen (docs/protocol.md).

    python -m benchmarks.explore ../shared/nih64 runs/explore64

writes ``explore.txt``: a third of the patients, one a line. Beside it lies a split for ``-p split=runs/explore64``:
``train.txt`` has the images of all other patients, ``valid.txt`` four fifths of the explore patients, ``test.txt`` the rest.
A hash of the patient's id decides, so the draw knows neither labels nor images and stays the same when the table grows.
"""

import hashlib
import sys
from pathlib import Path

from charmlib.data.index import read_index
from charmlib.files import write_text


def number(patient: str) -> int:
    """A number that is fixed for each patient, from the sha256 of 'explore PATIENT'."""
    return int(hashlib.sha256(f"explore {patient}".encode()).hexdigest(), 16)


def part_of(patient: str) -> str:
    """'train', 'valid' or 'test'; the last two are the explore patients."""
    which = number(patient)
    return "train" if which % 3 else "test" if which // 3 % 5 == 0 else "valid"


def main(root: str, out: str) -> None:
    """Write the lists."""
    frame = read_index(root).frame
    part = frame["patient"].map(part_of)
    for name in ("train", "valid", "test"):
        write_text(Path(out, f"{name}.txt"), "\n".join(frame["id"][part == name]) + "\n")
        print(f"{name}: {(part == name).sum():,} images of {frame['patient'][part == name].nunique():,} patients")
    write_text(Path(out, "explore.txt"), "\n".join(sorted(set(frame["patient"][part != "train"]))) + "\n")


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    main(*sys.argv[1:])
