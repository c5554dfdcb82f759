"""Checkpoints of a run with what decides it, so that it goes on as the same run."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

RUN = "run.json"  # beside the checkpoints
KEPT = 2  # checkpoints


class Saved(NamedTuple):
    """What a checkpoint holds: arrays, and a record that JSON can write."""

    step: int
    params: Any
    state: Any
    record: dict[str, Any]


def check(folder: pathlib.Path, decided: dict[str, Any]) -> None:
    """Whether a run can begin or go on there; nothing is written.

    Raises:
      ValueError: the folder has a run that something else decided, or other files.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    file = folder / RUN
    if not file.exists():
        raise ValueError(f"{folder} is not empty and has no {RUN}: choose another folder")
    try:
        found = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file} cannot be read: it is no JSON") from None
    if not isinstance(found, dict) or not all(x.startswith("--") for x in found):
        raise ValueError(f"{file} is of another program: choose another folder")
    if [x.name for x in folder.iterdir()] == [RUN]:
        return  # of a run that ended before its first checkpoint
    for name in decided:
        before, now = (began(name, x.get(name)) for x in (found, decided))
        if before != now:
            raise ValueError(
                f"--checkpoints: the run in {folder} began {before}, this one {now}: go "
                "on with what it began with, or choose another folder"
            )


def began(name: str, value: str | None) -> str:
    """An argument as a user would write it."""
    if value in ("None", "False", None):
        return f"without {name}"
    return f"with {name}" if value == "True" else f"with {name} {value}"


def open_checkpoints(
    folder: pathlib.Path, decided: dict[str, Any]
) -> ocp.CheckpointManager:
    """The folder's checkpoints; what decides the run is written beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f".{RUN}"
    half.write_text(json.dumps(decided, indent=1) + "\n")
    os.replace(half, folder / RUN)
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=KEPT),
        item_names=("params", "state", "record"),
    )


def save(manager: ocp.CheckpointManager, saved: Saved) -> None:
    """Returns when it is written, since a step may take the arrays over."""
    arguments = ocp.args.Composite(
        params=ocp.args.StandardSave(saved.params),
        state=ocp.args.StandardSave(saved.state),
        record=ocp.args.JsonSave(saved.record),
    )
    manager.save(saved.step, args=arguments)
    manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, params: Any, state: Any) -> Saved | None:
    """The last checkpoint, None if there is none.

    Args:
      manager: of `open_checkpoints`.
      params: shapes with shardings.
      state: the same of the optimizer's state.

    Raises:
      ValueError: it is damaged.
    """
    last = manager.latest_step()
    if last is None:
        return None
    arguments = ocp.args.Composite(
        params=ocp.args.StandardRestore(params),
        state=ocp.args.StandardRestore(state),
        record=ocp.args.JsonRestore(),
    )
    with readable(manager, last):
        found = manager.restore(last, args=arguments)
    return Saved(last, found.params, found.state, found.record)


def shapes(tree: Any) -> Any:
    """Of arrays, with their shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


@contextlib.contextmanager
def readable(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Says of a damaged checkpoint which one it is, and where to go on without it."""
    try:
        yield
    except (MemoryError, PermissionError):  # it may be sound
        raise
    except Exception as error:
        before = [x for x in manager.all_steps() if x < step]
        rest = f"from step {max(before)}" if before else "from the beginning"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        reason = re.split(r": \(slice| See full", reason)[0][:200]  # TensorStore's debris
        raise ValueError(
            f"the checkpoint {manager.directory / str(step)} cannot be read: move it "
            f"away to go on {rest} ({reason})"
        ) from error
