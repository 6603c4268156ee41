"""A grid under random kills ends like an undisturbed one.

    python -m benchmarks.chaos

Twelve cells on drawn phantoms, two at once, run twice: undisturbed, and with kills. Six have a bank of features, six one that
votes; they share five trainings. SIGKILL goes to the runner, the cells' papermill processes and their kernels, at random
moments of stage 1, stage 2, scoring or writing a file. When the runner has ended, the same command is started again. At the
end both leaderboards must be equal except for times, and every cell's ``metrics.json`` and predictions must have the same
bits. Keeps ``results/chaos.log`` (a line per kill) and ``results/chaos.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import yaml

from charmlib.data.phantom import make_phantoms
from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_json
from charmlib.grid import lease

RESULTS = Path(__file__).parent / "results"
SETTINGS = {"image_size": 32, "arch": "timm:test_resnet", "weights": "none", "norm": "half", "bank_size": 64, "hidden": 16,
            "stage1_frozen_epochs": 1, "stage1_epochs": 3, "stage2_epochs": 3, "stage1_lr": 1e-3, "stage1_batch": 8,
            "stage2_batch": 8, "valid_fraction": 0.2, "use_momentum": True, "answer": "features", "strategy": "rarity"}
AXES = {"momentum": [0.9, 0.99], "k": [1, 2, 3]}
VOTES = {"answer": "votes", "use_momentum": False, "vote_weight": [-1, 0.3, 0.7], "seed": [1, 2]}
PHASES = ("stage 1", "stage 2", "scoring", "writing")
EACH = 5  # kills of a cell at most, so that they reach every training
VICTIMS = {"runner": None, "papermill": "charmlib.grid.cell_process", "kernel": "ipykernel"}


class Chaos:
    """Starts the grid again and again, and kills what belongs to it."""

    def __init__(self, command: list[str], out: Path, seed: int, log):
        self.command, self.out, self.log = command, out, log
        self.draw = random.Random(seed)
        self.begin = time.monotonic()
        self.kills, self.of_cell = Counter(), Counter()
        self.starts = 0

    def say(self, text: str) -> None:
        """A line on the screen and in the log."""
        line = f"{time.monotonic() - self.begin:7.1f} s  {text}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def run(self, wanted: int) -> None:
        """Kill ``wanted`` times, each phase as often, then let the grid end."""
        runner = self._start()
        while True:
            status = runner.poll()
            if status is not None:
                if status == 0:
                    return
                self.say(f"the runner ended with {status}; the same command again")
                runner = self._start()
            phase = PHASES[sum(self.kills.values()) % len(PHASES)]
            if sum(self.kills.values()) >= wanted:
                time.sleep(0.2)
            elif cell := self._in_phase(phase):
                if phase != "writing":  # which lasts milliseconds
                    time.sleep(self.draw.uniform(0.0, 0.3))
                self._kill(runner, phase, cell)
            else:
                time.sleep(0.001)

    def _start(self) -> psutil.Popen:
        self.starts += 1
        with open(self.out.with_suffix(".txt"), "a") as said:
            return psutil.Popen(self.command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)

    def _in_phase(self, phase: str) -> str | None:
        """A cell that is in this phase now."""
        if not self.out.is_dir():
            return None
        for folder in self.out.iterdir():
            spared = not folder.is_dir() or self.of_cell[folder.name] >= EACH
            if spared or (folder / "metrics.json").is_file() or not lease.holder(folder):
                continue  # what a killed process left behind is no phase
            if phase == "writing":
                found = any(p.name.endswith(".tmp") for p in folder.iterdir())
            elif (folder / "model.json").is_file():
                found = phase == "scoring"
            else:
                history = folder / "history.csv"
                rows = history.read_text().splitlines()[1:] if history.is_file() else []
                found = bool(rows) and phase == ("stage 2" if rows[-1].startswith("2") or len(rows) >= 4 else "stage 1")
            if found:
                return folder.name
        return None

    def _kill(self, runner: psutil.Popen, phase: str, cell: str) -> None:
        family = runner.children(recursive=True)
        least = min(self.kills[victim, phase] for victim in VICTIMS)
        victim = self.draw.choice([victim for victim in VICTIMS if self.kills[victim, phase] == least])
        target = runner if victim == "runner" else self._one(family, victim, cell)
        if target is None:
            return
        try:
            target.kill()
        except psutil.NoSuchProcess:
            return
        self.kills[victim, phase] += 1
        self.of_cell[cell] += 1
        self.say(f"kill {sum(self.kills.values())}: {victim} (process {target.pid}), {cell} in {phase}")
        if victim == "runner":
            runner.wait()
            _, alive = psutil.wait_procs(family, timeout=15)
            if alive:
                raise SystemExit(f"15 s after the runner's death there are {[p.cmdline() for p in alive]}")

    def _one(self, family: list[psutil.Process], victim: str, cell: str) -> psutil.Process | None:
        """The process of that kind which works on the cell."""
        for process in family:
            try:
                if VICTIMS[victim] in " ".join(process.cmdline()) and process.environ().get("CHARM_CELL", cell) == cell:
                    return process
            except psutil.Error:
                continue
        return None


def differences(quiet: Path, chaos: Path) -> list[str]:
    """The files that differ, except for times, memory and paths."""
    boards = [pd.read_csv(f / "leaderboard.csv").drop(columns=["seconds", "overhead_seconds"]) for f in (quiet, chaos)]
    found = [] if boards[0].equals(boards[1]) else ["leaderboard.csv"]
    for cell in boards[0]["cell"]:
        one, other = (RunFolder(folder / cell).metrics for folder in (quiet, chaos))
        for metrics in (one, other):
            for key in ("seconds", "peak_memory_mb"):
                metrics.pop(key)
            metrics["params"].pop("run_dir")
        found += [] if one == other else [f"{cell}/metrics.json"]
        same = (quiet / cell / "predictions.npz").read_bytes() == (chaos / cell / "predictions.npz").read_bytes()
        found += [] if same else [f"{cell}/predictions.npz"]
        found += [str(p.relative_to(chaos)) for p in (chaos / cell).iterdir() if p.name in (".lease", "resume.pt", "cell.json")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=85)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the same sums in both runs, whatever else the machine does
    with tempfile.TemporaryDirectory() as place, open(RESULTS / "chaos.log", "w") as log:
        folder = Path(place)
        data = make_phantoms(folder / "phantoms", images=600, size=32)
        (folder / "base.yaml").write_text(yaml.safe_dump({**SETTINGS, "data_root": str(data)}))
        (folder / "grid_chaos.yaml").write_text(yaml.safe_dump(
            {"base": "base.yaml", "axes": AXES, "cells": [{"name": "votes", **VOTES}]}, sort_keys=False))
        command = [sys.executable, "-m", "charmlib", "grid", "run", str(folder / "grid_chaos.yaml"), "--workers", "2", "--out"]
        start = time.monotonic()
        subprocess.run([*command, str(folder / "quiet")], check=True, stdout=subprocess.DEVNULL)
        quiet_seconds = time.monotonic() - start
        chaos = Chaos([*command, str(folder / "chaos")], folder / "chaos", given.seed, log)
        chaos.say(f"the quiet run took {quiet_seconds:.0f} s; now {given.kills} kills, seed {given.seed}")
        chaos.run(given.kills)
        took = time.monotonic() - chaos.begin
        wrong = differences(folder / "quiet", folder / "chaos")
        chaos.say(f"{sum(chaos.kills.values())} kills, {chaos.starts} starts of the command, {took:.0f} s; "
                  + ("equal to the quiet run" if not wrong else f"DIFFERENT: {', '.join(wrong)}"))
        counts = {phase: {victim: chaos.kills[victim, phase] for victim in VICTIMS} for phase in PHASES}
        write_json(RESULTS / "chaos.json", {"cells": 12, "kills": counts, "starts": chaos.starts, "equal": not wrong,
                                            "quiet_seconds": round(quiet_seconds, 1), "chaos_seconds": round(took, 1),
                                            "seed": given.seed, "settings": SETTINGS, "axes": AXES, "votes": VOTES})
        print(json.dumps(counts, indent=1))
        if wrong or sum(chaos.kills.values()) < given.kills:
            raise SystemExit("the grid did not survive, or was killed too rarely; see results/chaos.log")


if __name__ == "__main__":
    main()
