"""What the benchmarks share: named shapes, settings, and how results are kept."""

import json
import pathlib
import platform
import sys

import jax
import optax

from microadam_optax import scale_by_microadam

SETTINGS = {
    "(10, 1 %)": {"window": 10, "density": 0.01},
    "(2, 6 %)": {"window": 2, "density": 0.06},
    "(1, 12 %)": {"window": 1, "density": 0.12},
}


def llama2_7b() -> dict[str, tuple[int, ...]]:
    """Parameter shapes of Llama-2-7B (6,738,415,616 parameters)."""
    layer = {
        **dict.fromkeys(("q", "k", "v", "o"), (4096, 4096)),
        "gate": (4096, 11008),
        "up": (4096, 11008),
        "down": (11008, 4096),
        "norm_attention": (4096,),
        "norm_mlp": (4096,),
    }
    shapes = {f"{i}.{name}": shape for i in range(32) for name, shape in layer.items()}
    return {"embed": (32000, 4096), **shapes, "norm": (4096,), "head": (4096, 32000)}


def gpt2_small() -> dict[str, tuple[int, ...]]:
    """Parameter shapes of GPT-2 small (124,439,808 parameters)."""
    layer = {
        "qkv": (768, 2304),
        "qkv_bias": (2304,),
        "out": (768, 768),
        "out_bias": (768,),
        "up": (768, 3072),
        "up_bias": (3072,),
        "down": (3072, 768),
        "down_bias": (768,),
        **{f"norm{i}_{part}": (768,) for i in (1, 2) for part in ("scale", "bias")},
    }
    shapes = {f"{i}.{name}": shape for i in range(12) for name, shape in layer.items()}
    norm = {"norm_scale": (768,), "norm_bias": (768,)}
    return {"embed": (50257, 768), "positions": (1024, 768), **shapes, **norm}


def abstract(shapes: dict[str, tuple[int, ...]], dtype="float32"):
    """The same as arrays of which only shape and dtype exist."""
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def size_in_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def transformations() -> dict[str, optax.GradientTransformation]:
    """MicroAdam at its settings; the learning rate is not part of what is compared."""
    return {name: scale_by_microadam(**kw) for name, kw in SETTINGS.items()}


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
        "command": " ".join(["python", *sys.argv]),
    }


def report(name: str, results: dict, folder: str | None = None) -> None:
    """Writes NAME.json, with the machine it was measured on, to benchmarks/results."""
    own = pathlib.Path(__file__).parent / "results"
    path = pathlib.Path(folder or own) / f"{name}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"written: {path.parent.name}/{path.name}")
