"""The defenses of two runs beside each other, where all else of the runs is the same; refused where it is not."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np

from bench.errors import ConfigError
from bench.report.compare import Duel, Sides, best_rows, duel, listed, present, refuse_stopped
from bench.report.outcomes import clean, query_budget, restricted, seen, standing, tested
from bench.report.ranking import Encounter
from bench.report.same_attack import differences, other_attack
from bench.report.settings import HASH, by_setting
from bench.report.stats import mcnemar
from bench.report.versions import by_version
from bench.results.spelling import Spelling
from bench.results.store import Row
from bench.tracks import track_of

ROUNDED = 0.001  # share of clean images that another machine may answer otherwise, by rounding alone
CHANCE = 0.001  # p-value below which two runs of one attack are no longer one and the same by chance


class Run(NamedTuple):
    """Where somebody's rows come from, and the rows."""

    name: str
    rows: Sequence[Row]


def duels_of_runs(a: Run, b: Run, defense: str | None = None, budgets: Sequence[int] | None = None) -> list[Duel]:
    """The defense of ``a`` and that of ``b`` in every setting that both ran in.

    Args:
        defense: the chain to take from a run that holds several; by default each holds one, beside the undefended
            model.
        budgets: as in :func:`bench.report.compare.duels`.

    Raises:
        ConfigError: a run holds no such defense, or the two differ in something that no difference between defenses
            may come from: data, model, threat, precision, samples, the parameters of an attack, or what the undefended
            model did.
    """
    spelling = Spelling(row.cell for run in (a, b) for row in run.rows)
    newest = [[replace(row, cell=spelling.alike(row.cell)) for row in by_version(run.rows).newest] for run in (a, b)]
    chosen = [_chosen(Run(run.name, rows), defense) for run, rows in zip((a, b), newest, strict=True)]
    plain = [[row for row in rows if not row.cell.defense] for rows in newest]
    refuse_stopped(row for rows in (*chosen, *plain) for row in rows)
    settings = by_setting({id(row): row for rows in (*chosen, *plain) for row in rows}.values())
    common = {title: sides for title, members in settings.items() if all(sides := _among(members, chosen))}
    if not common:
        raise ConfigError(f"{a.name} and {b.name} do not compare: {_apart(*chosen)}; run both alike")
    names = _names(a, b, [_written(rows) for rows in chosen])
    for title, sides in common.items():
        if reason := _differing(sides) or _disagreeing(_among(settings[title], plain)):
            raise ConfigError(f"{a.name} and {b.name} do not compare on {title}: {reason}")
    return [duel(title, sides, budgets, names) for title, sides in common.items()]


def _chosen(run: Run, defense: str | None) -> list[Row]:
    """The rows of the one defense of a run, or of the one that was asked for."""
    titles = {row.cell.defense_title for row in run.rows}
    own = sorted(titles - {"none"}) or sorted(titles)
    if defense is not None and (len(own) != 1 or defense in titles):
        title = present(defense, run.rows)
    elif len(own) == 1:
        (title,) = own
    else:
        raise ConfigError(f"{run.name} holds {len(own)} defenses, {listed(own)}; name one with --defense")
    return [row for row in run.rows if row.cell.defense_title == title]


def _written(rows: Sequence[Row]) -> str:
    return rows[0].cell.defense_title


def _names(a: Run, b: Run, titles: Sequence[str]) -> tuple[str, str]:
    """What the two are called: the defense, with its run where both are written alike."""
    one, other = titles
    return (one, other) if one != other else (f"{one} ({a.name})", f"{other} ({b.name})")


def _among(members: Iterable[Row], sides: Sequence[Sequence[Row]]) -> Sides:
    """Of the rows of each side those that are ``members``."""
    known = {id(row) for row in members}
    return Sides(*([row for row in side if id(row) in known] for side in sides))


def _apart(a: Sequence[Row], b: Sequence[Row]) -> str:
    """What keeps the settings apart that are nearest to each other."""
    settings = [list({tuple(terms.values()): terms for terms in map(_terms, rows)}.values()) for rows in (a, b)]
    differing = (differences(one, other) for one, other in product(*settings))
    return "; ".join(sorted(differing, key=len)[0])


def _terms(row: Row) -> dict[str, str]:
    """All that has to be equal of two settings."""
    cell = row.cell
    return {
        "data set": cell.dataset.spec,
        "version of the data set": str(cell.dataset.version),
        "content of the data set": cell.data_hash[:HASH],
        "model": cell.model.spec,
        "version of the model": str(cell.model.version),
        "weights": cell.weights_hash[:HASH],
        "track": track_of(cell).name,
        "threat": f"{cell.threat.norm} {cell.threat.eps!r}",
        "input": "8-bit" if cell.quantise else "float",
        "precision": cell.numerics,
    }


def _differing(sides: Sides) -> str:
    """Why the attacks of two runs in one setting are not the same; empty where they are."""
    met_a, met_b = map(best_rows, sides)
    for name in sorted({row.cell.attack.name for row in met_a.values()}):
        specs = [{row.cell.attack.spec for row in met.values() if row.cell.attack.name == name}
                 for met in (met_a, met_b)]  # fmt: skip
        if specs[1] and not specs[0] & specs[1]:
            one, other = map(listed, specs)
            return f"attack {one} and attack {other} have other parameters, so they are not the same attack"
    if reason := other_attack(met_a, met_b):
        return reason
    for encounter in sorted(met_a.keys() & met_b.keys()):
        a, b = met_a[encounter], met_b[encounter]
        if set(a.cell.ids) != set(b.cell.ids):
            both = len(set(a.cell.ids) & set(b.cell.ids))
            return (
                f"{encounter[0]} ran on {len(a.cell.ids)} samples in the first and {len(b.cell.ids)} in the second, "
                f"{both} of them the same; run both on one sample list"
            )
    return ""


def _disagreeing(undefended: Sides) -> str:
    """Why the undefended models of two runs are not one; empty where they are, or where one run has none."""
    met_a, met_b = map(best_rows, undefended)
    if reason := other_attack(met_a, met_b):
        return reason
    for encounter in sorted(met_a.keys() & met_b.keys()):
        if reason := _other_model(encounter, met_a[encounter], met_b[encounter]):
            return f"the undefended models differ: {reason}; run both with the same weights and library versions"
    return ""


def _other_model(encounter: Encounter, a: Row, b: Row) -> str:
    """What tells the models of two rows of one attack apart, more than rounding (clean) or chance (attacked) can."""
    common = np.intersect1d(a.measured["sample_id"], b.measured["sample_id"]).tolist()
    a, b = (restricted(seen(row), common) for row in (a, b))
    answers = [clean(row).right for row in (a, b)]
    differ = int((answers[0] != answers[1]).sum())
    if differ > ROUNDED * len(common):
        return f"{differ} of {len(common)} clean images are right with one and wrong with the other"
    queries = min(query_budget(a), query_budget(b))
    one, other = (standing(row, queries) if len(answers[0]) else tested(row) for row in (a, b))
    if mcnemar(one.right, other.right) < CHANCE:
        return f"{encounter[0]} leaves {100 * one.value:.1f} % in the first and {100 * other.value:.1f} % in the second"
    return ""
