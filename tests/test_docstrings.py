"""Examples in docstrings say what the code does."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import nspo_lightning

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(nspo_lightning.__path__, "nspo_lightning.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_say_what_the_code_does(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_there_are_examples() -> None:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module("nspo_lightning.report.words"))
    assert any(test.examples for test in found)
