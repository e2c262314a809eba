"""One line of a table, and what the lines of every track share: their order, names and ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from bench.report.outcomes import Share, network
from bench.report.ranking import Held, counted
from bench.results.store import Row


@dataclass(frozen=True)
class Line:
    """One line of a table."""

    defense: str
    attack: str
    shares: dict[str, Share]
    n: int
    marks: frozenset[str] = frozenset()
    rank: int | None = None
    extra: dict[str, float] = field(default_factory=dict)
    row: Row | None = None  # that it is of; nothing for several
    figures: dict[str, float] = field(default_factory=dict)  # of one row; see bench.report.figures
    lasting: dict[str, Share] = field(default_factory=dict)  # of random defenses; see bench.report.outcomes.lasting
    error: str = ""  # the last line of what a failed row has raised
    untried: tuple[str, ...] = ()  # attacks that know the defense and have not met it, where that bars its rank
    says: str = ""  # the column that tells the most; without, the last one
    of: int = 0  # samples of its cell, where it has met only the ``n`` of them that other attacks had left

    @property
    def samples(self) -> str:
        """How many it has met."""
        return f"{self.n} of {self.of}" if self.of else str(self.n)

    @property
    def left(self) -> tuple[str, Share] | None:
        """What is left in the end, under all queries, and the head of that column; nothing where nothing was measured.

        That is the last share beside those on clean images and on final examples, or the one that ``says`` the most.
        """
        if self.says:
            return (self.says, self.shares[self.says]) if self.shares[self.says].n else None
        measured = [(name, share) for name, share in self.shares.items() if share.n and name not in ("clean", "final")]
        return measured[-1] if measured else None


def by_defense(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each chain of defenses, as suites write it, with the hash of what is users' code."""
    result: dict[str, list[Row]] = {}
    for row in ordered(rows):
        chain = [f"{part.spec} #{part.version}" if part.of_a_file else part.spec for part in row.cell.defense]
        result.setdefault(" + ".join(chain) or "none", []).append(row)
    return result


def by_classifier(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each defense with each of its certifiers, by what both are called: a row of each of its networks.

    On weights that were given, seeds change the draws alone: they are tries on one network, each by itself.
    """
    result: dict[tuple[str, str], list[Row]] = {}
    for row in chain.from_iterable(map(counted, by_defense(rows).values())):
        name = attack_label(row, seed=network(row) is None)
        result.setdefault((row.cell.defense_label, name), []).append(row)
    return result


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By defense, attack and seed."""
    return sorted(rows, key=lambda row: (row.cell.defense_name, row.cell.attack.spec, row.cell.seed))


def attack_label(row: Row, seed: bool = True) -> str:
    """The attack of a row as tables show it."""
    return row.cell.attack.label + (seed_label(row) if seed else "")


def seed_label(row: Row) -> str:
    """What tells its seed from the first."""
    return f", seed {row.cell.seed}" if row.cell.seed else ""


def hardest(lines: Iterable[Line]) -> Line | None:
    """The line of the attack whose final examples leave the least; of a control only where there is nothing else."""
    known = [line for line in lines if line.row is not None and "final" in line.shares and line.shares["final"].n]
    return min(known, key=lambda line: ("control" in line.marks, line.shares["final"].value), default=None)


def has_ranks(lines: Iterable[Line]) -> bool:
    """Whether two defenses or more are ranked, so that there are ranks to tell apart."""
    return sum(line.rank is not None for line in lines) > 1


def with_rank(line: Line, rank: int | None, held: Held | None) -> Line:
    """``line`` with its rank, and a mark where that is of less than its own figures."""
    return replace(line, rank=rank, marks=line.marks | ({"cut"} if rank and held and held.cut else set()))
