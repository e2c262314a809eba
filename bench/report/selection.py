"""Some lines of tables that are computed already: a selection shows less and changes no figure."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from bench.errors import ConfigError, did_you_mean
from bench.plan.cell import Component
from bench.plan.pin import placeless
from bench.registry import Registry, attacks, defenses
from bench.report.line import attack_label
from bench.report.standings import Table
from bench.results.spelling import is_spelt
from bench.spec import parse_chain

_VERSION = re.compile(r"( #\w+| \(version [^)]*\))(?= \+ |$|, seed)|, seed \d+$")
_POOLED = re.compile(r"(worst|best) of \d+")


@dataclass(frozen=True)
class Selection:
    """What to show, by names: one of ``defenses``, one of ``attacks`` and one of ``tracks``; empty means all.

    A name with its arguments fits what is the same in whatever words, and as a bare name every line that has it among
    its parts, with whatever arguments. ``worst`` and ``best`` stand for all attacks together: the only line of a
    defense is that, too.
    """

    defenses: Sequence[str] = ()
    attacks: Sequence[str] = ()
    tracks: Sequence[str] = ()

    def of(self, tables: Sequence[Table]) -> list[Table]:
        """The tables with the lines that fit, and the flags of their defenses; none that has no line left.

        Raises:
            ConfigError: a name that fits no line, or names that fit none together.
        """
        asked = {"defense": self.defenses, "attack": self.attacks, "track": self.tracks}
        wanted = {what: [*map(_written, names)] for what, names in asked.items() if names}
        if not wanted:
            return list(tables)
        called = [_called(table, wanted) for table in tables]
        for what, names in wanted.items():
            known = sorted({name for lines in called for line in lines for name in line[what]})
            for name in names:
                if name not in known:
                    otherwise = f"present: {', '.join(known)}"
                    raise ConfigError(f"no line of {what} {name!r}; {did_you_mean(name, known, otherwise)}")
        fit = [[all(line[what].intersection(names) for what, names in wanted.items()) for line in lines]
               for lines in called]  # fmt: skip
        if not any(map(any, fit)):
            together = " and ".join(f"{what} {' or '.join(map(repr, names))}" for what, names in wanted.items())
            raise ConfigError(f"no line has {together} together; leave one of them out")
        return [_cut(table, fits) for table, fits in zip(tables, fit, strict=True) if any(fits)]


def _cut(table: Table, fits: Sequence[bool]) -> Table:
    if all(fits):
        return table
    lines = list(compress(table.lines, fits))
    defenses = {line.defense for line in lines}
    note = f"Shown: {len(lines)} of {len(fits)} lines; ranks, worst cases and flags are of all of them"
    return replace(
        table, lines=lines, whole=table.lines, notes=[note, *table.notes],
        flags=[flag for flag in table.flags if flag.defense in defenses],
    )  # fmt: skip


def _called(table: Table, wanted: Mapping[str, Sequence[str]]) -> list[dict[str, set[str]]]:
    """What the defense, the attack and the track of each line may be called, also in the words that are ``wanted``."""
    lines_of = Counter(line.defense for line in table.lines)
    names = {label: _names(label) for line in table.lines for label in (line.defense, line.attack)}
    chains = {row.cell.defense_label: row.cell.defense for row in table.rows}
    met = {attack_label(row): (row.cell.attack,) for row in table.rows}
    known: list[tuple[str, Mapping[str, Sequence[Component]], Registry[Any]]]
    known = [("defense", chains, defenses), ("attack", met, attacks)]
    for what, parts, registry in known:
        for label in names.keys() & parts.keys():
            names[label] |= {name for name in wanted.get(what, ()) if is_spelt(parts[label], name, registry)}
    return [
        {
            "defense": names[line.defense],
            "attack": names[line.attack] | ({"worst", "best"} if lines_of[line.defense] == 1 else set()),
            "track": {table.track},
        }
        for line in table.lines
    ]


def _names(label: str) -> set[str]:
    if pooled := _POOLED.match(label):
        return {label, pooled[1]}
    plain = _VERSION.sub("", label)
    try:
        return {label, plain, _written(plain), *(part.name for part in parse_chain(plain))}
    except ConfigError:  # a label need not be a name that can be given
        return {label, plain}


def _written(name: str) -> str:
    """``name`` as rows write it; where it cannot be read, as it came."""
    try:
        return " + ".join(str(placeless(part)) for part in parse_chain(name)) or "none"
    except ConfigError:
        return name
