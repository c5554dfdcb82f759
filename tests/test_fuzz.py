"""A few of the random cases of reliability/fuzz.py, which runs thousands.

If it fails, a failure of the random search cannot be done again.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import fuzz
import oracle


@pytest.mark.slow
@settings(max_examples=4)
@given(st.integers(0, 2**32 - 1))
def test_random_leaves_arguments_and_gradients(seed):
    fuzz.check(seed, cases=2)


def test_a_failure_says_how_to_do_it_again(monkeypatch):
    right = oracle.moments_to_update

    def wrong(*args):
        update, tolerance = right(*args)
        return np.add(update, 1.0).tolist(), tolerance

    monkeypatch.setattr(oracle, "moments_to_update", wrong)
    with pytest.raises(AssertionError, match=r"reliability/fuzz\.py --seed 3"):
        fuzz.check(3, cases=1)


def test_forms_are_diverse():
    forms = [fuzz.draw_form(np.random.default_rng(seed)) for seed in range(300)]
    assert {len(form.shape) for form in forms} == set(range(6))
    assert {form.way for form in forms} == set(fuzz.WAYS)
    assert max(np.prod(form.shape, dtype=int) for form in forms) <= fuzz.LARGEST_LEAF
