"""Tables of what the compilers made of the kernels."""

import math

from pages import measured_on, table


def gpu_code_table(results: dict) -> str:
    """What the compiler made of the GPU kernel, and XLA's program beside it."""
    header = ["(window, density)", "block", "k", "registers", "instructions"]
    header += ["operations", "temporary"]
    rows = results["NVIDIA H200"]
    return (
        f"{table(header, [gpu_code_row(row) for row in rows])}\n\n"
        f"{compiled_on(results)}.\n\n{without_kernel(rows)}"
    )


def gpu_code_row(row: dict) -> list[str]:
    held = (row[key] / 1e6 for key in ("temporary_bytes", "xla_temporary_bytes"))
    spilled = f", {row['spilled_bytes']} B spilled" if row["spilled_bytes"] else ""
    return [
        row["case"],
        str(row["block"]),
        str(row["k"]),
        f"{row['registers']}{spilled}",
        str(row["instructions"]),
        f"{row['kernels']} / {row['xla_kernels']}",
        " / ".join(f"{megabytes:.0f}" for megabytes in held) + " MB",
    ]


def without_kernel(rows: list[dict]) -> str:
    """What XLA's own program holds of bfloat16 leaves."""
    narrow = [row for row in rows if row["dtype"] == "bfloat16"]
    held = [row["xla_temporary_bytes"] / (2 * math.prod(row["shape"])) for row in narrow]
    return (
        "Without the kernel, and with a leaf in one piece, XLA holds "
        f"{min(held):.1f} to {max(held):.1f} times the "
        "bytes of a bfloat16 leaf in temporary memory."
    )


def compiled_on(results: dict) -> str:
    versions = ", ".join(f"{name} {at}" for name, at in results["compilers"].items())
    return f"{measured_on(results)}; {versions}"


def tpu_code_table(results: dict) -> str:
    rows = [
        [
            row["case"],
            " x ".join(map(str, row["shape"])),
            row["dtype"],
            *(
                f"{row[key] / 1e6:.1f} MB"
                for key in ("argument_bytes", "temporary_bytes", "xla_temporary_bytes")
            ),
        ]
        for row in results["TPU v5e"]
    ]
    header = ["(window, density)", "leaf", "dtype", "arguments", "temporary", "XLA's"]
    return table(header, rows) + f"\n\n{compiled_on(results)}."
