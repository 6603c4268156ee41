"""charmlib: the thin helper package of the CHARM-Xray notebook suite. Research use only.

The public names below load on first use, so that tools which only read files never import torch.
"""

from importlib import import_module

__version__ = "0.8.0"

_PUBLIC = {
    "CharmNet": "charmlib.models.charm",
    "charm_learner": "charmlib.training.learner",
    "Run": "charmlib.training.run",
    "load_model": "charmlib.training.checkpoint",
    "chest_dataloaders": "charmlib.data.loaders",
    "open_dataset": "charmlib.data.dataset",
    "predict": "charmlib.training.predict",
    "evaluate_run": "charmlib.evaluation.score",
    "compare": "charmlib.evaluation.compare",
    "Explorer": "charmlib.viz.explorer",
    "make_phantoms": "charmlib.data.phantom",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'charmlib' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
