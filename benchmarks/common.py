"""What the benchmarks share: named shapes, settings, and how results are kept."""

import json
import pathlib
import platform
import shlex
import sys

import jax
import jax.numpy as jnp
import optax

from microadam_optax import PAPER, scale_by_microadam

SETTINGS = {  # (window, density); the first is the default
    "(2, 6 %)": {},
    "(1, 25 %)": {"window": 1, "density": 0.25},
    "(10, 1 %), all compressed": PAPER,
}


def transformations() -> dict[str, optax.GradientTransformation]:
    """MicroAdam at its settings; the learning rate is not part of what is compared."""
    return {name: scale_by_microadam(**kw) for name, kw in SETTINGS.items()}


def with_float32_state(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """optax's own moments have the dtype of the parameters."""

    def init(params):
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params):
        new, state = tx.update(updates, state, params)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), new, updates), state

    return optax.GradientTransformation(init, update)


def machine() -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if "model name" in x]
        processor = f"{names[0].split(':')[1].strip()}, {len(names)} cores"
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor,
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.argv]),
    }


def report(name: str, results: dict, folder: str | None = None, say: bool = True) -> None:
    """Writes NAME.json, with the machine it was measured on, to benchmarks/results."""
    own = pathlib.Path(__file__).parent / "results"
    path = pathlib.Path(folder or own) / f"{name}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    if say:
        print(f"written: {path.parent.name}/{path.name}")
