"""Results as JSON, as Markdown, and as tables in the terminal."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

PHASES = ("one jit", "forward", "backward", "both", "inference")


class Table(NamedTuple):
    """Hold a title, a header, and rows of text."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]

    def rich(self) -> RichTable:
        """Convert to a table for the terminal."""
        table = RichTable(*self.header, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Convert to Markdown."""
        rows = [[cell.replace("\n", "<br>") for cell in row] for row in self.rows]
        lines = [self.header, ["---"] * len(self.header), *rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}**\n\n{text}\n"


def pages(data: dict) -> dict[str, list[Table]]:
    """Return the tables of a section by file name."""
    tables = {
        "layers": _layers,
        "growth": _growth,
        "ensemble": _kinds_of_steps,
        "masks": _kinds_of_steps,
        "step": _step,
        "compile": _compile,
        "memory": _memory,
        "accuracy": _accuracy,
        "drift": _drift,
    }[data["section"]](data)
    if data["section"] == "layers":
        return {"layers": tables, "layers-summary": [_summary(data["summary"])]}
    return {data["section"]: tables}


def _kinds_of_steps(data: dict) -> list[Table]:
    """Return the summary, then a table of shapes for each dtype and kind of step."""
    phases = _columns(data["rows"], "phase")
    return [_summary(data["summary"]), *_by_phase(data["rows"], phases)]


def _drift(data: dict) -> list[Table]:
    """Return a table of momenta and means, with a column per library and start."""
    kinds = list(dict.fromkeys((r["start"], r["library"]) for r in data["rows"]))
    errors = {
        (r["momentum"], r["loc"], r["start"], r["library"]): f"{r['error']:.1e}"
        for r in data["rows"]
    }
    cases = list(dict.fromkeys((r["momentum"], r["loc"]) for r in data["rows"]))
    title = "error of the running mean in standard deviations, float32"
    header = ["momentum", "mean of x"]
    header += [f"{library}, from {start}" for start, library in kinds]
    lines = [
        [f"{momentum:g}", f"{loc:g}", *(errors[momentum, loc, *k] for k in kinds)]
        for momentum, loc in cases
    ]
    return [Table(title, header, lines)]


def _columns(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _spread(row: dict) -> str:
    """Format the median and half the interquartile range: `1.23 ±4%`."""
    return f"{_milliseconds(row['median'])} ±{_half_range(row):.0f}%"


def _half_range(row: dict) -> float:
    """Return half the interquartile range in percent of the median."""
    return 50 * (row["high"] - row["low"]) / row["median"]


def _layers(data: dict) -> list[Table]:
    """Return a table for each dtype and phase, and the rejected libraries."""
    tables = _by_phase(data["rows"], PHASES)
    if data["rejected"]:
        header = ("library", "shape", "dtype", "reason")
        rejected = [[r[name] for name in header] for r in data["rejected"]]
        tables.append(Table("rejected, not timed", header, rejected))
    return tables


def _by_phase(rows: list[dict], phases: Sequence[str]) -> list[Table]:
    """Return a table of shapes and libraries for each dtype and phase."""
    tables = []
    for dtype in _columns(rows, "dtype"):
        for phase in phases:
            some = [r for r in rows if (r["dtype"], r["phase"]) == (dtype, phase)]
            title = (
                f"{phase}, {dtype}: ms ± half the interquartile range; "
                "ratio to the floor"
            )
            tables.append(_by_library(title, some))
    return tables


def _by_library(title: str, rows: list[dict]) -> Table:
    libraries = _columns(rows, "library")
    cells = {
        (r["shape"], r["library"]): f"{_spread(r)}\n{r['ratio']:.1f}" for r in rows
    }
    floors = {r["shape"]: (r["dims"], _milliseconds(r["floor"])) for r in rows}
    lines = [
        [f"{shape}\n{'x'.join(map(str, dims))}", shape_floor]
        + [cells.get((shape, library), "") for library in libraries]
        for shape, (dims, shape_floor) in floors.items()
    ]
    return Table(title, ["shape", "floor", *libraries], lines)


def _summary(rows: list[dict]) -> Table:
    """Compare each library with jaxbn; above 1, jaxbn is faster."""
    dtypes = sorted(_columns(rows, "dtype"), reverse=True)  # float32 first
    place = {phase: i for i, phase in enumerate(PHASES)}
    phases = sorted(_columns(rows, "phase"), key=lambda phase: place.get(phase, 0))
    kinds = [(dtype, phase) for phase in phases for dtype in dtypes]
    cells = {
        (r["library"], r["dtype"], r["phase"]): (
            f"{r['geometric_mean']:.2f}\n({r['below_1']} of {r['shapes']})"
        )
        for r in rows
    }
    title = "time over jaxbn's: geometric mean of shapes (shapes with a ratio below 1)"
    header = ["library", *(f"{dtype} {phase}" for dtype, phase in kinds)]
    return Table(
        title,
        header,
        [
            [library, *(cells.get((library, *kind), "") for kind in kinds)]
            for library in _columns(rows, "library")
        ],
    )


def _growth(data: dict) -> list[Table]:
    tables = []
    for along in ("examples", "features"):
        chosen = [
            r for r in data["rows"] if r["along"] == along and r["phase"] == "both"
        ]
        title = (
            f"forward and backward by {along}, float32: ms ± half the interquartile "
            "range; ratio to the floor"
        )
        tables.append(_by_library(title, chosen))
    lines = [
        [
            r["library"],
            str(r["devices"]),
            r["phase"],
            _spread(r),
            ", ".join(f"{kind} {size}" for kind, size in r["collectives"]),
        ]
        for r in data["devices"]
    ]
    header = ("library", "devices", "phase", "ms", "collectives, bytes")
    dims = "x".join(map(str, data["devices"][0]["dims"])) if lines else ""
    title = f"one batch of {dims} sharded over CPU devices"
    return [*tables, Table(title, header, lines)]


def _step(data: dict) -> list[Table]:
    lines = [
        [r["library"], _spread(r), _loss(r), str(r["rounds"])] for r in data["rows"]
    ]
    layers, batch = (data["rows"][0][name] for name in ("layers", "batch"))
    title = f"a training step of ResNet-{layers}, CIFAR size, batch {batch}, float32"
    return [Table(title, ("norm", "ms", "loss of the first step", "rounds"), lines)]


def _loss(row: dict) -> str:
    """Format the loss; without batch norm it is that of another network."""
    return "" if row["library"] == "no batch norm" else f"{row['loss']:.5f}"


def _compile(data: dict) -> list[Table]:
    by_program: dict[tuple, list[dict]] = {}
    for row in data["rows"]:
        key = ("x".join(map(str, row["dims"])), row["program"], row["library"])
        by_program.setdefault(key, []).append(row)
    lines = [
        [*key, *(cell for row in stages for cell in _seconds_and_ratio(row))]
        for key, stages in by_program.items()
    ]
    network = f"{data['depth']} x (dense, batch norm, ReLU)"
    title = f"CPU seconds to lower and to compile {network}"
    stages = [row["stage"] for row in next(iter(by_program.values()))]
    columns = [name for stage in stages for name in (f"{stage}, s", "over Flax")]
    return [Table(title, ("x", "program", "library", *columns), lines)]


def _seconds_and_ratio(row: dict) -> tuple[str, str]:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return f"{row['median']:.2f} ±{_half_range(row):.0f}%", ratio


def _memory(data: dict) -> list[Table]:
    lines = [
        [
            r["library"],
            r["dtype"],
            f"{r['residuals']:,}",
            f"{r['residuals'] / r['x']:.2f}",
            f"{r['scan_peak'] / 2**20:.1f}",
            f"{r['scan_peak'] / r['x']:.1f}",
        ]
        for r in sorted(data["rows"], key=lambda r: r["dtype"], reverse=True)
    ]
    header = ("library", "dtype", "residuals, bytes", "over x", "scan, MiB", "over x")
    title = (
        f"residuals of jax.vjp; temporary memory of a scan over {data['layers']} layers"
    )
    return [Table(title, header, lines)]


def _accuracy(data: dict) -> list[Table]:
    names = ("mean", "var", "dx", "dscale")
    lines = [
        [r["library"], r["dtype"], f"{r['loc']:g}"]
        + [("NaN" if r[name] is None else f"{r[name]:.1e}") for name in names]
        for r in data["rows"]
    ]
    title = "largest error versus float64, x of 4096x64 with standard deviation 1"
    header = ["library", "dtype", "mean of x", "mean, standard deviations"]
    header += ["variance, relative", "dx, relative", "dscale, relative"]
    return [Table(title, header, lines)]


def save(data: dict, folder: Path) -> None:
    """Save a section's data as JSON, and its tables as Markdown."""
    text = json.dumps(_to_json(data), indent=1, allow_nan=False)
    (folder / f"{data['section']}.json").write_text(text + "\n")
    for name, tables in pages(_to_json(data)).items():
        page = "\n".join(table.markdown() for table in tables)
        (folder / f"{name}.md").write_text(page)


def write(name: str, results: dict, tables: list[Table], folder: Path) -> None:
    """Write figures as JSON, and their tables as Markdown; say where."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    page = "\n".join(table.markdown() for table in tables)
    (folder / f"{name}.md").write_text(page)
    print(f"Figures: {name}.json and {name}.md in {folder}")


def show(data: dict, console: Console) -> None:
    """Print a section's tables."""
    for tables in pages(_to_json(data)).values():
        for table in tables:
            console.print(table.rich())


def _to_json(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with null."""
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def fill(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the marks of table `name`."""
    marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    return re.sub(marks, lambda m: f"{m[1]}{text}{m[2]}", page, flags=re.DOTALL)


def write_readme(readme: Path, folder: Path) -> None:
    """Write the tables in `folder` between the marks of the same names in `readme`."""
    page = readme.read_text()
    for path in sorted(folder.glob("*.md")):
        page = fill(page, path.stem, path.read_text())
    readme.write_text(page)
