"""Runs an implementation side by side with the oracle."""

import jax
import jax.numpy as jnp
import numpy as np

import oracle


def state_blocks(state, bits):
    """The package's state of the only leaf as a list of the oracle's blocks."""
    count = int(state.count)
    codes = np.asarray(state.codes)
    codes = codes.reshape(-1, codes.shape[-1])
    parts = [(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    codes = np.concatenate(parts, axis=-1).tolist()
    ranges = np.asarray(state.ranges, np.float64).reshape(-1, 2).tolist()
    newest = [[] for _ in codes]
    if state.indices is not None:
        indices = np.asarray(state.indices)
        indices = indices.reshape(len(codes), -1)
        values = np.asarray(state.values, np.float64).reshape(len(codes), -1)
        return codes, ranges, indices, values, count
    return codes, ranges, newest, newest, count


def other_block(row, parts, slots):
    codes, ranges, indices, values, count = parts
    window = []
    for age in range(min(count, slots)):
        k = len(indices[row]) // slots
        slot = (count - 1 - age) % slots
        at = slice(slot * k, (slot + 1) * k)
        assert np.all(np.diff(indices[row][at].astype(int)) > 0), "not ascending"
        entries = zip(indices[row][at].tolist(), values[row][at].tolist(), strict=True)
        window.append(dict(entries))
    step, zero = ranges[row]
    points = [code - int(zero) for code in codes[row]]
    return oracle.Block(points, step, int(zero), window)


def draws(seed, count, row, b):
    """The documented randomness: key, step, leaf, draw, row."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), 0)
    for draw in (0, 1):
        at = jax.random.fold_in(jax.random.fold_in(key, draw), row)
        yield np.asarray(jax.random.uniform(at, (b,), jnp.float32), np.float64).tolist()


def follow(update, state, stream, options, seed=None):
    """Steps through the gradients of a leaf; the number of decisions.

    Args:
      update: from a gradient and a state to an update and a new state.
      state: before the first step.
      stream: the gradients.
      options: the oracle's.
      seed: of stochastic rounding; None rounds to nearest.
    """
    decisions = 0
    mine = None
    for count, gradient in enumerate(stream):
        if mine is None:
            elements, b = oracle.blocks_of(gradient.shape, options)
            mine = [oracle.new_block(b) for _ in elements]
            share = oracle.share_selected(elements, b, options)
        flat = np.asarray(gradient, np.float64).ravel()
        updates, state = update(gradient, state)
        assert updates.dtype == gradient.dtype
        got = np.asarray(updates, np.float64).ravel()
        parts = state_blocks(state, options.bits)
        limits = jnp.finfo(gradient.dtype)
        for row, where in enumerate(elements):
            noise = (None, None)
            if seed is not None:
                noise = tuple(draws(seed, count, row, b))
            want, tolerance, mine[row] = oracle.step(
                flat[where], mine[row], count, options, share, noise
            )
            oracle.agree(mine[row], other_block(row, parts, options.window - 1))
            want = np.clip(want, -float(limits.max), float(limits.max))
            rounding = float(limits.eps) * np.abs(want)
            rounding += float(limits.smallest_subnormal)
            assert np.all(np.abs(got[where] - want) <= np.add(tolerance, rounding))
            decisions += len(where) + 3
    return decisions
