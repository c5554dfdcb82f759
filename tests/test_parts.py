"""Properties of the parts: inverses, bounds, exact sets.

If it fails, a part of the algorithm errs, and tests of the whole do not say which.
"""

import math
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from jax import lax

from compressed import scale_by_microadam
from microadam_optax import _blocks, _chunks, _moments, _quantize, _topk
from quick import quick

pytestmark = pytest.mark.usefixtures("strict")

SHAPES = st.lists(st.integers(0, 40), max_size=4).map(tuple)
BLOCK_SIZES = st.sampled_from([8, 64, 256, 1024, 65536])
BITS = st.sampled_from([2, 4, 8])
QUANTIZE = jax.jit(_quantize.quantize, static_argnums=1)
DEQUANTIZE = jax.jit(_quantize.dequantize, static_argnums=2)


def rows(b, number=5, seed=0):
    return np.random.default_rng(seed).normal(size=(number, b)).astype(np.float32)


@given(SHAPES, BLOCK_SIZES, st.integers(1, 16))
def test_split_and_join_are_inverses(shape, block_size, shards):
    at = _blocks.layout_of(shape, block_size, shards)
    leaf = np.arange(math.prod(shape)).reshape(shape)
    cells = _blocks.split(leaf, at)
    assert cells.shape == (*at.grid, at.cell)
    np.testing.assert_array_equal(_blocks.join(cells, at), leaf)


@pytest.mark.parametrize(("number", "blocks", "block"), [(2, 1, 8), (3, 4, 24)])
def test_pad_and_unpad_are_inverses(number, blocks, block):
    for cell in {blocks * block, blocks * block - 1, (blocks - 1) * block + 1}:
        cells = np.arange(1, number * cell + 1).reshape(number, cell)
        padded = jax.jit(_blocks.pad, static_argnums=(1, 2))(cells, blocks, block)
        assert padded.shape == (number, blocks, block)
        padded = np.asarray(padded)
        np.testing.assert_array_equal(_blocks.unpad(padded, cell), cells)
        padding = np.arange(blocks * block).reshape(blocks, block) >= cell
        np.testing.assert_array_equal(padded == 0, np.stack([padding] * number))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=3))
def test_split_and_join_are_inverses_for_any_grid(axes):
    grid, shape = tuple(g for g, _ in axes), tuple(g * n for g, n in axes)
    at = _blocks.layout_of(shape, 8, grid=grid)
    leaf = np.arange(math.prod(shape)).reshape(shape)
    cells = _blocks.split(leaf, at)
    np.testing.assert_array_equal(_blocks.join(cells, at), leaf)
    corner = leaf[tuple(slice(n) for _, n in axes)].ravel()
    np.testing.assert_array_equal(cells[(0,) * len(grid)], corner)


@given(SHAPES, BLOCK_SIZES, st.integers(1, 16))
@example((4096, 11008), 256, 8)
@example((50257, 768), 256, 8)
def test_the_rule_of_the_grid(shape, block_size, shards):
    at = _blocks.layout_of(shape, block_size, shards)
    assert len(at.grid) == len(shape)
    assert all(n % g == 0 for n, g in zip(shape, at.grid, strict=True))
    assert at.block % 8 == 0
    assert at.block <= block_size
    # All blocks but the last of a cell are full, and that one is not empty.
    assert (at.blocks - 1) * at.block < max(at.cell, 1) <= at.blocks * at.block


def test_grids_of_known_shapes():
    def of(*shape):
        at = _blocks.layout_of(shape, 256)
        return at.grid, at.blocks, at.block

    assert of(4096, 4096) == ((4096, 8), 2, 256)
    assert of(4096, 11008) == ((4096, 8), 6, 232)  # Llama-2's MLP
    assert of(50257, 768) == ((50257, 8), 1, 96)  # GPT-2's embedding
    assert of(4096, 32, 128) == ((4096, 8, 1), 2, 256)  # an attention kernel
    assert of(3, 3, 64, 128) == ((3, 3, 8, 1), 4, 256)  # a convolution
    assert of(100) == ((1,), 1, 104)
    assert of() == ((), 1, 8)
    assert of(0, 7) == ((1, 1), 1, 8)


@given(BITS, st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_inverses(bits, eighths, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, 8 * eighths))
    packed = jax.jit(_quantize.pack, static_argnums=1)(codes.astype(np.uint8), bits)
    assert packed.shape == (3, eighths * bits)
    unpacked = jax.jit(_quantize.unpack, static_argnums=1)(packed, bits)
    np.testing.assert_array_equal(unpacked, codes)


@given(
    BITS,
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=8, max_size=8),
    st.sampled_from([1e-30, 1e-3, 1.0]),
)
def test_quantizing_errs_by_half_a_step(bits, numbers, scale):
    x = np.array([numbers], np.float32) * np.float32(scale)
    codes, ranges = QUANTIZE(x, bits)
    back = np.asarray(DEQUANTIZE(codes, ranges, bits), np.float64)
    step, _ = np.asarray(ranges, np.float64)[0]
    span = float(max(x.max(), 0)) - float(min(x.min(), 0))
    number = 2**bits - 1
    if step:
        # As narrow as bfloat16 and its margin allow; half a step off at most.
        assert span <= number * step <= span * (1.004 + 2.0**-8) * (1 + 2.0**-22)
        assert np.all(np.abs(back - x) <= step / 2)
    else:
        assert span <= number * _quantize.SMALLEST
        assert not back.any()


@pytest.mark.makes_nan
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_not_finite_has_such_a_step(bits):
    """Wherever in a row: of 4,096 elements XLA for CPU loses a NaN in maxima."""
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        x = np.where(np.eye(64, dtype=bool), np.float32(bad), np.float32(1))
        for noise in (None, np.zeros_like(x)) if bits == 4 else (None,):
            _, ranges = QUANTIZE(x, bits, noise)
            assert not np.isfinite(np.asarray(ranges, np.float32)[..., 0]).any(), bad


@given(
    BITS,
    st.booleans(),
    st.lists(st.floats(-100, 100, width=32), min_size=7, max_size=7),
    st.integers(0, 2**32 - 1),
)
def test_zero_stays_zero(bits, random, numbers, seed):
    """Among whatever other numbers, above, below or around it."""
    x = np.array([[*numbers, 0.0]], np.float32)
    noise = None
    if random:  # the largest that there is, too
        noise = np.random.default_rng(seed).random((1, 8), np.float32)
        noise = np.where(noise > 0.5, np.float32(1 - 2.0**-24), noise)
    codes, ranges = QUANTIZE(x, bits, noise)
    assert DEQUANTIZE(codes, ranges, bits)[0, -1] == 0


@given(BITS, st.integers(0, 2**32 - 1))
def test_decoding_is_exact(bits, seed):
    """With a step of 8 significant bits nothing is rounded."""
    rng = np.random.default_rng(seed)
    steps = np.abs(rng.normal(size=(3, 1))) * 10.0 ** rng.integers(-6, 6)
    zeros = rng.integers(0, 2**bits, (3, 1))
    ranges = jnp.asarray(np.concatenate([steps, zeros], -1), jnp.bfloat16)
    codes = rng.integers(0, 2**bits, (3, 16))
    packed = jax.jit(_quantize.pack, static_argnums=1)(codes.astype(np.uint8), bits)
    got = DEQUANTIZE(packed, ranges, bits)
    exact = (codes - zeros) * np.asarray(ranges, np.float64)[:, :1]
    np.testing.assert_array_equal(np.asarray(got, np.float64), exact)


@given(
    st.floats(2.0**-60, 2.0**60, width=32),
    st.integers(-255, 255),
    st.sampled_from([-0.5, 0.0, 0.5]),
    st.integers(-3, 3),
    st.sampled_from([0.0, 0.5]),
)
def test_the_multiple_is_exact_where_it_changes(step, number, part, ulps, half):
    step = np.float32(jnp.bfloat16(step))
    x = np.float32((number + part) * np.float64(step))
    x = np.float32(x + ulps * np.spacing(x))
    point, above = _quantize.multiple(jnp.float32(x), jnp.float32(step), half)
    exact = math.floor(Fraction(float(x)) / Fraction(float(step)) + Fraction(half))
    assert int(point) == exact
    assert Fraction(float(above)) == Fraction(float(x)) - exact * Fraction(float(step))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_unbiased(bits):
    x = jnp.asarray(rows(256, 1))
    number = 4000

    def once(key):
        noise = jax.random.uniform(key, x.shape, jnp.float32)
        codes, ranges = _quantize.quantize(x, bits, noise)
        return _quantize.dequantize(codes, ranges, bits), ranges

    keys = jax.random.split(jax.random.key(0), number)
    backs, ranges = jax.jit(jax.vmap(once))(keys)
    # Also at the ends. The mean of `number` draws between two points, each of which
    # deviates by half a step at most: six standard errors, for one of 256 a chance of
    # 2e-9. What float32 loses when it adds them up is far less.
    step = float(ranges[0, 0, 0])
    deviation = np.abs(np.asarray(backs, np.float64).mean(0) - x)
    assert deviation.max() <= 6 * step / 2 / number**0.5


def reference_mask(x, k):
    indices = lax.top_k(jnp.abs(x), k)[1]
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, np.asarray(indices), True, axis=-1)
    return mask


KINDS = {
    "normal": lambda b: rows(b),
    "ties": lambda b: np.round(rows(b) * 2) / 2,
    "zeros": lambda b: np.zeros_like(rows(b)),
    "equal": lambda b: np.full_like(rows(b), -3.0),
    "denormal": lambda b: rows(b) * np.float32(1e-41),
    "not finite": lambda b: np.where(
        rows(b, seed=1) > 0.8,
        np.nan,
        np.where(rows(b, seed=2) > 1, -np.inf, rows(b)),
    ).astype(np.float32),
}
FINITE = [kind for kind in KINDS if kind != "not finite"]
SELECTIONS = [  # of so many elements, how many
    *((8, 8), (96, 8), (232, 3), (1024, 3), (1024, 31)),
    *((8, 1), (1016, 250), (2048, 64)),
]
NOT_FINITE = pytest.param(["not finite"], id="not finite", marks=pytest.mark.makes_nan)


@pytest.mark.parametrize("kinds", [pytest.param(FINITE, id="finite"), NOT_FINITE])
@pytest.mark.parametrize(("b", "k"), quick(SELECTIONS, *SELECTIONS[:5], several=True))
def test_selection_is_that_of_top_k(kinds, b, k):
    """By maxima, by counting and in large blocks: the set, ties and NaN included."""
    for kind in kinds:
        x = jnp.asarray(KINDS[kind](b))
        mask = jax.jit(_topk.largest, static_argnums=1)(x, k)
        np.testing.assert_array_equal(mask, reference_mask(x, k), kind)
        positions = jax.jit(_topk.positions, static_argnums=1)(mask, k)
        expected = [np.flatnonzero(row) for row in np.asarray(mask)]
        np.testing.assert_array_equal(positions, expected, kind)


@pytest.mark.makes_nan
@pytest.mark.parametrize("k", [1, 8])
def test_strategies_find_the_same_threshold(k):
    @jax.jit
    def both(keys):
        return _topk.kth_by_maxima(keys, k), _topk.kth_by_counting(keys, k, bits=31)

    for kind in ("normal", "ties", "zeros", "not finite"):
        keys = np.abs(KINDS[kind](256)).astype(np.float32).view(np.int32)
        np.testing.assert_array_equal(*both(keys), kind)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_the_window_holds_the_last_writes(slots):
    """Slots and ages: each slot's age says when it was written."""
    written = [None] * slots
    ages = _moments.first_ages(slots)
    for count in range(20):
        for slot, when in enumerate(written):
            if when is not None:
                assert int(ages[slot]) == count - when
        written[int(_moments.oldest_start(ages, 3)) // 3] = count
        ages = _moments.older_ages(ages)
        held = sorted(w for w in written if w is not None)
        assert held == list(range(max(0, count + 1 - slots), count + 1))


def test_a_state_of_zeros_is_a_fresh_one():
    """Its slots are used in turn."""
    window = 4
    tx = scale_by_microadam(window=window, density=0.1)
    gradient = jnp.asarray(rows(100, 3))
    fresh = tx.init(gradient)
    states = [fresh, jax.tree.map(jnp.zeros_like, fresh)]
    for step in range(2 * window):
        both = [tx.update(gradient * (1 + step), state) for state in states]
        states = [state for _, state in both]
        np.testing.assert_array_equal(both[0][0], both[1][0])
        np.testing.assert_array_equal(*(state.ages for state in states))
        np.testing.assert_array_equal(*(state.values for state in states))


@pytest.mark.parametrize(("k", "slots"), [(1, 5), (7, 1), (7, 5)])
def test_moments_by_comparing_and_by_scattering(slots, k):
    rng = np.random.default_rng(0)
    indices = np.concatenate(
        [np.stack([rng.permutation(64)[:k] for _ in range(3)]) for _ in range(slots)], -1
    ).astype(np.uint8)
    values = jnp.asarray(rng.normal(size=(3, slots * k)), jnp.bfloat16)
    newest = jnp.asarray(np.where(rows(64, 3) > 1, rows(64, 3), 0))
    weights = jnp.asarray(0.9 ** np.arange(1, slots + 1), jnp.float32)
    arguments = (newest, jnp.asarray(indices, jnp.int32), values.astype(jnp.float32))
    few = _moments._compare(*arguments, weights, weights)
    many = _moments._scatter(*arguments, weights, weights)
    for one, other in zip(few, many, strict=True):
        size = np.abs(np.asarray(one)) + np.abs(np.asarray(newest)) + 4
        assert np.all(np.abs(one - other) <= (slots + 1) * 2.0**-23 * size)


@given(st.floats(0, 0.9999), st.integers(1, 10**6))
def test_debias_is_accurate(decay, count):
    decay32 = np.float32(decay)
    got = float(_moments.debias(jnp.float32(decay32), jnp.int32(count)))
    exact = float(decay32)
    log = math.log(exact) if exact else -math.inf
    expected = (1 - exact) / -math.expm1(count * log)
    assert got == pytest.approx(expected, rel=16 * 2.0**-24)


CUTS = {  # a shape, and shards
    "padded": ((64, 190), 1),
    "blocks axis": ((64 * 192,), 1),
    "prime axis, padded": ((61, 190), 1),
    "prime cells": ((2 * 6143,), 2),
}


CUT = [  # each window and way of rounding once
    ("padded", 3, False),
    ("blocks axis", 1, False),
    ("prime axis, padded", 2, True),
    ("prime cells", 2, False),
]


@pytest.mark.parametrize(
    ("axis_size", "window", "random"),
    quick(CUT, ("padded", 3, False), several=True),
)
def test_chunks_change_no_bit(axis_size, window, random, monkeypatch):
    shape, shards = CUTS[axis_size]
    tx = scale_by_microadam(
        window=window,
        density=0.04,
        block_size=64,
        shards=shards,
        stochastic_rounding=random,
        implementation="xla",
    )
    results = []
    for elements in (2**30, 1000):
        jax.clear_caches()
        monkeypatch.setattr(_chunks, "ELEMENTS", elements)
        state = tx.init(jnp.zeros(shape))
        lowered = jax.jit(tx.update).lower(jnp.zeros(shape), state)
        assert ("while" in lowered.as_text()) or elements == 2**30
        update = lowered.compile()
        for step in range(5):
            gradient = jnp.asarray(rows(math.prod(shape), 1, seed=step)).reshape(shape)
            updates, state = update(gradient, state)
        results.append((updates, state))
    jax.tree.map(np.testing.assert_array_equal, *results)
    jax.clear_caches()


def test_nothing_is_lost():
    """The error that is kept is exactly the quantized remainder."""
    tx = scale_by_microadam(window=2, density=0.1, shards=1)
    state = tx.init(jnp.zeros((4, 256)))
    error = np.zeros((4, 256), np.float32)
    for step in range(10):
        gradient = rows(256, 4, seed=step)
        accumulated = gradient + error
        _, state = jax.jit(tx.update)(gradient, state)
        largest = jax.jit(_topk.largest, static_argnums=1)(accumulated, 26)
        rest = np.where(largest, np.float32(0), accumulated)
        codes, ranges = QUANTIZE(rest, 4)
        np.testing.assert_array_equal(codes, state.codes.reshape(codes.shape))
        np.testing.assert_array_equal(ranges, state.ranges.reshape(ranges.shape))
        error = np.asarray(DEQUANTIZE(codes, ranges, 4))
        selected = accumulated - rest
        at = np.asarray(state.indices).reshape(4, 26).astype(int)
        kept = np.zeros_like(selected)
        values = np.asarray(state.values, np.float32).reshape(4, 26)
        np.put_along_axis(kept, at, values, -1)
        assert np.all(np.abs(kept - selected) <= 2.0**-8 * np.abs(selected))


def test_padding_is_never_selected():
    """However small the gradient, unless nothing else is left in the block."""
    tx = scale_by_microadam(window=3, density=0.25, shards=1)
    state = tx.init(jnp.zeros(70))  # one block of 72
    for step in range(6):
        gradient = jnp.asarray(rows(70, 1, seed=step)[0]) * 1e-30
        gradient = gradient if step > 2 else gradient * 0  # first all tie with padding
        _, state = tx.update(gradient, state)
        assert int(state.indices.max()) < 70
