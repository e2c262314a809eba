"""Published figures: what papers and repositories print, as data that our rows can be held against."""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bench.errors import ConfigError, did_you_mean
from bench.spec import Spec, parse_chain
from bench.threat import Norm, parse_eps

LEADERBOARDS = Path(__file__).resolve().parents[2] / "leaderboards"  # there in a checkout, not in a wheel

Metric = Literal[
    "clean accuracy",
    "robust accuracy",           # of all samples; those that are wrong when clean count as broken
    "success rate",              # of the attack, among the samples that are right when clean
    "failure rate",              # 100 - success rate
    "mean queries",              # of the samples that fell
    "median queries",
    "mean distance",             # to the nearest misclassified image that was found
    "test accuracy",             # on clean images, of a network trained on released data
    "certified accuracy",        # at radius eps
    "average certified radius",
    "optimality",                # of an attack's distances against the best known ones
    "logit difference",          # mean l2 distance between defended and undefended logits
]  # fmt: skip


class Measure(NamedTuple):
    """The unit of a metric, and the values that it can have."""

    unit: str
    low: float
    high: float


_OTHER: dict[str, Measure] = {
    "mean queries": Measure("queries", 1, math.inf),
    "median queries": Measure("queries", 1, math.inf),
    "mean distance": Measure("pixel scale", 0, 1),
    "average certified radius": Measure("pixel scale", 0, math.inf),
    "optimality": Measure("1 is the best", 0, 1),
    "logit difference": Measure("logits", 0, math.inf),
}
MEASURES: dict[str, Measure] = {metric: _OTHER.get(metric, Measure("%", 0, 100)) for metric in get_args(Metric)}


class Ours(BaseModel):
    """The components of ours that a published setting names, with no more arguments than its source states.

    ``defense`` is a chain, ``none`` for an undefended model. Where it is left out and ``model`` is given, the model is
    the defense. What we do not have is left out, and the figure then waits for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    defense: str | None = None
    attack: str | None = None

    @pydantic.model_validator(mode="after")
    def _readable(self) -> "Ours":
        for text in filter(None, (self.model, self.attack)):
            Spec.parse(text)
        parse_chain(self.defense or "none")
        return self


class Figure(BaseModel):
    """One published number and everything that its source says about how it came about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    place: str                  # where in the source: abstract, table, file
    dataset: str                # by our names
    model: str                  # model, defense and attack in the words of the source
    defense: str = "none"
    attack: str = "none"
    norm: Norm | None = None
    eps: Annotated[float, BeforeValidator(parse_eps), Field(ge=0, allow_inf_nan=False)] | None = None  # pixel scale
    queries: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    quantise: bool | None = None  # whether the service rounds queries to 8 bit
    metric: Metric
    value: Annotated[float, Field(allow_inf_nan=False)]
    note: str = ""
    spec: Ours = Ours()

    @property
    def unit(self) -> str:
        """What ``value`` counts."""
        return MEASURES[self.metric].unit

    @pydantic.model_validator(mode="after")
    def _in_range(self) -> "Figure":
        unit, low, high = MEASURES[self.metric]
        if not low <= self.value <= high:
            raise ValueError(f"{self.metric} is {self.value:g}, not in {low:g} to {high:g} ({unit}); check the source")
        if self.eps is not None and self.norm is None:
            raise ValueError(f"eps is {self.eps:g} in no norm; add norm = one of {', '.join(get_args(Norm))}")
        return self


class Copy(BaseModel):
    """A copy of a data set that is not the one papers measure on, by the hash that rows store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    hash: str
    name: str


class Published(NamedTuple):
    """All figures of a folder, and the names of the copies of data sets by their hash."""

    figures: list[Figure]
    copies: dict[str, str]


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow")

    values: list[float | Literal["-"]]  # "-" where nothing is printed


class _Table(BaseModel):
    model_config = ConfigDict(extra="allow")

    columns: Annotated[list[dict[str, Any]], Field(min_length=1)] = [{}]
    rows: Annotated[list[_Line], Field(min_length=1)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    table: list[_Table] = []
    copies: Annotated[list[Copy], Field(alias="copy")] = []


def load_published(folder: Path | None = None) -> Published:
    """Read every TOML file of ``folder``, by default the one that comes with a checkout.

    A file holds tables as their source prints them: each of ``rows`` has one value for each of ``columns``. A figure's
    settings are those of its file, its table, its row and its column together, the later winning.

    Raises:
        ConfigError: no such folder, or something in a file that is not a figure; the message says where.
    """
    folder = folder or LEADERBOARDS / "published"
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise ConfigError(
            f"no published figures in {folder}; they come with a checkout of the repository, not with an installed "
            "package: name their folder with --figures"
        )
    result = Published([], {})
    for path in files:
        figures, copies = _read(path)
        result.figures.extend(figures)
        result.copies.update(copies)
    return result


def result_folders() -> list[Path]:
    """The results folders that come with a checkout.

    Raises:
        ConfigError: there are none.
    """
    folders = sorted(path for path in LEADERBOARDS.glob("*") if path.is_dir() and path.name != "published")
    if not folders:
        raise ConfigError(f"no results folders in {LEADERBOARDS}; name one, as in bench compare --published FOLDER")
    return folders


def _read(path: Path) -> Published:
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    columns = content.pop("columns", None)  # may serve all tables of a file
    shared = {key: content.pop(key) for key in list(content) if key in Figure.model_fields}
    if columns is not None and isinstance(content.get("table"), list):
        content["table"] = [{"columns": columns, **table} for table in content["table"] if isinstance(table, dict)]
    try:
        file = _File.model_validate(content)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_problem(error, [*Figure.model_fields, 'columns', 'table', 'copy'])}") from None
    figures = [
        figure
        for number, table in enumerate(file.table, start=1)
        for figure in _figures(table, shared, f"{path}, table {number}")
    ]
    return Published(figures, {copy.hash: copy.name for copy in file.copies})


def _figures(table: _Table, shared: Mapping[str, Any], where: str) -> list[Figure]:
    figures = []
    for number, line in enumerate(table.rows, start=1):
        if len(line.values) != len(table.columns):
            raise ConfigError(
                f"{where}, row {number} has {len(line.values)} values for {len(table.columns)} columns; "
                'write "-" where nothing is printed'
            )
        for column, value in zip(table.columns, line.values, strict=True):
            if value == "-":
                continue
            layers = (shared, table.model_extra or {}, line.model_extra or {}, column)
            settings = {key: value for layer in layers for key, value in layer.items()}
            specs = [layer["spec"] for layer in layers if "spec" in layer]
            if all(isinstance(spec, dict) for spec in specs):
                settings["spec"] = {key: name for spec in specs for key, name in spec.items()}
            try:
                figures.append(Figure.model_validate({**settings, "value": value}))
            except pydantic.ValidationError as error:
                raise ConfigError(f"{where}, row {number}: {_problem(error, [*Figure.model_fields])}") from None
    return figures


def _problem(error: pydantic.ValidationError, known: list[str]) -> str:
    """The first thing that is wrong, with its place and its remedy, in one line."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")  # a typing error explains
    place = " ".join(str(part + 1 if isinstance(part, int) else part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key; {did_you_mean(str(problem['loc'][-1]), known)}"
    if problem["type"] == "missing":
        return f"{place} is missing; add it to the row, the column, the table or the file"
    cause = problem.get("ctx", {}).get("error")  # of our own checks, which say what came
    return str(cause) if cause else f"{place} is {problem['input']!r}; {problem['msg'].lower()}"
