"""`diagnostics` against plain NumPy, and on every kind of state.

If it fails, a user is told of a healthy error where there is none, or the reverse.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compressed import microadam, scale_by_microadam
from meshes import make_mesh
from microadam_optax import diagnostics, smaller_than
from quick import quick

SHAPES = {"w": (6, 200), "odd": (13,), "b": (3, 5, 40)}
KINDS = (AxisType.Auto, AxisType.Explicit)
SETTINGS = {"window": 4, "density": 0.05}


def gradients(step):
    rng = np.random.default_rng(step)
    return {
        name: jnp.asarray(rng.standard_normal(s, np.float32))
        for name, s in SHAPES.items()
    }


def steps_of(tx, steps, make=gradients):
    params = jax.tree.map(np.zeros_like, make(0))
    state = tx.init(params)
    for step in range(steps):
        given = make(step)
        updates, state = jax.jit(tx.update)(given, state, params)
        yield given, updates, state


def run(tx, steps, make=gradients):
    return list(steps_of(tx, steps, make))[-1]


def figures_of(given, updates, state):
    return jax.jit(diagnostics)(state, given, updates)


def stored_error(codes, ranges, bits):
    """float64 of the packed codes: the first codes of a row lie in the lowest bits."""
    codes, ranges = np.asarray(codes), np.asarray(ranges, np.float64)
    parts = [codes >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    step, zero = ranges[..., :1], ranges[..., 1:]
    return (np.concatenate(parts, -1) - zero) * step


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64).ravel())


@pytest.mark.parametrize("bits", quick([2, 4], 4))
def test_norms_and_shares(bits):
    tx = scale_by_microadam(error_bits=bits, **SETTINGS)
    given, updates, state = run(tx, 6)
    found = figures_of(given, updates, state)
    squares = 0.0
    for name, shape in SHAPES.items():
        one = found.leaves[name]
        cells = np.prod(shape) // np.prod(state.codes[name].shape[:-2])
        error = stored_error(state.codes[name], state.ranges[name], bits)
        error = error.reshape(*error.shape[:-2], -1)[..., : int(cells)]
        squares += norm(error) ** 2
        assert one.error_norm == pytest.approx(norm(error), rel=2**-16)
        assert one.gradient_norm == pytest.approx(norm(given[name]), rel=1e-5)
        assert one.update_norm == pytest.approx(norm(updates[name]), rel=1e-5)
        ratio = norm(error) / norm(given[name])
        assert one.error_over_gradient == pytest.approx(ratio, rel=2**-16)
        moving = np.mean(np.asarray(updates[name]) != 0)
        assert one.nonzero_updates == pytest.approx(moving, rel=1e-6)
    assert found.total.error_norm == pytest.approx(np.sqrt(squares), rel=2**-16)
    everything = np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)])
    assert found.total.update_norm == pytest.approx(norm(everything), rel=1e-5)
    assert found.total.nonzero_updates == pytest.approx(
        np.mean(everything != 0), rel=1e-6
    )


@pytest.mark.parametrize("bits", quick([2, 8], 8))
def test_expected_rounding_is_near_the_true_one(bits):
    """The first error is the rest of the gradient rounded once: both can be had."""
    shape = (64, 512)
    given = jax.random.uniform(jax.random.key(0), shape)  # spread evenly in each block
    tx = scale_by_microadam(window=1, density=0.01, error_bits=bits)
    updates, state = tx.update(given, tx.init(given))
    found = figures_of(given, updates, state).total
    blocks = state.codes.shape[:-1]
    error = stored_error(state.codes, state.ranges, bits)
    rest = np.where(np.asarray(updates) == 0, np.asarray(given), 0).reshape(*blocks, -1)
    kept = rest != 0
    true = norm((rest - error)[kept]) / norm(error)
    assert found.quantization_over_error == pytest.approx(true, rel=0.1)


def test_window_and_repeated_selection():
    """The same few entries tower over the others: they are selected in each step."""

    def towering(_):
        return {"w": np.where(np.arange(64) == 5, 1e3, np.full((4, 64), 1e-3, "f"))}

    steps = list(steps_of(scale_by_microadam(window=3, density=1 / 64), 5, towering))
    for step, filled, again in [(1, 0.5, 0.0), (2, 1.0, 1.0), (5, 1.0, 1.0)]:
        found = figures_of(*steps[step - 1]).leaves["w"]
        assert float(found.window_filled) == filled
        assert float(found.selected_again) == again
        assert float(found.nonzero_updates) == 1 / 64


def test_other_entries_are_no_repetition():
    def moving(step):
        return {"w": jnp.zeros((4, 64)).at[:, step].set(1.0)}

    found = figures_of(*run(scale_by_microadam(window=4, density=1 / 64), 8, moving))
    found = found.total
    assert float(found.selected_again) == 0
    assert float(found.nonzero_updates) == 4 / 64
    assert float(found.error_norm) == 0


@pytest.mark.parametrize("window", [1, 2])
def test_short_windows_cannot_tell_all(window):
    found = figures_of(*run(scale_by_microadam(window=window, density=0.1), 3)).total
    assert np.isnan(found.selected_again)
    assert np.isnan(found.window_filled) == (window == 1)


@pytest.mark.makes_nan
@pytest.mark.parametrize("which", ["gradients", "updates"])
def test_one_of_both_is_enough(which):
    given, updates, state = run(microadam(1.0, **SETTINGS), 3)
    whole = diagnostics(state, given, updates)
    part = diagnostics(state, **{which: {"gradients": given, "updates": updates}[which]})
    assert part.total.error_norm == whole.total.error_norm
    assert np.isnan(part.total.update_norm) == (which == "gradients")
    assert np.isnan(part.total.error_over_gradient) == (which == "updates")


@pytest.mark.promotes
def test_in_a_chain_and_jitted():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), microadam(0.1, dense=smaller_than(20), **SETTINGS)
    )
    given, updates, state = run(tx, 3)
    found = jax.jit(diagnostics)(state, given, updates)
    assert set(found.leaves) == {"w", "b"}  # the other one is dense
    eager = diagnostics(state, given, updates)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_several_parts_of_a_partition():
    labels = {"w": "long", "odd": "short", "b": "short"}
    parts = {"long": microadam(0.1), "short": microadam(0.1, window=1, density=0.2)}
    found = figures_of(*run(optax.partition(parts, labels), 3))
    assert set(found.leaves) == {"w", "odd", "b"}


def test_paths_that_read_alike():
    """None is dropped or takes the other's gradient; where they differ, slashes stay."""
    params = {"a/b": jnp.ones(64), "a": {"b": jnp.zeros(64)}, "c": {"d": jnp.ones(64)}}
    tx = scale_by_microadam(window=1, density=0.1)
    updates, state = tx.update(params, tx.init(params))
    found = figures_of(params, updates, state)
    assert set(found.leaves) == {"['a/b']", "['a']['b']", "c/d"}
    norms = {at: float(one.gradient_norm) for at, one in found.leaves.items()}
    assert norms == {"['a/b']": 8, "['a']['b']": 0, "c/d": 8}
    assert found.total.gradient_norm == pytest.approx(8 * 2**0.5)
    # One of both is enough to be compressed: it is found by its own path.
    one = microadam(1.0, dense={"a/b": True, "a": False, "c": True})
    alone = diagnostics(one.init(params), params)
    assert float(alone.leaves["a/b"].gradient_norm) == 0


def test_errors():
    given, updates, state = run(microadam(1.0, **SETTINGS), 1)
    with pytest.raises(ValueError, match="needs `gradients` or `updates`"):
        diagnostics(state)
    with pytest.raises(ValueError, match="no MicroAdamState in `state`"):
        diagnostics(optax.adam(1.0).init(given), given)
    with pytest.raises(ValueError, match=r"Nothing is given for \['b'\]"):
        diagnostics(state, {"w": given["w"], "odd": given["odd"]})
    with pytest.raises(
        ValueError, match=r"of \['odd'\] is not that of an array of shape"
    ):
        diagnostics(state, updates={**updates, "odd": jnp.zeros((99,))})


@pytest.mark.parametrize("kind", quick(KINDS, AxisType.Explicit))
def test_on_a_mesh(kind):
    """Sharded state, gradients and updates give the figures of one device."""
    mesh = make_mesh("fsdp 4, tp 2", kind)
    given = jax.random.normal(jax.random.key(0), (16, 512))
    tx = scale_by_microadam(window=3, density=0.05)

    def figures(gradients):
        state = tx.init(gradients)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(gradients, state)
        return jax.jit(diagnostics)(state, gradients, updates)

    alone = figures(given)
    with jax.set_mesh(mesh):
        own = NamedSharding(mesh, P("fsdp", "tp"))
        sharded = figures(jax.device_put(given, own))
    # Sums of up to 8192 squares in another order.
    chex.assert_trees_all_close(sharded, alone, rtol=2**-23 * 8192**0.5)
