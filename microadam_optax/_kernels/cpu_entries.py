"""The selected elements and the window of a block in plain loops, and their update."""

from numba.core.types import int32

from microadam_optax._kernels.cpu_data import (
    ZERO,
    from_bfloat16,
    index_of,
    inline,
    lane_of,
    read_index,
    round_bfloat16,
    round_product,
    to_bfloat16,
    write_index,
)
from microadam_optax._kernels.cpu_llvm import (
    WORD,
    above,
    bits_of,
    choose,
    count_bits,
    float_of,
    lowest_bit,
    root,
    shifted,
)

AT_ONCE = 8  # bits of a mask without a branch


@inline
def take(s, shape, bar):
    """The selected elements as bfloat16, by ascending index, out of a."""
    n = 0
    for word in range(0, shape.all, WORD):
        mask = above(shifted(s.keys, word), bar)
        i, n = n, n + count_bits(mask)
        while True:
            for _ in range(AT_ONCE):  # what is too much is written over, or never read
                s.entries[i] = word + lowest_bit(mask)
                mask &= mask - 1
                i += 1
            if mask == 0:
                break
    for i in range(shape.k):
        lane = s.entries[i]
        s.seconds[i] = s.x[lane]
        s.x[lane] = ZERO
    for i in range(shape.k):
        s.firsts[i] = round_bfloat16(s.seconds[i])


@inline
def add_newest(s, shape):
    for i in range(shape.k):
        lane, value = s.entries[i], s.firsts[i]
        s.mu[lane], s.nu[lane] = value, value * value


@inline
def add_older(row, s, shape):
    """The window's entries, slot after slot: weights times values and their squares."""
    k, stored = shape.k, shape.slots * shape.k
    for i in range(stored):
        value = from_bfloat16(row.values[i])
        s.firsts[k + i] = round_product(s.mu_weights[i] * value)
        s.seconds[k + i] = round_product(s.nu_weights[i] * (value * value))
    for i in range(stored):
        lane = lane_of(read_index(row, shape, i), shape)
        s.entries[k + i] = lane
        s.mu[lane] += s.firsts[k + i]
        s.nu[lane] += s.seconds[k + i]


@inline
def update_entries(s, factors, shape):
    """Of all entries at once: roots and divisions go by vectors."""
    entries = (shape.slots + 1) * shape.k
    for i in range(entries):
        s.firsts[i] = s.mu[s.entries[i]]
        s.seconds[i] = s.nu[s.entries[i]]
    for i in range(entries):
        s.firsts[i] = rescale(s.firsts[i], s.seconds[i], factors)
    for i in range(entries):
        lane = s.entries[i]
        s.update[lane] = s.firsts[i]
        s.mu[lane] = s.nu[lane] = ZERO


@inline
def update_selected(s, factors, shape, bar):
    """Without a window: the selected elements' updates, and what is left of a."""
    for i in range(shape.all):
        selected = s.keys[i] > bar
        value = choose(selected, round_bfloat16(s.x[i]), ZERO)
        s.x[i] = float_of(int32(bits_of(s.x[i]) & (int32(selected) - 1)))
        s.update[i] = rescale(value, value * value, factors)


@inline
def rescale(mu, nu, factors):
    """Adam's update."""
    nu = (nu + factors.eps_root) * factors.debias_nu
    return (mu * factors.debias_mu) / (root(nu) + factors.eps)


@inline
def write_slot(row, s, shape):
    """What was selected, over the oldest slot."""
    for i in range(shape.k):
        write_index(row, shape, shape.start + i, index_of(s.entries[i], shape))
        row.values[shape.start + i] = to_bfloat16(s.firsts[i])
