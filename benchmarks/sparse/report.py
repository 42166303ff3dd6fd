"""What was measured, as tables and as one plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def is_own(engine: str) -> bool:
    return engine.startswith("graphopt")


def fastest_dense_peer(row: Row) -> Row | None:
    """The fastest peer on weights without zeros, in the row's run; None where no peer ran."""
    dense = [one for one in row["engines"] if one["weights"] == "dense" and not is_own(one["engine"])]
    return min(dense, key=lambda one: one["min_ms"], default=None)


def ratios(row: Row) -> dict[str, float]:
    """Of graphopt on the row's weights: how many times faster than its dense self, the fastest dense peer, and the
    peers that run zeros, the same ones or unstructured ones."""
    weights = row["format"]
    times = {(one["engine"], one["weights"]): one["min_ms"] for one in row["engines"]}
    found = {}
    for engine in dict.fromkeys(one["engine"] for one in row["engines"] if is_own(one["engine"])):
        own = times.get((engine, weights))
        if own is None:
            continue
        if weights != "dense" and (engine, "dense") in times:
            found[f"{engine} / its own dense"] = times[engine, "dense"] / own
        if (peer := fastest_dense_peer(row)) is not None:
            found[f"{engine} / {peer['engine']} dense"] = peer["min_ms"] / own
        for (name, which), time in times.items():
            if which != "dense" and not is_own(name):
                found[f"{engine} / {name} {which}"] = time / own
    return found


def model_table(rows: Iterable[Row], missing: dict[str, str]) -> Table:
    """A line for each engine of each row, with its speed-up over the fastest dense peer of the same row."""
    headings = (
        "model",
        "zeros",
        "format",
        "engine",
        "weights",
        "min ms",
        "median ms",
        "fastest dense peer / it",
        "off",
    )
    table = Table(*headings, title="one thread, in turns")
    for row in rows:
        peer = fastest_dense_peer(row)
        head = (row["model"], f"{row['zeros']} %", row["format"])
        for one in row["engines"]:
            ratio = f"{peer['min_ms'] / one['min_ms']:.2f}" if peer else ""
            times = (f"{one['min_ms']:.2f}", f"{one['median_ms']:.2f}")
            table.add_row(*head, one["engine"], one["weights"], *times, ratio, f"{one['difference']:.0e}")
        for engine, reason in row["failures"].items():
            table.add_row(*head, engine, "", "failed", "", "", reason[:60])
        table.add_section()
    for engine, reason in missing.items():
        table.add_row("", "", "", engine, "", "missing", "", "", reason)
    return table


def ratio_table(rows: Iterable[Row]) -> Table:
    """The ratios of graphopt, one row a case."""
    table = Table("model", "zeros", "format", "graphopt / other: times faster", title="graphopt")
    for row in rows:
        text = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(row).items())
        table.add_row(row["model"], f"{row['zeros']} %", row["format"], text)
    return table


def layer_table(result: Row) -> Table:
    """One layer: dense time x density over sparse time."""
    headings = ("target", "format", "zeros", "dense us", "GFLOP/s", "sparse us", "speed-up", "share of ideal")
    table = Table(*headings, title=f"one layer {result['layer']}")
    for row in result["rows"]:
        figures = (f"{row['dense_us']:.1f}", f"{row['dense_gflops']:.1f}", f"{row['sparse_us']:.1f}")
        shares = (f"{row['speed_up']:.2f}", f"{row['share_of_ideal']:.2f}")
        table.add_row(row["target"], row["format"], f"{row['zeros']} %", *figures, *shares)
    for name, zeros in result["break_even"].items():
        table.add_row(name, "break-even", "never" if zeros is None else f"{zeros:g} %")
    return table


def plot(rows: list[Row], file: Path) -> None:
    """Speed-up over the fastest dense peer against zeros: a panel for each kind and model, a line for each format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "model"))
    size = (3.4 * len(models) + 2.6, 3.2 * len(kinds) + 0.8)
    figure, axes = pyplot.subplots(len(kinds), len(models), figsize=size, squeeze=False, sharex=True)
    names = list(dict.fromkeys(name for row in rows for name, *_ in _points(row)))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for i, kind in enumerate(kinds):
        for j, model in enumerate(models):
            panel = axes[i][j]
            mine = [row for row in rows if (row["kind"], row["model"]) == (kind, model)]
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in sorted(mine, key=lambda row: row["zeros"]):
                for name, zeros, gain in _points(row):
                    lines.setdefault(name, []).append((zeros, gain))
            for name, points in lines.items():
                style = "-" if is_own(name) else "--"
                xs, ys = zip(*points, strict=True)
                panel.plot(xs, ys, style, marker="o", markersize=3, color=colours[name], label=name)
            grid = range(96)
            panel.plot(grid, [1 / (1 - z / 100) for z in grid], ":", color="grey", label="ideal: 1 / density")
            panel.set(title=f"{model}, {kind}", yscale="log")
            panel.set_yticks([0.5, 1, 2, 5, 10, 20], labels=["0.5", "1", "2", "5", "10", "20"])
            panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("zeros, %")
    for panel in axes[:, 0]:
        panel.set_ylabel("times as fast as the fastest dense peer")
    handles = {label: h for panel in axes.flat for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="center right", fontsize="small")
    figure.tight_layout(rect=(0, 0, 1 - 2.6 / size[0], 1))
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _points(row: Row) -> list[tuple[str, float, float]]:
    """What a row adds to its panel: line, zeros, speed-up. Of the peers, those with kernels for zeros: unstructured."""
    peer = fastest_dense_peer(row)
    base = peer["min_ms"] if peer else max((one["min_ms"] for one in row["engines"]), default=0.0)
    points = []
    for one in row["engines"]:
        gain = base / one["min_ms"]
        if is_own(one["engine"]) and one["weights"] == row["format"]:
            points.append((f"{one['engine']} {row['format']}", row["zeros"], gain))
        elif not is_own(one["engine"]) and one["weights"] == row["format"] == "unstructured":
            points.append((one["engine"], row["zeros"], gain))
    return points
