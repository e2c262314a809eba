"""Red flags: signs that a figure overstates a defense, as computed facts with their evidence, not verdicts.

Two kinds come together here. What probing the served model has shown is stored with its rows; what follows from
comparing rows, one attack with another, a defense with the undefended model, is computed from their records. Such a
comparison fires on the stated effect where it is also significant: paired and exact, p below 1 %. The numbers are those
of the checklist.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from bench.outcomes import column, final, query_budget, robust
from bench.stats import mcnemar
from bench.store import Row, replace_file

SIGNIFICANT = 0.01
HALF_THE_RANGE = 0.5  # an linf radius at which nothing can be robust


@dataclass(frozen=True)
class Flag:
    """One sign against one defense in one setting."""

    setting: str
    defense: str
    flag: str
    evidence: str  # a sentence with its figures


class Sign(NamedTuple):
    """A flag that has fired, and why."""

    flag: str
    evidence: str


def flags(rows: Sequence[Row], elsewhere: Sequence[Row] = ()) -> list[Flag]:
    """Every flag that the rows of one setting fire, by defense.

    Args:
        rows: of one data set, model and threat.
        elsewhere: other rows, among which the same cells at other radii are looked for.
    """
    by_defense: dict[str, list[Row]] = {}
    for row in rows:
        if not row.cell.learns and len(row.records):
            by_defense.setdefault(row.cell.defense_name, []).append(row)
    found = []
    for defense, members in sorted(by_defense.items()):
        twins = by_defense.get("none", []) if defense != "none" else []
        others = [row for row in elsewhere if row.cell.defense_name == defense and len(row.records)]
        signs = [*_probed(members), *_alone(members), *_against_twin(members, twins), *_at_radii(members, others)]
        found += [Flag(members[0].cell.setting, defense, *sign) for sign in signs]
    return found


def write_flags(path: Path, found: Sequence[Flag]) -> None:
    """Keep the flags as JSON, for programs; a file that says so already stays as it is."""
    text = json.dumps([asdict(flag) for flag in found], indent=1, ensure_ascii=False) + "\n"
    if not path.exists() or path.read_text() != text:
        replace_file(path, lambda beside: beside.write_text(text))


def _probed(rows: Sequence[Row]) -> list[Sign]:
    """What probing the served model has found, once for each flag."""
    findings = [finding for row in rows for shard in row.shards for finding in shard.findings if finding["fired"]]
    return [Sign(*pair) for pair in sorted({finding["flag"]: finding["evidence"] for finding in findings}.items())]


def _alone(rows: Sequence[Row]) -> list[Sign]:
    checks = (
        _invalid_answers, _constraint_violation, _hits_do_not_hold, _labels_beat_scores, _transfer_beats_queries,
        _noise_beats_attacks,
    )  # fmt: skip
    return [sign for check in checks if (sign := check(rows))]


def _invalid_answers(rows: Sequence[Row]) -> Sign | None:
    """RF-10: NaN or infinite scores."""
    count = sum(int(column(row, "invalid").sum()) for row in rows)
    return Sign("invalid-answers", f"{count} attacked samples got NaN or infinite scores") if count else None


def _constraint_violation(rows: Sequence[Row]) -> Sign | None:
    """RF-30: final examples outside the ball or the box, by more than float32 rounding."""
    names = ("ball_violation", "box_violation")
    worst = max(float(column(row, name).max(initial=0)) for row in rows for name in names)
    if worst <= 1e-5:
        return None
    return Sign("constraint-violation", f"a final example left the ball or the box by {worst:.2g}")


def _hits_do_not_hold(rows: Sequence[Row]) -> Sign | None:
    """RF-32, RF-33: queries that succeeded fail when judged afresh, on more than 2 points of all samples."""
    for row in rows:
        held, lasting = robust(row, query_budget(row)).right, final(row).right
        if lasting.mean() - held.mean() > 0.02 and mcnemar(held, lasting) < SIGNIFICANT:
            return Sign(
                "hits-do-not-hold",
                f"{row.cell.attack.spec}: {_percent(held)} by first hit, {_percent(lasting)} when the same examples "
                f"are judged afresh (n={len(held)})",
            )
    return None


def _labels_beat_scores(rows: Sequence[Row]) -> Sign | None:
    """RF-26: attacks that see labels only leave more than 1 point less than those that see scores, at equal queries."""
    labels = [row for row in rows if _sees(row, "labels") and not _is_control(row)]
    return _less("labels-beat-scores", "label-only attacks", labels, "score attacks", _scored(rows))


def _transfer_beats_queries(rows: Sequence[Row]) -> Sign | None:
    """RF-17, RF-25: examples made on the undefended network leave more than 1 point less than all queries do."""
    if rows[0].cell.defense_name == "none":
        return None  # there it is a white-box attack, and may
    transfer = [row for row in rows if _is(row, "transfer")]
    queries = [row for row in rows if not _is_control(row) and (_sees(row, "labels") or _sees(row, "scores"))]
    return _less("transfer-beats-queries", "examples of the undefended network", transfer, "all queries", queries)


def _noise_beats_attacks(rows: Sequence[Row]) -> Sign | None:
    """RF-24: random noise fools samples that no attack does; not for random defenses, where every query may."""
    noise, others = [row for row in rows if _is(row, "noise")], [row for row in rows if not _is(row, "noise")]
    if not noise or not others or any("random" in part.traits for part in rows[0].cell.defense):
        return None
    both = _compare(noise, others, max(query_budget(row) for row in others))
    missed = int((both.beside & ~both.left).sum())
    if missed <= 0.002 * both.n:
        return None
    return Sign("noise-beats-attacks", f"random noise fooled {missed} of {both.n} samples that no attack did")


def _against_twin(rows: Sequence[Row], twins: Sequence[Row]) -> list[Sign]:
    """Flags of a defense beside the undefended model under the same attacks."""
    of_twins = {_attack(twin): twin for twin in twins}
    pairs = [(row, of_twins[_attack(row)]) for row in rows if _attack(row) in of_twins]
    checks = (_budget_does_not_help, _other_tactic_wins, _confuses_queries)
    return [sign for check in checks if (sign := check(pairs))]


Pairs = Sequence[tuple[Row, Row]]  # of a defense and of the undefended model, under one attack


def _budget_does_not_help(pairs: Pairs) -> Sign | None:
    """RF-18: of what stands at a tenth of the queries, the rest of them takes a quarter of what it takes undefended."""
    for row, twin in pairs:
        late, full = _common_budget(row, twin) // 10, _common_budget(row, twin)
        if not _sees(row, "scores") or late < 10:
            continue
        (stood, fell), (twin_stood, twin_fell) = _late(row, late, full), _late(twin, late, full)
        if not stood or not twin_stood or fell / stood > twin_fell / twin_stood / 4:
            continue
        table = np.array([[fell, stood - fell], [twin_fell, twin_stood - twin_fell]])
        if stats.fisher_exact(table, alternative="less").pvalue < SIGNIFICANT:
            return Sign(
                "budget-does-not-help",
                f"{row.cell.attack.spec}: queries {late:,} to {full:,} took {fell} of {stood} samples that still "
                f"stood, {twin_fell} of {twin_stood} without the defense",
            )
    return None


def _other_tactic_wins(pairs: Pairs) -> Sign | None:
    """RF-21, RF-35: a score attack leaves over 2 points less than plain Square, and half of that at most undefended."""
    scored = [(row, twin) for row, twin in pairs if _sees(row, "scores")]
    plain = next(((row, twin) for row, twin in scored if _is(row, "square")), None)
    if plain is None:
        return None
    wins = []
    for row, twin in scored:
        queries = min(_common_budget(row, twin), _common_budget(*plain))
        here, undefended = _compare([row], [plain[0]], queries), _compare([twin], [plain[1]], queries)
        if here.gap > 0.02 and here.p < SIGNIFICANT and undefended.gap < here.gap / 2:
            wins.append((here.gap, row.cell.attack.spec, here, undefended, queries))
    if not wins:
        return None
    _, name, here, undefended, queries = max(wins, key=lambda win: win[0])
    return Sign(
        "other-tactic-wins",
        f"{name} leaves {_percent(here.left)}, {plain[0].cell.attack.spec} {_percent(here.beside)} at {queries:,} "
        f"queries (n={here.n}, p={here.p:.1g}); without the defense they are {100 * undefended.gap:.1f} points apart",
    )


def _confuses_queries(pairs: Pairs) -> Sign | None:
    """RF-37: the defense gains over 10 points against a score attack, but less than 2 against transfer or labels."""
    gains = [
        (row, _compare([twin], [row], _common_budget(row, twin)).gap)
        for row, twin in pairs if not _is(row, "noise")
    ]  # fmt: skip
    scored = [(gain, row.cell.attack.spec) for row, gain in gains if _sees(row, "scores")]
    idle = [(gain, row.cell.attack.spec) for row, gain in gains if _sees(row, "labels") and gain < 0.02]
    if not scored or not idle or max(scored)[0] <= 0.1:
        return None
    shown = ", ".join(f"{100 * gain:+.1f} against {name}" for gain, name in (max(scored), *idle))
    return Sign("confuses-queries", f"points over the undefended model: {shown}")


def _at_radii(rows: Sequence[Row], elsewhere: Sequence[Row]) -> list[Sign]:
    """Flags of one defense under one attack at several radii."""
    found: dict[str, Sign] = {}
    for row in rows:
        threat, left = row.cell.threat, robust(row, query_budget(row)).right
        chance = stats.binomtest(int(left.sum()), len(left), 0.01, alternative="greater").pvalue
        if threat.norm == "linf" and threat.eps >= HALF_THE_RANGE and not _is_control(row) and chance < SIGNIFICANT:
            evidence = f"{row.cell.attack.spec} at {threat} leaves {_percent(left)} (n={len(left)})"
            found["survives-any-radius"] = Sign("survives-any-radius", evidence)  # RF-23
        for smaller in elsewhere:
            if _but_radius(row) != _but_radius(smaller) or smaller.cell.threat.eps >= threat.eps:
                continue
            both = _compare([smaller], [row], _common_budget(row, smaller))
            if both.gap > 0.01 and both.p < SIGNIFICANT:
                found["radius-does-not-help"] = Sign(  # RF-22
                    "radius-does-not-help",
                    f"{row.cell.attack.spec} leaves {_percent(both.beside)} at {threat}, {_percent(both.left)} at "
                    f"{smaller.cell.threat} (n={both.n}, p={both.p:.1g})",
                )
    return list(found.values())


class _Comparison(NamedTuple):
    """Who stands (n,) under one set of attacks and beside it under another, on their common samples."""

    left: NDArray[np.bool_]
    beside: NDArray[np.bool_]

    @property
    def n(self) -> int:
        return len(self.left)

    @property
    def gap(self) -> float:
        """By how much less is left than beside."""
        return float(self.beside.mean() - self.left.mean()) if self.n else 0.0

    @property
    def p(self) -> float:
        return mcnemar(self.left, self.beside)


def _compare(ours: Sequence[Row], theirs: Sequence[Row], queries: int) -> _Comparison:
    both = pd.concat([_standing(ours, queries), _standing(theirs, queries)], axis=1, join="inner").to_numpy()
    return _Comparison(both[:, 0], both[:, 1])


def _standing(rows: Sequence[Row], queries: int) -> "pd.Series[bool]":
    """By sample id, for the samples that all rows have met: whether none of them beat it in so many queries."""
    parts = [
        pd.Series(robust(row, min(queries, query_budget(row))).right, index=column(row, "sample_id")) for row in rows
    ]
    return pd.concat(parts, axis=1, join="inner").all(axis=1)


def _less(flag: str, our_name: str, ours: Sequence[Row], their_name: str, theirs: Sequence[Row]) -> Sign | None:
    """Fires where the worst case over ``ours`` leaves more than 1 point less than that over ``theirs``."""
    if not ours or not theirs:
        return None
    most = max(query_budget(row) for row in theirs)
    queries = most if all(_is(row, "transfer") for row in ours) else min(most, max(query_budget(row) for row in ours))
    both = _compare(ours, theirs, queries)
    if both.gap <= 0.01 or both.p >= SIGNIFICANT:
        return None
    strongest = min(ours, key=lambda row: float(robust(row, query_budget(row)).right.mean())).cell.attack.spec
    return Sign(
        flag,
        f"{our_name} ({strongest}) leave {_percent(both.left)}, {their_name} {_percent(both.beside)} at {queries:,} "
        f"queries (n={both.n}, p={both.p:.1g})",
    )


def _late(row: Row, late: int, full: int) -> tuple[int, int]:
    """How many samples stand after ``late`` queries, and how many of them fall by ``full``."""
    stood = int(robust(row, late).right.sum())
    return stood, stood - int(robust(row, full).right.sum())


def _common_budget(row: Row, other: Row) -> int:
    return min(query_budget(row), query_budget(other))


def _attack(row: Row) -> tuple[str, int]:
    return row.cell.attack.spec, row.cell.seed


def _but_radius(row: Row) -> tuple[object, ...]:
    cell = row.cell
    return cell.data_hash, cell.model.spec, cell.weights_hash, cell.threat.norm, cell.quantise, *_attack(row)


def _is(row: Row, name: str) -> bool:
    return row.cell.attack.spec.partition("(")[0] == name


def _is_control(row: Row) -> bool:
    return _is(row, "transfer") or _is(row, "noise")


def _sees(row: Row, access: str) -> bool:
    return row.cell.threat.access == access


def _scored(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if _sees(row, "scores")]


def _percent(right: NDArray[np.bool_]) -> str:
    return f"{100 * right.mean():.1f} %"
