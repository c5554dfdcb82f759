"""Tables of what an update sends and holds on a mesh."""

from pages import table


def sent(collectives: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in collectives.items()) or "0"


def megabytes(number: float) -> str:
    return f"{number / 1e6:.2f}"


def mesh_tables(results: dict) -> str:
    """One for each mesh, in each cell the optimizers one after another."""
    tables = []
    for mesh in dict.fromkeys(row["mesh"] for row in results["cases"]):
        rows = [mesh_row(row) for row in results["cases"] if row["mesh"] == mesh]
        header = ["leaf", "shape", "spec", "collectives", "temporary", "state"]
        tables.append(f"**{mesh}**\n\n{table(header, rows)}")
    return "\n\n".join(tables)


def mesh_row(row: dict) -> list[str]:
    found = row["optimizers"].values()
    counts = [str(sum(each["collectives"].values())) for each in found]
    held, state = (
        [megabytes(each[key]) for each in found]
        for key in ("temporary_bytes", "state_bytes")
    )
    shape = " x ".join(map(str, row["shape"]))
    columns = (" / ".join(column) for column in (counts, held, state))
    return [row["case"], shape, f"`{row['spec']}`", *columns]


def unaligned_table(results: dict) -> str:
    header = ["leaf", "shape", "devices", "default grid", "`shard_grid`"]
    header += ["temporary, MB", "state, MB"]
    rows = []
    for row in results["unaligned"]:
        grids = [row["default"], row["shard_grid"]]
        held, state = (
            " / ".join(megabytes(each[key]) for each in grids)
            for key in ("temporary_bytes", "state_bytes")
        )
        shape = " x ".join(map(str, row["shape"]))
        counts = (sent(each["collectives"]) for each in grids)
        rows.append([row["case"], shape, str(row["devices"]), *counts, held, state])
    return table(header, rows)


def weak_table(results: dict) -> str:
    rows = results["weak_scaling"]
    names = [name for name in rows[0] if name != "devices"]
    return table(
        ["devices", *(f"{name}: flops / bytes" for name in names)],
        [
            [
                str(row["devices"]),
                *(
                    f"{row[n]['flops'] / 1e6:.1f}M / {megabytes(row[n]['bytes'])} MB"
                    for n in names
                ),
            ]
            for row in rows
        ],
    )


def plan_table(results: dict) -> str:
    plan = results["plan_70b"]
    own = plan["parameter_bytes"]
    rows = [
        [
            name,
            *(f"{number / 1e9:.3f}" for number in (held, 2 * own + held)),
            f"{held * 256 / plan['parameters']:.2f}",
        ]
        for name, held in plan["state_bytes"].items()
    ]
    return table(
        ["", "state, GB", "with parameters and gradients", "bytes a parameter"], rows
    )


def plan_section(results: dict) -> str:
    plan = results["plan_70b"]
    layer = {n: sent(each["collectives"]) for n, each in results["layer_70b"].items()}
    return (
        f"{plan['parameters']:,} parameters on a mesh of "
        + " x ".join(f"{n} {axis}" for axis, n in plan["mesh"].items())
        + f"; bfloat16 parameters and gradients are {plan['parameter_bytes'] / 1e9:.3f} "
        f"GB each a device.\n\n{plan_table(results)}\n\n"
        "Collectives of the update of a layer, the embedding and the head, compiled "
        f"for the 256 devices: {layer['8']} with `shards=8`, "
        f"**{layer[str(plan['shards'])]}** with `shards={plan['shards']}`."
    )
