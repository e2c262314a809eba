"""What stands behind the figures of an entry: its authors' word, or somebody who has run a part of it again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from bench.entries.folder import ENTRY, VERIFIED
from bench.entries.statement import Entry, Hash, read_entry
from bench.errors import ConfigError, StoreError
from bench.plan.cell import Component
from bench.report.standings import Table
from bench.report.versions import Code
from bench.results.shards import content_of

LARGEST = 1 << 20  # bytes of verified.json


class Verified(BaseModel):
    """What ``verified.json`` says: who has run which part of which entry again, on what, and when."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_by_name=True)

    schema_: Annotated[Literal[1], Field(alias="schema")]
    entry_sha256: Hash  # of entry.json as it was
    by: Annotated[str, Field(min_length=1, max_length=100)]
    fraction: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=1)]
    outcome: str
    hardware: str
    packages: str
    commit: str
    finished: str


class Known(NamedTuple):
    """An entry and who has verified it, if somebody has."""

    entry: Entry
    verified: Verified | None

    @property
    def codes(self) -> list[Code]:
        """Those of its defenses that are code of its authors."""
        return [code for code in self.chain if "+" in code[1]]

    @property
    def chain(self) -> list[Code]:
        """Its defenses, each as it is written, with its version."""
        return [(part.spec, part.version) for part in self.entry.components if part.kind == "defense"]

    @property
    def standing(self) -> str:
        """Who has verified it, and how much of it."""
        if self.verified is None:
            return "self-reported"
        share = f"{100 * self.verified.fraction:g} %"
        return f"verified by {self.verified.by}, {self.verified.finished[:10]}, on {share} of the samples"

    @property
    def words(self) -> dict[str, str]:
        """What its authors say of it, and what stands behind it."""
        about = self.entry.about
        told = {"entered as": about.name, "by": ", ".join(about.authors), "summary": about.summary,
                "paper": about.paper, "link": about.link, "standing": self.standing}  # fmt: skip
        return {name: text for name, text in told.items() if text.strip()}

    def __str__(self) -> str:
        about = self.entry.about
        return f"{about.name} by {', '.join(about.authors)} ({self._label}): {self.standing}"

    @property
    def _label(self) -> str:
        """What tables call its defense."""
        return " + ".join(Component(spec, version).label for spec, version in self.chain) or self.entry.defense


def verification(folder: Path) -> Verified | None:
    """Who has verified the entry in ``folder`` as it is now.

    Raises:
        StoreError: what is there is no verification, or one of an entry that has changed since.
    """
    path = folder / VERIFIED
    if not path.exists() and not path.is_symlink():
        return None
    try:
        found = Verified.model_validate_json(_plain(path, LARGEST))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise StoreError(f"{path} is no verification: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if found.entry_sha256 != sha256(_plain(folder / ENTRY, 1 << 30)).hexdigest():
        raise StoreError(f"{path} is of another {ENTRY} than the one beside it; verify again, or delete it")
    return found


def entries_in(folder: Path) -> tuple[list[tuple[Path, Known]], list[StoreError]]:
    """The entries in ``folder`` and below, and what is wrong with those that cannot be read."""
    found, damaged = [], []
    for path in sorted(folder.rglob(ENTRY)):
        try:
            entry, _ = read_entry(path)
        except StoreError as error:
            damaged.append(error)
            continue
        verified = None
        try:
            verified = verification(path.parent)
        except StoreError as error:
            damaged.append(error)
        found.append((path.parent, Known(entry, verified)))
    return found, damaged


def check_boards(known: Iterable[Known]) -> None:
    """Whether all entries answer the same version of a board, so that they may stand in one table.

    Raises:
        ConfigError: two of them do not.
    """
    found: dict[str, Entry] = {}
    for entry in (each.entry for each in known):
        first = found.setdefault(entry.suite, entry)
        if first.board != entry.board:
            raise ConfigError(
                f"{first.about.name} answers {first.board} and {entry.about.name} {entry.board}; versions of a board "
                "never mix: name a folder with entries of one"
            )


def marked(tables: Sequence[Table], known: Iterable[Known]) -> list[Table]:
    """The tables, the lines of each entered defense with the mark of what stands behind it, and its authors' words.

    Two authors may call their files alike, so a defense is known by the hash of its code, too.
    """
    entered: dict[frozenset[Code], list[Known]] = {}
    for each in known:
        entered.setdefault(frozenset(each.chain), []).append(each)
    return [_marked(table, entered) for table in tables] if entered else list(tables)


def _marked(table: Table, entered: Mapping[frozenset[Code], Sequence[Known]]) -> Table:
    chains = {row.cell.defense_label: row.cell.defense for row in table.rows}
    found = {label: entered.get(frozenset((part.spec, str(part.version)) for part in chain), ())
             for label, chain in chains.items()}  # fmt: skip
    marks = {label: "verified" if all(each.verified for each in of) else "self-reported"
             for label, of in found.items() if of}  # fmt: skip
    return replace(
        table,
        lines=[
            replace(line, marks=line.marks | {marks[line.defense]}) if line.defense in marks else line
            for line in table.lines
        ],
        words={label: [each.words for each in of] for label, of in found.items() if of},
    )


def _plain(path: Path, largest: int) -> bytes:
    if path.is_symlink():
        raise StoreError(f"{path} is a link; an entry holds plain files alone")
    return content_of(path, largest)
