"""Small errors put into a copy of the package: does a test fail for each of them?

python reliability/mutations.py                      # all of them, half an hour
python reliability/mutations.py --only "error not added back"

The tests that are most likely to catch an error run first. Where they pass, the whole
suite runs until one fails. What survives that is an error a user could get unnoticed.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from tqdm import tqdm

ROOT = pathlib.Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "_build", "results")


class Mutation(NamedTuple):
    """A text of a file in the package, what stands there instead, and who may see it."""

    file: str
    old: str
    new: str
    tests: str  # an argument of pytest
    which: int = 0  # of the places where it stands
    also: tuple[str, str] | None = None  # another text, and what stands there instead

    def applied(self, text: str) -> str:
        pairs = [(self.old, self.new)] + ([self.also] if self.also else [])
        for old, new in pairs:
            parts = text.split(old)
            assert len(parts) > self.which + 1, old
            before, after = parts[: self.which + 1], parts[self.which + 1 :]
            text = old.join(before) + new + old.join(after)
        return text


ORACLE = "tests/test_oracle.py::test_options"
DEFAULTS = f"{ORACLE}[defaults]"
WINDOW_3 = f"{ORACLE}[window 3]"
LITERAL = f"{ORACLE}[literal]"
ALPHA = f"{ORACLE}[alpha]"
RANDOM = f"{ORACLE}[stochastic]"
ADAM = "tests/test_adam.py::test_density_1_within_the_window_is_adam"
LIMIT = "tests/test_cpu_kernel.py::test_hostile_numbers[float32-2]"
KERNELS = "tests/test_kernels.py::test_trajectories_are_those_of_xla"
LAYERS = "tests/test_layerwise.py::test_it_is_the_ordinary_step"
BFLOAT16 = "tests/test_layerwise_bfloat16.py::test_it_is_the_ordinary_step"
MICRO = "tests/test_accumulate.py::test_error_takes_up_micro_batches"
PLANNED = "tests/test_planner_ways.py::test_a_compiled_step"
OURS = "MicroAdam (2, 6 %), 4 bits"
DECAY = "tests/test_trees.py::test_weight_decay_and_mask"

MUTATIONS = {
    "products not rounded before they are added": Mutation(
        "_moments.py",
        "return round_to(product, 22)",
        "return product",
        "tests/test_cpu_kernel.py::test_random_leaves",
    ),
    "selected values not rounded to bfloat16": Mutation(
        "_step.py", "_moments.round_to(accumulated, 7)", "accumulated", WINDOW_3
    ),
    "quantization step not rounded": Mutation(
        "_quantize.py",
        "lax.reduce_precision((high - low) * jnp.float32(ABOVE / steps), 8, 7)",
        "(high - low) * jnp.float32(ABOVE / steps)",
        DEFAULTS,
    ),
    "quantization range without zero": Mutation(
        "_quantize.py",
        "high = jnp.maximum(_most(x, jnp.int32), 0)",
        "high = _most(x, jnp.int32)",
        "tests/test_parts.py::test_quantizing_errs_by_half_a_step",
    ),
    "codes packed in the other order": Mutation(
        "_quantize.py",
        "packed |= codes[..., part * width : (part + 1) * width] << (bits * part)",
        "packed = packed << bits | codes[..., part * width : (part + 1) * width]",
        DEFAULTS,
    ),
    "codes packed and unpacked in the other order": Mutation(
        "_quantize.py",
        "    packed = codes[..., :width]\n",
        "    order = range(width * 8 // bits - 1, -1, -1)\n"
        "    codes = codes[..., jnp.array(order)]\n"
        "    packed = codes[..., :width]\n",
        DEFAULTS,
        also=("concatenate(parts, axis=-1)", "concatenate(parts, axis=-1)[..., ::-1]"),
    ),
    "another default density of scale_by_microadam": Mutation(
        "_microadam.py", "density: float = 0.06", "density: float = 0.05", DEFAULTS
    ),
    "another default density of microadam": Mutation(
        "_microadam.py",
        "density: float = 0.06",
        "density: float = 0.05",
        "tests/test_trees.py::test_defaults",
        which=1,
    ),
    "initial indices all zero": Mutation(
        "_state.py",
        "of.indices, dtype) + slots",
        "of.indices, dtype) + 0 * slots",
        "tests/test_invariants.py::test_no_position_stands_twice_in_a_slot",
    ),
    "ages one too high": Mutation(
        "_moments.py",
        "jnp.arange(slots, 0, -1, ",
        "jnp.arange(slots + 1, 1, -1, ",
        WINDOW_3,
    ),
    "the newest slot overwritten": Mutation(
        "_moments.py", "jnp.argmax(ages)", "jnp.argmin(ages)", WINDOW_3
    ),
    "ties to the highest index": Mutation(
        "_topk.py",
        "backwards = size - 1 - lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)",
        "backwards = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)",
        "tests/test_parts.py::test_selection_is_that_of_top_k[96-8-finite]",
    ),
    "the token between leaves in chunks dropped": Mutation(
        "_chunks.py",
        "return bits | (token < 0).astype(bits.dtype) if bits.dtype != x.dtype else bits",
        "return bits",
        "tests/test_trees.py::test_leaves_share_their_temporaries",
    ),
    "a fence in chunks dropped": Mutation(
        "_xla.py",
        "_chunks.fence(leaf.state, always)",
        "leaf.state",
        "tests/test_trees.py::test_a_window_in_pieces_is_copied_once",
    ),
    "error not added back": Mutation(
        "_step.py",
        "_moments.bounded(gradient.astype(jnp.float32) + error)",
        "_moments.bounded(gradient.astype(jnp.float32))",
        DEFAULTS,
    ),
    "selected entries stay in the error": Mutation(
        "_step.py",
        "jnp.where(selected, 0, lax.stop_gradient(accumulated))",
        "lax.stop_gradient(accumulated)",
        DEFAULTS,
    ),
    "padding counted in the share of match_adam": Mutation(
        "_blocks.py",
        "return (filled * min(k, self.block) + min(k, rest)) / self.cell",
        "return min(k, self.block) / self.block",
        "tests/test_match_adam.py::test_the_share_counts_no_padding",
    ),
    "eps inside the root": Mutation(
        "_moments.py",
        "    return mu / (jnp.sqrt(nu) + eps)\n",
        "    return mu / jnp.sqrt(nu + eps)\n",
        f"{ORACLE}[decays]",
    ),
    "eps_root outside the root": Mutation(
        "_step.py",
        "(mu, (nu + inside) * step.debias_nu, step.eps)",
        "(mu, nu * step.debias_nu, step.eps + step.eps_root)",
        f"{ORACLE}[decays]",
    ),
    "bias correction with t - 1": Mutation(
        "_step.py",
        "both = _moments.debias(b1, count), _moments.debias(b2, count)",
        "last = jnp.maximum(count - 1, 1)\n"
        "        both = _moments.debias(b1, last), _moments.debias(b2, last)",
        LITERAL,
    ),
    "b1 in the place of b2": Mutation(
        "_step.py",
        "both = _moments.debias(b1, count), _moments.debias(b2, count)",
        "both = _moments.debias(b1, count), _moments.debias(b1, count)",
        LITERAL,
    ),
    "match_adam by another power of the share": Mutation(
        "_moments.py", "EXPONENT = 0.5", "EXPONENT = 0.75", DEFAULTS
    ),
    "the factor of match_adam not rounded before it is squared": Mutation(
        "_moments.py",
        "return round_to(share**EXPONENT * speed, 22)",
        "return share**EXPONENT * speed",
        "tests/test_determinism.py::test_the_update_has_the_same_bits_when_called_eagerly",
    ),
    "alpha ignored": Mutation(
        "_step.py", "    if settings.alpha:\n", "    if False:\n", ALPHA
    ),
    "key not advanced under stochastic rounding": Mutation(
        "_tree.py", "jax.random.fold_in(prng, count)", "prng", RANDOM
    ),
    "one key for all leaves": Mutation(
        "_tree.py",
        "step._replace(prng=jax.random.fold_in(step.prng, number))",
        "step",
        RANDOM,
    ),
    "weight decay with the wrong sign": Mutation(
        "_decay.py",
        "optax.add_decayed_weights(weight_decay, checked)",
        "optax.add_decayed_weights(-weight_decay, checked)",
        DECAY,
    ),
    "mask of weight decay ignored": Mutation(
        "_decay.py",
        "optax.add_decayed_weights(weight_decay, checked)",
        "optax.add_decayed_weights(weight_decay)",
        DECAY,
    ),
    "a leaf of exactly the size is dense": Mutation(
        "_dense.py",
        "math.prod(np.shape(leaf)) < self.size",
        "math.prod(np.shape(leaf)) <= self.size",
        "tests/test_dense.py::test_by_default_small_leaves_are_dense",
    ),
    "bfloat16 parameters rounded without noise": Mutation(
        "_apply.py",
        ".astype(jnp.uint32)\n    bits = lax",
        ".astype(jnp.uint32) // 65536 + 32768\n    bits = lax",
        "tests/test_apply.py::test_unbiased",
    ),
    "what layers share steps once a layer": Mutation(
        "layerwise.py", "if own else first", "if own else x", f"{LAYERS}[default]"
    ),
    "layers in the order of the forward pass": Mutation(
        "layerwise.py", "number = count - 1 - i", "number = i", f"{LAYERS}[default]"
    ),
    "gradients of layers fused into their update": Mutation(
        "layerwise.py",
        "lax.optimization_barrier(self._pull(number, layer, dy))",
        "self._pull(number, layer, dy)",
        f"{LAYERS}[adamw]",
    ),
    "a fence between layers dropped": Mutation(
        "layerwise.py",
        "_chunks.fence((layer, new), always=number >= 0)",
        "(layer, new)",
        "tests/test_layerwise.py::test_nothing_of_the_size_of_the_stack_is_allocated",
    ),
    "gradients outside of the layers not planned": Mutation(
        "planner/ways.py",
        "return rest | max(",
        "return max(",
        "tests/test_planner_ways.py::test_a_plan_layer_by_layer",
    ),
    "gradients of a layer not planned": Mutation(
        "planner/ways.py",
        "rest | max(layers.values(), key=_number, default={})",
        "rest",
        f"{PLANNED}[{OURS}, layer by layer]",
    ),
    "MultiSteps planned as accumulate": Mutation(
        "planner/ways.py",
        'Way("optax.MultiSteps", wrapper=_multi_steps)',
        'Way("optax.MultiSteps", wrapper=_accumulate)',
        "tests/test_planner_ways.py::test_a_plan_with_micro_batches",
    ),
    "the same random numbers in all layers": Mutation(
        "_xla.py",
        "numbers + step.layer.astype(jnp.uint32) * math.prod(shape)",
        "numbers",
        f"{BFLOAT16}[random rounding]",
    ),
    "a micro-batch counts in full": Mutation(
        "_step.py",
        "accumulate(share(gradient, step), old, bits)",
        "accumulate(gradient, old, bits)",
        f"{MICRO}[xla-4]",
    ),
    "a micro-batch counts in full in kernels": Mutation(
        "_kernels/__init__.py",
        "gradient, k = share(gradient, step), ",
        "k = ",
        f"{MICRO}[None-4]",
    ),
    "a share of 16 bits that XLA need not round": Mutation(
        "_step.py",
        "gradient.astype(gradient.dtype if gradient.dtype.itemsize > 4 else jnp.float32)",
        "gradient",
        "tests/test_accumulate.py::test_a_share_is_rounded_once",
    ),
    "shares added unrounded, in a fused multiply-add": Mutation(
        "_step.py",
        "_moments.apart(wide * part, wide)",
        "(wide * part)",
        "tests/test_micro_batches.py::test_shares_are_rounded_before_they_are_added",
    ),
    "a micro-batch's gradient read and written in no order": Mutation(
        "_xla.py",
        "leaf = _chunks.fence(leaf, always)",
        "leaf = leaf._replace(state=_chunks.fence(leaf.state, always))",
        "tests/test_micro_batches.py::test_a_gradient_that_is_an_argument_is_copied_once",
    ),
    "every micro-batch the last to a part": Mutation(
        "_micro.py",
        "number >= every - 1",
        "number >= 0",
        f"{MICRO}[xla-4]",
    ),
    "steps of a micro-batch in the form of a step's": Mutation(
        "_micro.py",
        "return count if micro is None else micro._replace(count=count)",
        "return count if micro is None else micro",
        "tests/test_micro_batches.py::test_a_part_that_is_jitted_by_itself",
    ),
    "the same micro-batch for all of a vmapped part": Mutation(
        "_micro.py",
        "*(jnp.broadcast_to(x, jnp.shape(count)) for x in of)",
        "*of",
        "tests/test_micro_batches.py::test_a_part_that_is_vmapped_by_itself",
    ),
    "shares made before the loops": Mutation(
        "_leaf.py",
        "    carry, last = (gradient, old, token)",
        "    gradient = _step.share(gradient, step)\n"
        "    micro = step.micro._replace(share=step.micro.share * 0 + 1)\n"
        "    step = step._replace(micro=micro)\n"
        "    carry, last = (gradient, old, token)",
        "tests/test_accumulate.py::test_a_training_step_peaks_where_it_does_without",
    ),
    "a micro-batch selects": Mutation(
        "_state.py",
        "window=1, density=0.0,",
        "window=1, density=0.01,",
        f"{MICRO}[xla-4]",
    ),
    "a micro-batch selects in the CPU kernel": Mutation(
        "_kernels/cpu_select.py",
        "        return top\n",
        "        return int32(-1)\n",
        f"{MICRO}[None-4]",
    ),
    "a micro-batch selects in kernels of Pallas": Mutation(
        "_kernels/_select.py",
        "[key >= none for",
        "[key >= 0 for",
        f"{MICRO}[interpret_gpu-4]",
    ),
    "ties to the last in kernels of Pallas": Mutation(
        "_kernels/_select.py",
        "(key == low) & (i <= last)",
        "(key == low) & (i > last)",
        f"{KERNELS}[window 2-interpret_gpu]",
    ),
    "a bisection that goes up too far": Mutation(
        "_kernels/_select.py",
        "low = jnp.where(enough, middle, search.low)",
        "low = middle",
        f"{KERNELS}[window 2-interpret_gpu]",
    ),
    "keys peeled that are wanted": Mutation(
        "_kernels/_select.py",
        "left = _count([lowest - key for key in keys])",
        "left = _count([lowest - 1 - key for key in keys])",
        f"{KERNELS}[window 2-interpret_gpu]",
    ),
    "huge numbers not bounded in the GPU's kernel": Mutation(
        "_kernels/gpu_block.py",
        "jnp.max(top) > _LARGEST",
        "jnp.max(top) > 0x7F000000",
        "tests/test_kernels.py::test_huge_numbers_are_bounded[interpret_gpu]",
    ),
    "codes of the upper part by the step of the lower": Mutation(
        "_kernels/_rows.py",
        "step * (1 / lowest)",
        "step",
        f"{KERNELS}[window 2-interpret_gpu]",
    ),
    "every micro-batch counts as a step": Mutation(
        "_accumulate.py",
        '("count", "ages", "mu", "nu")',
        '("ages", "mu", "nu")',
        f"{MICRO}[xla-4]",
    ),
    "updates between steps": Mutation(
        "_accumulate.py",
        "lambda x: jnp.where(last, x, jnp.zeros_like(x)), updates",
        "lambda x: x, updates",
        "tests/test_accumulate.py::test_dense_leaves_train_as_with_multi_steps",
    ),
    "sums of dense leaves go on after a step": Mutation(
        "_accumulate.py",
        "jnp.where(last, jnp.zeros_like(x), x), sums",
        "x, sums",
        "tests/test_accumulate.py::test_dense_leaves_train_as_with_multi_steps",
    ),
    "the same random numbers in all micro-batches": Mutation(
        "_leaf.py",
        "jax.random.fold_in(step.prng, step.micro.number)",
        "step.prng",
        "tests/test_accumulate.py::test_random_rounding_draws_anew_in_each_micro_batch",
    ),
    "micro-batches by a conditional, which copies": Mutation(
        "_leaf.py",
        "    carry, last = (gradient, old, token), step.micro.last.astype(int)\n",
        "    whole = lambda g, o, t: f(g, o, step, t)\n"
        "    return lax.cond(step.micro.last, whole, take_up, gradient, old, token)\n"
        "    carry, last = (gradient, old, token), step.micro.last.astype(int)\n",
        "tests/test_accumulate.py::test_no_leaf_is_copied",
    ),
    "the last piece of a leaf out of the order": Mutation(
        "_chunks.py",
        "lax.fori_loop(0, once, lambda _, x: one(cut.pieces, x), carry)",
        "one(cut.pieces, carry)",
        "tests/test_trees.py::test_leaves_share_their_temporaries",
    ),
    "large gradients not limited": Mutation(
        "_moments.py", "jnp.clip(x, -largest, largest)", "x", LIMIT
    ),
}


class Copy:
    """The project in a folder of its own, where the package can be changed."""

    def __init__(self, folder: pathlib.Path):
        self.root = folder / "project"
        shutil.copytree(ROOT, self.root, ignore=IGNORED)
        self.env = os.environ | {"PYTHONPATH": str(self.root)}
        command = [sys.executable, "-c", "import microadam_optax as m; print(m.__file__)"]
        found = subprocess.run(
            command, cwd=self.root, env=self.env, capture_output=True, text=True
        )
        assert found.stdout.startswith(str(self.root)), found

    def failing(self, *arguments: str) -> str | None:
        """The first test that fails; None if all pass. Tests are needed to say so."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", *arguments]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", "--tb=line"],
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return None
        said = done.stdout.splitlines()
        failed = [x for x in said if x.startswith(("FAILED ", "ERROR "))]
        assert done.returncode == 1, done.stdout + done.stderr
        return failed[0].partition(" ")[2].partition(" - ")[0]

    def caught_by(self, mutation: Mutation, workers: str) -> str | None:
        file = self.root / "microadam_optax" / mutation.file
        text = file.read_text()
        file.write_text(mutation.applied(text))
        try:
            found = self.failing(mutation.tests)
            return found or self.failing("-n", workers)
        finally:
            file.write_text(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(MUTATIONS), metavar="ERROR")
    parser.add_argument("--workers", default="auto", help="of pytest-xdist")
    args = parser.parse_args(arguments)
    chosen = args.only or list(MUTATIONS)
    survived = 0
    with tempfile.TemporaryDirectory() as name:
        copy = Copy(pathlib.Path(name))
        likely = {MUTATIONS[each].tests for each in chosen}
        assert copy.failing(*sorted(likely)) is None, "the tests fail without an error"
        print("| error | seen by |\n| --- | --- |", flush=True)
        for error in tqdm(chosen):
            found = copy.caught_by(MUTATIONS[error], args.workers)
            survived += found is None
            tqdm.write(f"| {error} | {found or '**nothing**'} |")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
