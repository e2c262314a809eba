"""What a track is: one way to attack a defense, with all that is done otherwise than in the others."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from bench.plan.cell import Cell
from bench.report.line import Line
from bench.report.outcomes import Share
from bench.report.ranking import Held
from bench.results.store import Row
from bench.threat import Access

if TYPE_CHECKING:
    from bench.measure.inspection import Inspector
    from bench.measure.measured import Measured
    from bench.measure.pipeline import Pipeline
    from bench.plan.tasks import Task


@dataclass(frozen=True)
class Tools:
    """What a run measures with; at most ``batch_size`` images are forwarded at once.

    ``examples`` asks for the final examples of attacks, too, which are large.
    """

    pipeline: "Pipeline"
    inspect: "Inspector"
    batch_size: int
    examples: bool = False


class Progress(Protocol):
    """Who is told how far a shard is."""

    def epochs(self, done: int, total: int) -> None: ...

    def queries(self, first: int, settled: int) -> None:
        """``settled`` queries of the batch that starts at sample ``first`` of the shard."""
        ...


class Words(NamedTuple):
    """What web pages call things: the ``main`` share, the ``decisive`` one of those who get it, ``one`` of them, what
    ``each`` of them does, and the ``clean`` share."""

    main: str
    decisive: str
    one: str
    each: str
    clean: str


class Track(Protocol):
    """The cells whose attacks have one of these ``accesses``; its rows stand in tables of their own."""

    @property
    def name(self) -> str: ...
    @property
    def accesses(self) -> frozenset[Access]: ...
    @property
    def beside(self) -> frozenset[Access]:
        """Accesses of other tracks whose attacks its adversary has, too: their rows count in its tables as well."""
        ...
    @property
    def pools(self) -> bool:
        """Whether all attacks together are one worst case, sample by sample."""
        ...

    @property
    def heads(self) -> bool:
        """Whether a defense with several lines has one above them, which stands for all."""
        ...

    @property
    def words(self) -> Words: ...
    @property
    def measures(self) -> str:
        """What its shares are of, in two words."""
        ...
    @property
    def good(self) -> Literal["high", "low"]:
        """Which share is good for the defense."""
        ...
    @property
    def reading(self) -> str:
        """What a reader has to know of the worst case: what it is, and which way is good."""
        ...

    def shard_size(self, task: "Task", size: int) -> int:
        """How many samples are measured and stored at once, where ``size`` are wanted."""
        ...

    def measure(
        self, task: "Task", positions: Sequence[int], tools: Tools, progress: Progress
    ) -> "AbstractContextManager[Measured]":
        """Measure the samples of a cell at ``positions``, ascending; what came of it is stored before the context ends.
        """
        ...

    def queries(self, task: "Task", samples: int) -> int | None:
        """The most queries that ``samples`` can cost; ``None`` where the cost is all training, which is not timed."""
        ...

    def title(self, cell: Cell) -> str:
        """What the table of a cell is called."""
        ...

    def facts(self, cell: Cell) -> dict[str, str]:
        """What has to be equal in one table beside its title, the data and the weights, by what it is called."""
        ...

    def summary(self, row: Row) -> str:
        """A finished cell in one phrase."""
        ...

    def line(self, row: Row, budgets: Sequence[int]) -> Line:
        """The line of one row, unranked; ``budgets`` are query budgets to show."""
        ...

    def lines(self, rows: Sequence[Row], budgets: Sequence[int]) -> list[Line]:
        """All lines of the rows of one setting, ranked, the best defense first."""
        ...

    def shares(self, rows: Sequence[Row], budgets: Sequence[int]) -> dict[str, Share]:
        """What rows of one defense come to together: the worst case, for each network, by column of the table."""
        ...

    def notes(self, lines: Sequence[Line]) -> list[str]:
        """What the reader of these lines must know."""
        ...


@runtime_checkable
class Contested(Protocol):
    """A track whose defenses are ranked by one worst case, sample by sample."""

    def contest(self, rows: Sequence[Row]) -> dict[str, Held]:
        """How each defense stands that can be ranked among ``rows``, which are of one setting, by its name."""
        ...
