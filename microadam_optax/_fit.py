"""What the shapes of a state tell of how it was made, and whether it fits a gradient."""

import math
import operator
from typing import Any, NamedTuple

import jax

from microadam_optax._blocks import Layout, block_of, layout
from microadam_optax._checks import name
from microadam_optax._state import (
    LeafState,
    MicroAdamState,
    Moments,
    Settings,
    is_masked,
    shapes,
)


class Form(NamedTuple):
    """What the shapes of a leaf's state tell of how it was made."""

    window: int
    bits: int
    block: int  # elements in a block, at most `block_size`
    k: int | None  # entries selected in a block; None at window 1
    grid: tuple[int, ...]


def form_of(shape: tuple[int, ...], state: LeafState, window: int) -> Form | None:
    """The form of a state given as shapes; None if it is not that of such a leaf."""
    if any(x is not None and len(x) != len(shape) + 2 for x in state):
        return None
    *grid, blocks, width = state.codes
    divides = all(n and size % n == 0 for size, n in zip(shape, grid, strict=True))
    kept = state.indices is not None
    if not divides or not blocks or kept != (window > 1):
        return None
    block = block_of(Layout(shape, tuple(grid), blocks, 0).cell, blocks)
    bits, rest = divmod(width * 8, block)
    k = None
    if kept:
        k, no_k = divmod(state.indices[-1], window - 1)
        rest += no_k
    form = Form(window, bits, block, k, tuple(grid))
    settings = Settings(window, (k or 1) / block, 0, bits, 0.0)
    at = Layout(shape, form.grid, blocks, block)
    return form if not rest and state == shapes(at, settings) else None


def check_structure(updates: Any, state: Any) -> None:
    """Raises an error if the gradients are not a tree like the state's."""
    if not isinstance(state, MicroAdamState):
        raise TypeError(
            "The optimizer state must be a MicroAdamState, got a "
            f"{type(state).__name__}: it was made by another transformation or by an "
            "earlier version, or restored without its structure."
        )

    def kept(codes: Any, mu: Any) -> Any:
        return mu if is_masked(codes) else codes

    state_tree = state.codes
    if state.mu is not None:
        state_tree = jax.tree.map(kept, state.codes, state.mu, is_leaf=is_masked)
    structures: list[Any] = [jax.tree.structure(x) for x in (updates, state_tree)]
    if structures[0] == structures[1]:
        return
    given, known = (
        [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (updates, state_tree)
    )
    missing = [name(path) for path in known if path not in given]
    extra = [name(path) for path in given if path not in known]
    if missing:
        difference = f"there is no gradient for {missing[0]}"
    elif extra:
        difference = f"the state knows no {extra[0]}"
    else:
        difference = "the containers differ in type"
    raise ValueError(
        "The gradient tree does not match the optimizer state: "
        f"{difference} ({len(given)} leaves given, {len(known)} in the state)."
    )


def check_key(key: Any, stochastic_rounding: bool) -> None:
    """Raises ValueError if a state was made for the other way of rounding."""
    if (key is not None) != stochastic_rounding:
        raise ValueError(
            "The optimizer state was made with `stochastic_rounding` "
            f"{key is not None}, but this transformation has {stochastic_rounding}."
        )


def check_not_transposed(updates: Any, params: Any) -> None:
    """Raises ValueError if a gradient is transposed: it may fit the state, too."""
    for path, gradient in jax.tree_util.tree_leaves_with_path(updates):
        given = jax.numpy.shape(gradient)
        known = params.get(path, given)
        if given != known and sorted(given) == sorted(known):
            raise ValueError(
                f"The gradient of {name(path)} has the shape {given}, but its parameter "
                f"{known}."
            )


def check_state(
    path: Any,
    shape: tuple[int, ...],
    state: LeafState | Moments,
    ages: Any,
    settings: Settings,
    dense: bool,
) -> Layout | None:
    """The layout of a leaf, None if it is dense; ValueError if the state is not its."""
    if isinstance(state, Moments) and state.mu.shape != shape:
        raise ValueError(_other_shape(path, state.mu.shape, shape))
    if isinstance(state, LeafState) and dense:
        check_made_for(path, shape, state, ages, settings)
    if isinstance(state, Moments) != dense:
        raise ValueError(
            f"The optimizer state of {name(path)} is "
            + ("compressed, but `dense` names" if dense else "dense, but `dense` lacks")
            + " it: it was made with another `dense`"
            + (" (None compresses every leaf), or for another shape." if dense else ".")
        )
    if isinstance(state, Moments):
        return None
    found, made, asked, at = _forms(shape, state, ages, settings)
    check_form(path, shape, found, made, asked)
    return at


def check_made_for(
    path: Any, shape: tuple[int, ...], state: LeafState, ages: Any, settings: Settings
) -> None:
    """Raises ValueError if a compressed leaf's state tells of another shape."""
    found, made, asked, _ = _forms(shape, state, ages, settings)
    other = shape_of(found, shape, asked) if made is None else None
    if other:
        raise ValueError(_other_shape(path, other, shape))


def _forms(
    shape: tuple[int, ...], state: LeafState, ages: Any, settings: Settings
) -> tuple[LeafState, Form | None, Form, Layout]:
    """Shapes of a state, what they tell, what is asked, and the layout of that."""
    window = 1 if ages is None else ages.size + 1
    found = LeafState(*(None if x is None else x.shape for x in state))
    made = form_of(shape, found, window)
    at = layout(shape, settings.block_size, grid=made.grid if made else None)
    k = settings.k(at.block) if settings.window > 1 else None
    asked = Form(settings.window, settings.bits, at.block, k, at.grid)
    return found, made, asked, at


def check_form(
    path: Any,
    shape: tuple[int, ...],
    state: LeafState,
    made: Form | None,
    asked: Form,
) -> None:
    """Raises ValueError that names what differs, as it was made and as it is asked.

    Args:
      path: of the leaf.
      shape: of its gradient.
      state: shapes of its state.
      made: what they tell if they are those of such a leaf.
      asked: what this transformation makes of it.
    """
    words = {
        "window": "`window` {}",
        "bits": "`error_bits` {}",
        "block": "blocks of {} elements (`block_size`)",
        "k": "{} entries selected in a block (`density`)",
        "grid": "grid {} (`shards` or `grid`)",
    }
    if made == asked:
        return
    differ = [x for x in Form._fields if made and getattr(made, x) != getattr(asked, x)]
    if made and len(differ) > 1 and None in (made.k, asked.k):
        differ = [x for x in differ if x != "k"]  # a window of 1 does not tell
    other = shape_of(state, shape, asked)
    if other and len(differ) != 1:
        raise ValueError(_other_shape(path, other, shape))
    if made is None:
        raise ValueError(
            f"The optimizer state of {name(path)} is not that of a gradient of shape "
            f"{shape}; its arrays have the shapes {state}."
        )
    then, now = (
        " and ".join(words[x].format(getattr(form, x)) for x in differ)
        for form in (made, asked)
    )
    unless = f", or the leaf had the shape {other}" if other else ""
    raise ValueError(
        f"The optimizer state of {name(path)} was made with {then}, but this "
        f"transformation has {now}{unless}."
    )


def shape_of(
    state: LeafState, like: tuple[int, ...], asked: Form
) -> tuple[int, ...] | None:
    """The shape of a leaf with this state in a form as asked, None if there is none.

    Such as that of a model with another width, or another vocabulary: of all shapes
    that differ from `like` in one axis, or before it as the grid tells, the nearest. If
    cells are padded, the largest that fits.
    """
    *grid, blocks, width = state.codes
    block, rest = divmod(width * 8, asked.bits)
    if rest or not blocks or len(grid) != len(like) or not _same_density(state, asked):
        return None
    found = []
    for axis in reversed(range(len(grid))):
        for lead in (like[:axis], tuple(grid[:axis])):
            others = lead + like[axis + 1 :]
            cuts = grid[:axis] + grid[axis + 1 :]
            if any(map(operator.mod, others, cuts)) or not math.prod(others):
                continue
            inner = math.prod(map(operator.floordiv, others, cuts))
            size = blocks * block // inner
            if size and block_of(size * inner, blocks) == block:
                found.append((*lead, grid[axis] * size, *like[axis + 1 :]))
    if like in found:
        return None
    differing = [sum(map(operator.ne, shape, like)) for shape in found]
    return min(zip(differing, found, strict=True), default=(0, None))[1]


def _same_density(state: LeafState, asked: Form) -> bool:
    """Whether a state has as many entries as in a form, up to their rounding."""
    if asked.k is None or state.indices is None:
        return asked.k is None and state.indices is None
    block = state.codes[-1] * 8 // asked.bits
    k, rest = divmod(state.indices[-1], asked.window - 1)
    return not rest and abs(k * asked.block - asked.k * block) <= max(block, asked.block)


def _other_shape(path: Any, made: tuple[int, ...], given: tuple[int, ...]) -> str:
    return (
        f"The optimizer state of {name(path)} is that of a leaf of shape {made} (up to "
        f"padding), but this leaf has the shape {given}."
    )
