"""A picture of the user's own in the explorer: a run's probabilities, calls, heat map, and what its memory answers."""

import tempfile
import threading
from pathlib import Path

from charmlib.data.images import read_grey
from charmlib.data.radiograph import NotARadiograph
from charmlib.viz.cards import Card, cards, digits, slot_lines, text
from charmlib.viz.serve import UPLOAD
from charmlib.viz.style import readable

_REMEDY = "Choose a chest radiograph: one grey picture as PNG, JPEG or DICOM, of at least 32 pixels a side."


class OwnImage:
    """The widgets of one :class:`charmlib.viz.explorer.Explorer`, ``box``. ``pool`` is where its networks are asked."""

    def __init__(self, explorer, pool):
        import ipywidgets as w

        self.explorer, self.pool, self._lock = explorer, pool, threading.Lock()
        self._picture, self._how, self._asked = None, None, None  # (name, content); what to ask of it; what was asked last
        self.upload = w.FileUpload(accept=".png,.jpg,.jpeg,.dcm,.dicom,image/*,application/dicom", disabled=not explorer.ask,
                                   description="choose or drop an image", layout=w.Layout(width="auto"))
        self.told = w.HTML()
        self.box = w.VBox([w.HTML(f"<h2>An image of your own</h2><p>PNG, JPEG or DICOM, up to {UPLOAD} MB. It stays on this "
                                  "machine.</p>"), self.upload, self.told])
        self.upload.observe(self._uploaded, names="value")

    def ask(self, *how) -> None:
        """Ask a run for its opinion of a finding at an operating point, with a map of a stride, once there is a picture."""
        self._how = how
        if self._picture and self._asked != (asked := (self._picture, *how)):
            self._asked = asked
            self.told.value = f"<p role='status'>reading {text(self._picture[0])} ...</p>"
            self.pool.submit(self._tell, asked)

    def _uploaded(self, _change) -> None:
        file = self.upload.value[0]
        name = Path(file["name"].replace("\\", "/")).name or "image"
        self._picture, self._asked = (name, file["content"]), None
        if file["size"] > UPLOAD * 2**20:
            self._picture = None
            self.told.value = _refusal(f"{name}: {file['size'] / 2**20:.0f} MB, more than {UPLOAD}", "Make it smaller.")
        elif self._how:
            self.ask(*self._how)

    def _tell(self, asked: tuple) -> None:
        """In the pool: what there is to tell, unless something else was asked by now."""
        (name, content), *how = asked
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            try:
                path.write_bytes(content)
                told = self._opinion(path, *how)
            except Exception as error:  # a thread's own would reach nobody
                bad = isinstance(error, NotARadiograph)
                told = _refusal(str(error), _REMEDY) if bad else f"<p role='alert'><b>No answer</b>: {text(error)}</p>"
        with self._lock:
            if self._asked is asked:
                self.told.value = told

    def _opinion(self, path: Path, run: str, finding: str, point: str, stride: int) -> str:
        folder = self.explorer.folders[run]
        told, metrics = self.explorer.ask.opinion(folder.path, path, finding, point, stride), folder.metrics
        p, calls = told["probabilities"], told["calls"]
        pixels = read_grey(path, 384, metrics["params"]["aspect"], scale=metrics["data"]["scale"])
        card = Card(pixels, path.name, [f"{readable(finding)}: p {digits(p[finding])}"], readable(finding),
                    heat=told.get("heat"), margin=told.get("margin", 0.0))
        words = {None: "no threshold", 0: "not called", 1: "called"}
        rows = "".join(f"<tr class='{'yes' * calls.get(c, 0)}'><td>{text(readable(c))}</td><td>{digits(p[c])}</td>"
                       f"<td>{words[calls.get(c)]}</td></tr>" for c in sorted(p, key=p.get, reverse=True))
        memory = cards([self._slot(run, slot) for slot in told.get("memory", ())], f"m{id(self):x}")
        own = cards([card], f"o{id(self):x}")
        return (f"<div class='own'>{own}<div><p>{text(run)}, at the operating point {text(point)}</p>"
                f"<table><tr><th>class</th><th>probability</th><th></th></tr>{rows}</table></div></div>"
                f"<p><b>The memory's answer.</b> {text(told['note'])}</p>{memory}")

    def _slot(self, run: str, slot: dict) -> Card:
        name, *lines = slot_lines(slot)
        return Card(self.explorer.image(run, slot["image"]), name, lines)


def _refusal(why: str, remedy: str) -> str:
    return f"<p role='alert'><b>Refused</b> {text(why.rstrip('.'))}. {remedy}</p>"
