"""torch's compiler, which nothing here uses, left unloaded: its import takes longer than torch's own.

torchvision imports `torch._dynamo` for one function of `ops.roi_align`, and torch's optimizers do at their first step,
to tell a compiler what to leave out. Until something else of it is asked for, a stand-in answers these, which saves a
second a stage. Only with the versions that `constraints.txt` pins: others may ask for something else.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

PINNED = {"torch": "2.15.0", "torchvision": "0.29.2"}

_NAMES = ("torch._dynamo", "torch._dynamo.utils")


class _StandIn(ModuleType):
    """Has the attributes that it is given; for any other, the compiler is loaded after all."""

    def __getattr__(self, name: str) -> object:
        # Who looks through all modules (inspect, warnings) asks for such names. By a package's __path__ its modules
        # are found.
        if name.startswith("__") and (self.__name__, name) != (_NAMES[0], "__path__"):
            raise AttributeError(name)
        load_compiler()
        value: object = getattr(importlib.import_module(self.__name__), name)
        return value


def postpone_compiler() -> None:
    """Let `torch._dynamo` be a stand-in, unless it is loaded already or the libraries are other versions."""
    if _NAMES[0] in sys.modules or any(version(name).partition("+")[0] != known for name, known in PINNED.items()):
        return
    dynamo, utils = (_StandIn(name) for name in _NAMES)
    vars(dynamo).update(utils=utils, disable=_leave, graph_break=_do_nothing)
    vars(utils).update(is_compile_supported=_is_compile_supported)
    sys.modules.update({module.__name__: module for module in (dynamo, utils)})


def load_compiler() -> None:
    """Put the compiler in the stand-in's place; for what compiles or exports."""
    for name in _NAMES:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
    importlib.import_module(_NAMES[0])


def _leave(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
    return function


def _do_nothing(*_: object, **__: object) -> None:
    pass


def _is_compile_supported(device_type: object) -> bool:
    load_compiler()
    return bool(importlib.import_module(_NAMES[1]).is_compile_supported(device_type))
