"""Results as JSON, as tables in the terminal, and as Markdown."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

WORKS = ("forward", "backward", "both", "inference")


class Table(NamedTuple):
    """A title, a header, and rows of text."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]

    def rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(*self.header, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        rows = [[cell.replace("\n", "<br>") for cell in row] for row in self.rows]
        lines = [self.header, ["---"] * len(self.header), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}**\n\n{text}\n"


def tables(data: dict) -> list[Table]:
    """The tables of a section's data."""
    return {
        "layers": _layers,
        "growth": _growth,
        "step": _step,
        "memory": _memory,
        "accuracy": _accuracy,
    }[data["section"]](data)


def _columns(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _spread(row: dict) -> str:
    """`1.23 ±4%`: the median, and half of what lies between the quartiles."""
    half = 50 * (row["high"] - row["low"]) / row["median"]
    return f"{_milliseconds(row['median'])} ±{half:.0f}%"


def _layers(data: dict) -> list[Table]:
    """For each dtype and work: shapes down, peers across; the summary last."""
    rows, found = data["rows"], []
    for dtype in _columns(rows, "dtype"):
        for work in WORKS:
            some = [r for r in rows if (r["dtype"], r["work"]) == (dtype, work)]
            title = f"{work}, {dtype}: ms ± half the quartile range; times the floor"
            found.append(_by_peer(title, some))
    if data["refused"]:
        about = ("peer", "shape", "dtype", "reason")
        refused = [[r[name] for name in about] for r in data["refused"]]
        found.append(Table("refused: not timed", about, refused))
    return [*found, _summary(data["summary"])]


def _by_peer(title: str, rows: list[dict]) -> Table:
    peers = _columns(rows, "peer")
    cells = {(r["shape"], r["peer"]): f"{_spread(r)}\n{r['ratio']:.1f}" for r in rows}
    floors = {r["shape"]: (r["dims"], _milliseconds(r["floor"])) for r in rows}
    lines = [
        [f"{shape}\n{'x'.join(map(str, dims))}", least]
        + [cells.get((shape, peer), "") for peer in peers]
        for shape, (dims, least) in floors.items()
    ]
    return Table(title, ["shape", "floor", *peers], lines)


def _summary(rows: list[dict]) -> Table:
    """Above 1: jaxbn is faster."""
    kinds = list(dict.fromkeys((r["dtype"], r["work"]) for r in rows))
    kinds.sort(key=lambda kind: (kind[0] != "float32", WORKS.index(kind[1])))
    cells = {
        (r["peer"], r["dtype"], r["work"]): (
            f"{r['geometric_mean']:.2f}\n({r['below_1']} of {r['shapes']})"
        )
        for r in rows
    }
    title = "time over jaxbn's: geometric mean over shapes (shapes where it is below 1)"
    header = ["peer", *(f"{dtype} {work}" for dtype, work in kinds)]
    return Table(
        title,
        header,
        [
            [peer, *(cells.get((peer, *kind), "") for kind in kinds)]
            for peer in _columns(rows, "peer")
        ],
    )


def _growth(data: dict) -> list[Table]:
    found = []
    for along in ("rows", "channels"):
        chosen = [
            r for r in data["rows"] if r["along"] == along and r["work"] == "both"
        ]
        title = (
            f"forward and backward by {along}, float32: ms ± spread; times the floor"
        )
        found.append(_by_peer(title, chosen))
    lines = [
        [
            r["peer"],
            str(r["devices"]),
            r["work"],
            _spread(r),
            ", ".join(f"{kind} {size}" for kind, size in r["collectives"]),
        ]
        for r in data["devices"]
    ]
    header = ("peer", "devices", "work", "ms", "collectives, bytes")
    dims = "x".join(map(str, data["devices"][0]["dims"])) if lines else ""
    return [*found, Table(f"one batch of {dims} dealt to CPU devices", header, lines)]


def _step(data: dict) -> list[Table]:
    lines = [[r["peer"], _spread(r), _loss(r), str(r["rounds"])] for r in data["rows"]]
    layers, batch = (data["rows"][0][name] for name in ("layers", "batch"))
    title = f"a training step of ResNet-{layers}, batch {batch}, CIFAR's size, float32"
    return [Table(title, ("norm", "ms", "loss of the first step", "rounds"), lines)]


def _loss(row: dict) -> str:
    """Which must agree; a network without batch norm is another one."""
    return "" if row["peer"] == "no batch norm" else f"{row['loss']:.5f}"


def _memory(data: dict) -> list[Table]:
    lines = [
        [
            r["peer"],
            r["dtype"],
            f"{r['residuals']:,}",
            f"{r['residuals'] / r['x']:.2f}",
            f"{r['scan_peak'] / 2**20:.1f}",
            f"{r['scan_peak'] / r['x']:.1f}",
        ]
        for r in sorted(data["rows"], key=lambda r: r["dtype"], reverse=True)
    ]
    header = ("peer", "dtype", "residuals, bytes", "times x", "scan, MiB", "times x")
    title = f"kept by jax.vjp; temporary memory of a scan over {data['layers']} layers"
    return [Table(title, header, lines)]


def _accuracy(data: dict) -> list[Table]:
    names = ("mean", "var", "dx", "dscale")
    lines = [
        [r["peer"], r["dtype"], f"{r['loc']:g}"]
        + [("NaN" if r[name] is None else f"{r[name]:.1e}") for name in names]
        for r in data["rows"]
    ]
    title = "largest error against float64, x of 4096x64 with deviation 1"
    header = ["peer", "dtype", "mean of x", "mean, deviations", "variance, relative"]
    return [Table(title, [*header, "dx, of largest", "dscale, of largest"], lines)]


def save(data: dict, folder: Path) -> None:
    """A section's data as JSON, and its tables as Markdown."""
    name = data["section"]
    text = json.dumps(_plain(data), indent=1, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n")
    page = "\n".join(table.markdown() for table in tables(_plain(data)))
    (folder / f"{name}.md").write_text(page)


def show(data: dict, console: Console) -> None:
    """The tables on the terminal."""
    for table in tables(_plain(data)):
        console.print(table.rich())


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def fill(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of table `name`."""
    marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    return re.sub(marks, lambda m: f"{m[1]}{text}{m[2]}", page, flags=re.DOTALL)


def write_readme(readme: Path, folder: Path) -> None:
    """Put every section's tables, where there are some, into the page."""
    page = readme.read_text()
    for path in sorted(folder.glob("*.md")):
        page = fill(page, path.stem, path.read_text())
    readme.write_text(page)
