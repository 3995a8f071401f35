"""Keeps torch's compiler, which nothing here uses, unloaded: importing it takes longer than torch itself.

torchvision imports `torch._dynamo` for one function of `ops.roi_align`, and torch's optimizers at their first step, to
tell a compiler what to skip. A stand-in answers these and loads the compiler for anything else, which saves a second
per stage. Only for the versions pinned in `constraints.txt`: others may ask for more.
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
    """Has the attributes given to it; any other one loads the compiler."""

    def __getattr__(self, name: str) -> object:
        # inspect and warnings ask all modules for such names. __path__ is how a package's modules are found.
        if name.startswith("__") and (self.__name__, name) != (_NAMES[0], "__path__"):
            raise AttributeError(name)
        load_compiler()
        value: object = getattr(importlib.import_module(self.__name__), name)
        return value


def postpone_compiler() -> None:
    """Replace `torch._dynamo` by a stand-in, unless it is loaded or the libraries are other versions."""
    if _NAMES[0] in sys.modules or any(version(name).partition("+")[0] != known for name, known in PINNED.items()):
        return
    dynamo, utils = (_StandIn(name) for name in _NAMES)
    vars(dynamo).update(utils=utils, disable=_leave, graph_break=_do_nothing)
    vars(utils).update(is_compile_supported=_is_compile_supported)
    sys.modules.update({module.__name__: module for module in (dynamo, utils)})


def load_compiler() -> None:
    """Load the compiler in place of the stand-in, for code that compiles or exports."""
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
