"""Checks the kernels on the GPU that is here, and times them against their peers.

    python benchmarks/gpu.py check     every case, 50 steps, against XLA on GPU and CPU
    python benchmarks/gpu.py time      a step of the optimizer, 1e9 and 1e8 parameters
    python benchmarks/gpu.py whole     training steps of models of 1.7e9 and 6.7e9
    python benchmarks/gpu.py tune      rows and warps of a program of the kernel
    python benchmarks/gpu.py launches  each kernel twice, to be run under a profiler

Each part takes a few minutes, and keeps what it has measured when its minutes are over,
in benchmarks/results/gpu_PART.json or in `--output`. 1e9 float32 parameters with
gradients for ten steps want some 60 GB. Programs are compiled side by side.
"""

import argparse
import os
import pathlib
import sys
import time
import warnings

from common import report

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))

PARTS = ("check", "time", "whole", "tune", "launches")


def check(args: argparse.Namespace) -> list[str]:
    """What failed."""
    import gpu_check

    steps = 2 if args.tiny else gpu_check.STEPS
    cases = gpu_check.run(args.threads, steps, args.only)
    contexts = {} if args.only else gpu_check.contexts() | gpu_check.micro_batches()
    print(f"None in programs, and micro-batches: {contexts}")
    report("gpu_check", {"cases": cases, "contexts": contexts}, args.output)
    found = cases | contexts
    return [name for name, result in found.items() if not result["passed"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--output", help="folder for the results")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with it")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="only to try the script")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    end = time.monotonic() + 60 * args.minutes

    def enough() -> bool:
        return time.monotonic() > end

    def keep(results: dict) -> None:
        report(f"gpu_{args.part}", results, args.output, say=False)

    if args.part == "check":
        failed = check(args)
        sys.exit(f"failed: {', '.join(failed)}" if failed else None)
    elif args.part == "time":
        import gpu_time

        gpu_time.run(enough, keep, args.threads, args.only, args.tiny)
    elif args.part == "whole":
        import gpu_whole

        gpu_whole.one(*args.one) if args.one else gpu_whole.run(enough, keep, args.only)
    elif args.part == "tune":
        import gpu_tune

        gpu_tune.run(keep, args.threads, tiny=args.tiny)
    else:
        import gpu_tune

        for name in gpu_tune.launches(args.only):
            print(name, flush=True)


if __name__ == "__main__":
    main()
