"""The arrays of a state or a checkpoint, by the names on their way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

Names = tuple[str, ...]
Arrays = dict[Names, jax.ShapeDtypeStruct]
_VARIABLE = "value"  # the only array of a variable of Flax NNX


class Param(NamedTuple):
    """A parameter."""

    path: Any
    names: Names
    shape: tuple[int, ...]


def arrays_of(tree: Any, params: list[Param], wanted: Arrays) -> Arrays:
    """The arrays as they are saved, by the names that are wanted if that is all one."""
    own = {param.names for param in params}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = ((names_of(path), leaf) for path, leaf in leaves)
    return {_renamed(names, own, wanted): _as_saved(leaf) for names, leaf in named}


def _renamed(names: Names, own: set[Names], wanted: Arrays) -> Names:
    """Without an NNX variable at its end, if it is of a parameter or so wanted."""
    short = names[:-1]
    if names in wanted or names[-1:] != (_VARIABLE,):
        return names
    of_param = any(short[i:] in own for i in range(len(short) + 1))
    return short if of_param or short in wanted else names


def expected_of(tree: Any, params: Any) -> Arrays:
    """The arrays of a state that was made of these parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    variables = _are_variables(params)
    return {
        _without_variable(path) if variables else names_of(path): _as_saved(leaf)
        for path, leaf in leaves
    }


def params_of(tree: Any) -> list[Param]:
    """The parameters; variables of NNX are what they hold."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    variables = _are_variables(tree)
    return [
        Param(path, _without_variable(path) if variables else names_of(path), x.shape)
        for path, x in ((path, _as_saved(leaf)) for path, leaf in leaves)
    ]


def names_of(path: Any) -> Names:
    """A path without the types of its containers, of which a checkpoint keeps none."""
    return tuple(jax.tree_util.keystr((x,), simple=True) for x in path)


def check_arrays(found: Arrays, wanted: Arrays) -> None:
    """Raises ValueError that names the first array in which they differ."""
    for at, array in wanted.items():
        if at not in found:
            have, need = "nothing", f"an array of shape {array.shape}"
        elif found[at].shape != array.shape:
            have, need = found[at].shape, f"an array of shape {array.shape}"
        elif found[at].dtype != array.dtype:
            have, need = found[at].dtype.name, array.dtype.name
        else:
            continue
        raise ValueError(
            f"The saved optimizer state has {have} at {'/'.join(at)}, where this "
            f"transformation has {need}."
        )
    extra = next((at for at in found if at not in wanted), None)
    if extra is not None:
        raise ValueError(
            f"The saved optimizer state has an array at {'/'.join(extra)}, where this "
            "transformation has none."
        )


def _are_variables(params: Any) -> bool:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return all(path and path[-1] == GetAttrKey(_VARIABLE) for path, _ in leaves)


def _without_variable(path: Any) -> Names:
    if path and path[-1] == GetAttrKey(_VARIABLE):
        path = path[:-1]
    return names_of(path)


def _as_saved(leaf: Any) -> jax.ShapeDtypeStruct:
    """Of a typed PRNG key its raw data, of a Python number the array it becomes."""
    shape = tuple(leaf.shape) if hasattr(leaf, "shape") else jnp.shape(leaf)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))
