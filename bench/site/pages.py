"""Boards as files: pages from templates, data beside them as scripts that a page can load without a server."""

import json
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from bench.errors import StoreError
from bench.report.escape import in_terminal
from bench.report.marks import legend, signs
from bench.report.outcomes import certified, column, is_control, network, query_budget, radii
from bench.results.store import Row
from bench.rules import NEVER
from bench.site import charts
from bench.site.boards import Board, Entry, Name, told_apart
from bench.site.columns import columns
from bench.system.extras import library_files
from bench.system.files import slug
from bench.system.spread import spread

ASSETS = ("site.css", "theme.js", "site.js", "compare.js")
EXPORT = "export{"  # how the bundle of itables ends: a module, which no browser loads from a file


def write_site(boards: Sequence[Board], out: Path, unread: Sequence[str] = ()) -> int:
    """Write the site of ``boards`` into the folder ``out``, over what an earlier one has left; the number of pages.

    Every page says that the figures are without what is ``unread``, and the first one what that is.

    Raises:
        StoreError: it cannot be written.
        ConfigError: plotly or itables is missing.
    """
    templates = _templates()
    templates.globals["unread"] = unread
    scripts = {"plotly.js": _plotly(), **_itables()}
    try:
        for name in ("assets", "entry", "data", "pictures"):
            (out / name).mkdir(parents=True, exist_ok=True)
        for name, content in scripts.items():
            (out / "assets" / name).write_bytes(content)
        for name in ASSETS:
            (out / "assets" / name).write_bytes(_packaged(f"assets/{name}"))
        index = templates.get_template("index.html").render(root="", boards=boards)
        (out / "index.html").write_text(index, encoding="utf-8")
        (out / "compare.html").write_text(_compare(templates, boards), encoding="utf-8")
        page = templates.get_template("entry.html")
        entries = [(board, entry) for board in boards for entry in board.entries]
        spread(lambda each: _write_entry(page, *each, out), entries)
    except OSError as error:
        raise StoreError(f"cannot write {error.filename or out}: {error.strerror}; choose another --out") from None
    return 2 + len(entries)


def _write_entry(page: jinja2.Template, board: Board, entry: Entry, out: Path) -> None:
    for picture in entry.pictures:
        (out / "pictures" / picture.file).write_bytes(picture.content)
    (out / "entry" / f"{entry.id}.html").write_text(page.render(root="../", board=board, entry=entry), encoding="utf-8")
    script = f"parry.entry({_json(entry.id)}, {_json(outcomes(entry.rows))});\n"
    (out / "data" / f"{entry.id}.js").write_text(script, encoding="ascii")


def _compare(templates: jinja2.Environment, boards: Sequence[Board]) -> str:
    """The page of all boards on which there are two to compare."""
    listed = [
        {
            "id": board.id, "title": in_terminal(board.table.title), "track": board.track.name,
            "entries": [{"id": entry.id, "name": in_terminal(entry.label)} for entry in board.entries],
        }
        for board in boards
        if board.pairs
    ]  # fmt: skip
    return templates.get_template("compare.html").render(root="", listed=listed)


def outcomes(rows: Iterable[Row]) -> dict[str, Any]:
    """What each sample came to in each row, as plain data, so that a page can pair two entries sample by sample.

    ``hits`` holds the first query that beat a sample, 0 where it was wrong before any and -1 where none did; ``right``
    a 1 for each sample whose final example is right. Of certificates, ``radius`` is that of each sample, -1 where the
    class is wrong or nothing is proven, and ``radii`` are those to compare at. Rows that met the same samples share a
    list of ``ids``. Attacks that have not met all of their samples are named ``apart``: a worst case without them would
    be none.
    """
    rows = list(rows)
    apart = sorted({in_terminal(row.cell.attack.spec) for row in rows if row.partial and not is_control(row)})
    ids: dict[tuple[int, ...], int] = {}
    found = []
    for row in rows:
        if not row.n:
            continue
        samples = tuple(column(row, "sample_id").tolist())
        hits, certifies = column(row, "first_hit"), row.cell.threat.proves
        radius = {"radius": np.where(certified(row, 0.0).right, column(row, "radius").round(6), -1.0).tolist(),
                  "radii": radii([row])} if certifies else {}  # fmt: skip
        found.append({
            "attack": in_terminal(row.cell.attack.spec), "seed": row.cell.seed, "network": network(row),
            "control": is_control(row), "budget": query_budget(row), "ids": ids.setdefault(samples, len(ids)),
            "sequence": row.sequential,
            "hits": hits.tolist(), **radius,
            "right": "".join(np.where(column(row, "final_pred") == column(row, "y"), "1", "0").tolist()),
        })  # fmt: skip
    return {"never": NEVER, "apart": apart, "ids": [list(samples) for samples in ids], "rows": found}


def _templates() -> jinja2.Environment:
    """All that a template prints is escaped, but for the templates themselves."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _packaged(f"templates/{name}").decode()), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: in_terminal(value) if type(value) is str else value,
    )  # fmt: skip
    environment.globals |= {
        "columns": columns, "name_of": Name.of, "told_apart": told_apart, "charts": charts, "signs": signs,
        "legend": legend, "slug": slug,
    }  # fmt: skip
    environment.filters["json"] = lambda value: Markup(_json(value))
    environment.filters["percent"] = lambda share: "–" if not math.isfinite(share) else f"{100 * share:.1f}"
    return environment


def _json(value: Any) -> str:
    """``value`` as JSON that ends no script and starts no comment, whatever texts it holds."""
    try:
        text = _dumped(value)
    except ValueError:  # a number that is none, as few values hold
        text = _dumped(_plain(value))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """``value`` with null for what is no number."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _packaged(name: str) -> bytes:
    return resources.files("bench.site").joinpath(name).read_bytes()


def _plotly() -> bytes:
    return (library_files("plotly", "site") / "package_data" / "plotly.min.js").read_bytes()


def _itables() -> dict[str, bytes]:
    """DataTables as itables bundles it, as a plain script that leaves ``window.tables``."""
    folder = library_files("itables", "site") / "html"
    code, exported, rest = (folder / "dt_bundle.js").read_text(encoding="utf-8").rpartition(EXPORT)
    names, end, licences = rest.partition("};")
    if not exported or not end:
        raise StoreError("this version of itables has no bundle that a page can load; pip install 'parry-bench[site]'")
    public = ",".join(":".join(reversed(pair.split(" as "))) for pair in names.split(","))
    script = f"(()=>{{{code}window.tables={{{public}}};}})();\n{licences}"
    return {"tables.js": script.encode(), "tables.css": (folder / "dt_bundle.css").read_bytes()}
