"""Systems: a network, a recipe of training phases and rows in the table of parameters, by name. Imports no torch.

A system outside the package is a module that calls :func:`register`. The environment variable ``CHARM_SYSTEMS`` names such
modules (separated by commas), so that child processes and their kernels know them too; no file that is read can.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from charmlib import params
from charmlib.params import Param

MODULES = "CHARM_SYSTEMS"


class System(NamedTuple):
    """What a name in the parameter ``system`` stands for.

    Parameters
    ----------
    network : str
        ``'module:name'`` of a callable that makes the network. It gets ``classes``, the number of classes, and each parameter
        that its signature names; see :class:`charmlib.models.registry.Network` for what it returns.
    recipe : str
        ``'module:name'`` of a function (params, rate) -> list of :class:`charmlib.training.recipes.Phase`. ``rate`` is the
        learning rate of stage 1, pinned or found.
    params : tuple of Param
        Rows for the table of parameters, with ``of=(name,)``.
    """

    name: str
    network: str
    recipe: str
    params: tuple[Param, ...] = ()


SYSTEMS: dict[str, System] = {}


def register(system: System) -> None:
    """Make a system known under its name, and its parameters with it.

    Raises ParameterError if another system has the name, or another parameter the name of one of its parameters.
    """
    if SYSTEMS.get(system.name, system) != system:
        raise params.ParameterError(f"system '{system.name}' is registered twice; give one of the two another name")
    params.add_rows(system.params)
    SYSTEMS[system.name] = system


def find(name: str) -> System:
    """The system of a name; ParameterError, naming the nearest one, if there is none."""
    if name not in SYSTEMS:
        raise params.ParameterError(f"parameter 'system': {name!r} is none of {', '.join(SYSTEMS)}."
                                    f"{params.nearest(name, SYSTEMS)} A system of your own is registered by the module that "
                                    f"the environment variable {MODULES} names.")
    return SYSTEMS[name]


def load(reference: str) -> Callable:
    """The object that ``'module:name'`` refers to."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


register(System("charm", "charmlib.models.charm:CharmNet", "charmlib.training.recipes:two_stages"))
register(System("two_path", "charmlib.models.two_path:TwoPathNet", "charmlib.training.recipes:in_order"))
for _module in filter(None, os.environ.get(MODULES, "").split(",")):
    try:
        import_module(_module.strip())
    except ModuleNotFoundError as error:
        raise params.ParameterError(f"{MODULES}={os.environ[MODULES]!r}: {error}; put its folder on PYTHONPATH") from error
