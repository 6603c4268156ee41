"""Classes of two data sets, matched by name."""

import re
from collections.abc import Sequence

from charmlib.nih import is_normal

_SAME = (("effusion", "pleuraleffusion", "effusions", "pleuraleffusions"), ("pleuralthickening", "pleurathickening"),
         ("edema", "oedema", "pulmonaryedema", "pulmonaryoedema", "lungedema"), ("mass", "lungmass", "pulmonarymass", "masses"),
         ("fibrosis", "pulmonaryfibrosis", "lungfibrosis"), ("emphysema", "pulmonaryemphysema"),
         ("nodule", "nodules", "lungnodule", "pulmonarynodule"), ("infiltration", "infiltrate", "infiltrates", "infiltrations"),
         ("atelectasis", "atelectases"), ("consolidation", "consolidations"), ("hernia", "hiatalhernia", "hiatushernia"))
_MEANING = {name: names[0] for names in _SAME for name in names}
"""Names that mean one finding. Wider and narrower ones are kept apart: 'Lung Opacity', 'Lung Lesion', 'Nodule/Mass'."""


def match_classes(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Our class -> theirs: the same name, else the same letters and digits, else a synonym. Each is used once.

    'Pleural_Thickening' is 'pleural thickening', 'Effusion' is 'Pleural Effusion', 'No Finding' is 'Normal'.
    """
    found: dict[str, str] = {}
    for spell in (str, _letters, _meaning):
        free = {spell(name): name for name in reversed(theirs) if name not in found.values()}
        found |= {name: free.pop(spell(name)) for name in ours if name not in found and spell(name) in free}
    return {name: found[name] for name in ours if name in found}


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def _meaning(name: str) -> str:
    return "no finding" if is_normal(name) else _MEANING.get(_letters(name), _letters(name))
