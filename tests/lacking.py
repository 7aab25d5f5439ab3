"""Tests that need what not every machine has installed."""

import importlib
import os
from types import ModuleType
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Skip a test for want of a package; with CI=true, where everything shall be proved, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}; with CI=true nothing is skipped for want of a package", pytrace=False)
    pytest.skip(what)


def imported(module: str) -> ModuleType:
    """A module of a package that only tests need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        lacking(f"{error}: pip install -c constraints.txt -e '.[demo,test]'")
