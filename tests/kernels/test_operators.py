"""Every backend provides what the operator table lists, with the reference's signatures."""

from __future__ import annotations

import inspect
from types import ModuleType

from backprop_kernels import reference
from backprop_kernels.operators import OPERATORS

from backprop import ops

FUNCTIONS = [name for row in OPERATORS for name in row.functions]


def test_backend_provides_the_table_and_capture(backend: ModuleType) -> None:
    assert sorted(backend.__all__) == sorted([*FUNCTIONS, "capture"])


def test_signatures_are_the_references(backend: ModuleType) -> None:
    for name in [*FUNCTIONS, "capture"]:
        expected = inspect.signature(getattr(reference, name)).parameters
        actual = inspect.signature(getattr(backend, name)).parameters
        assert list(actual) == list(expected), name  # names and order
        for parameter in expected:
            assert actual[parameter].default == expected[parameter].default, (name, parameter)
            assert actual[parameter].kind == expected[parameter].kind, (name, parameter)


def test_each_function_lives_in_the_file_of_its_operator(backend: ModuleType) -> None:
    for row in OPERATORS:
        for name in row.functions:
            assert getattr(backend, name).__module__ == f"{backend.__name__}.{row.name}"


def test_ops_offer_the_table() -> None:
    assert list(ops.__all__) == FUNCTIONS
    for name in FUNCTIONS:
        assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))


def test_rows_are_complete() -> None:
    assert len({row.name for row in OPERATORS}) == len(OPERATORS)
    for row in OPERATORS:
        assert all((row.formula, row.shapes, row.fused, row.saves)), row.name
        assert all(name.startswith(row.name) for name in row.functions), row.name
