"""Which cases of a test run each time; the others are slow, and CI runs them all."""

import pytest


def quick(cases, *chosen, several=False):
    """The cases for `pytest.mark.parametrize`, all but the chosen ones marked slow.

    With `several`, a case is a tuple of arguments.
    """
    cases = list(cases)
    assert all(case in cases for case in chosen), chosen

    def slow(case):
        return pytest.param(*(case if several else [case]), marks=pytest.mark.slow)

    return [case if case in chosen else slow(case) for case in cases]
