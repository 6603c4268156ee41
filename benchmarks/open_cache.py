"""How long a cell of a grid takes to open the images of the whole NIH set.

    python -m benchmarks.open_cache ../shared

A synthetic cache of all 112,120 rows at 224 pixels (5.6 GB of zeros that take no room on the disk), whose source files are
links to the full-size files at hand. Opening does all that it does with a real one: manifest, lengths, hashes, and a sample of
rows with pixels and source files against their checksums. The whole data set (label table, files, split, cache) is timed too,
each in a process of its own, as a cell has it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import save
from charmlib.data.cache_file import DONE, IDS, MANIFEST, PIXELS, ROW, ROWS, Request, manifest_of
from charmlib.data.index import read_index

TIMED = """
import sys, time
from charmlib.data.cache import open_images
from charmlib.data.dataset import open_dataset
from charmlib.data.index import read_index
clock = time.perf_counter
start = clock()
index = read_index(sys.argv[1])
indexed = clock()
ids, paths = index.frame["id"].tolist(), index.frame["path"].tolist()
listed = clock()
images = open_images(ids, paths, 224)
opened = clock()
data = open_dataset(data_root=sys.argv[1], image_size=224)
print(indexed - start, opened - listed, clock() - opened, len(images))
"""


def synthetic_cache(ids: list[str], paths: list[str], size: int, folder: Path) -> None:
    """A cache as the builder writes it, of black pictures."""
    folder.mkdir(parents=True)
    header = np.lib.format.open_memmap(folder / PIXELS, mode="w+", dtype=np.uint8, shape=(len(ids), size, size))
    del header
    black = zlib.crc32(np.zeros((size, size), np.uint8))
    rows, known = np.zeros(len(ids), ROW), {}
    for i, path in enumerate(paths):
        real = os.path.realpath(path)
        if real not in known:
            source = Path(real).read_bytes()
            known[real] = len(source), zlib.crc32(source)
        rows[i] = (DONE, known[real][0], 1024, 1024, known[real][1], black)
    np.save(folder / ROWS, rows)
    (folder / IDS).write_text("\n".join(ids))
    (folder / MANIFEST).write_text(json.dumps(manifest_of(Request(ids, paths, size, "stretch"), rows, {})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root, home = Path(scratch) / "nih", Path(scratch) / "caches"
        images = root / "images_001" / "images"
        images.mkdir(parents=True)
        for path in (args.shared / "nih_meta").iterdir():
            shutil.copy(path, root)
        sources = sorted((args.shared / "nih_full").rglob("*.png"))
        table = root / "Data_Entry_2017_v2020.csv"
        table.write_bytes(gzip.decompress((root / f"{table.name}.gz").read_bytes()))
        for i, line in enumerate(table.read_text().splitlines()[1:]):
            (images / line.split(",")[0]).symlink_to(sources[i % len(sources)].resolve())
        index = read_index(root)
        synthetic_cache(index.frame["id"].tolist(), index.frame["path"].tolist(), 224, home / "grey224")
        environment = {**os.environ, "CHARM_CACHE": str(home)}
        times = []
        for _ in range(args.rounds):
            out = subprocess.run([sys.executable, "-c", TIMED, str(root)], env=environment, check=True, capture_output=True,
                                 text=True).stdout.split()
            times.append([float(v) for v in out[:3]])
            assert out[3] == str(len(index.frame))
    index_s, open_s, dataset_s = (round(statistics.median(column), 3) for column in zip(*times))
    figures = {"images": len(index.frame), "image_size": 224, "rounds": args.rounds, "asked_seconds": 0.2,
               "seconds": {"open_cache": open_s, "open_cache_worst": round(max(t[1] for t in times), 3), "read_index": index_s,
                           "open_dataset": dataset_s}}
    print(figures["seconds"], save("open_cache", torch.device("cpu"), "uint8", figures))


if __name__ == "__main__":
    main()
