"""The examples in the docstrings of public functions and classes run and give what they say."""

from __future__ import annotations

import doctest
import inspect

import fusenc
import pytest
from fusenc import kernels, packing

PUBLIC = {name: getattr(module, name) for module in (fusenc, kernels, packing) for name in module.__all__}


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if not inspect.ismodule(thing)])
def test_examples(name):
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(verbose=False)
    for example in finder.find(PUBLIC[name], name, globs={}):
        runner.run(example)
    assert runner.summarize().failed == 0
