"""Imports of libraries that take seconds."""

import gc
import importlib
import sys
from types import ModuleType


def import_all_of(name: str) -> ModuleType:
    """Import a module and all that it needs with one look at garbage instead of hundreds.

    Half a million objects of torch and Transformers come into being, of which next to none goes: collecting meanwhile
    is an eighth of the time. They are out of sight of later collections, too.
    """
    if name in sys.modules:
        return sys.modules[name]
    was_on = gc.isenabled()
    gc.disable()
    try:
        module = importlib.import_module(name)
    finally:
        if was_on:
            gc.enable()
    gc.freeze()
    return module
