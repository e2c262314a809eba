"""Red flags: signs that a figure overstates a defense, as computed facts with their evidence, not verdicts.

Two kinds come together here. What probing the served model has shown is stored with its rows; what follows from
comparing rows, one attack with another, a defense with the undefended model, is computed from their records. Such a
comparison is made within one seed, on the samples that all of its rows have met. It fires on the stated effect where
that is also significant: exact, paired where both sides are the same samples, p below 1 %. RF numbers are those of
docs/red-flags.md. Where several rows fire a flag, the widest effect is the evidence.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.plan.cell import Cell
from bench.report.comparison import (
    SIGNIFICANT,
    Comparison,
    Samples,
    beside,
    common_ids,
    compared,
    in_common,
    standing,
)
from bench.report.line import ordered
from bench.report.outcomes import clean, column, final, is_control, query_budget, robust, seen
from bench.report.stats import binomial_above, fisher_below, mcnemar
from bench.results.store import Row
from bench.rules import NEVER
from bench.system.files import keep_file
from bench.system.spread import spread

THRESHOLDS = {  # the effect beyond which each flag fires; docs/red-flags.md says of what, and why
    "invalid-answers": 0.0,
    "certificate-contradicted": 0.0,
    "constraint-violation": 1e-5,
    "hits-do-not-hold": 0.02,
    "search-is-blind": 0.01,
    "labels-beat-scores": 0.01,
    "transfer-beats-queries": 0.01,
    "queries-beat-gradients": 0.01,
    "square-beats-gradients": 0.002,
    "noise-beats-attacks": 0.002,
    "survives-any-radius": 0.01,
    "explained-by-chance": 0.1,
    "budget-does-not-help": 0.25,
    "other-tactic-wins": 0.02,
    "confuses-queries": 0.1,
    "radius-does-not-help": 0.01,
}
HALF_THE_RANGE = 0.5  # an linf radius at which nothing can be robust
LEAST = 20  # images below which chance may explain much
IDLE = 0.02  # what a defense may not gain beside scores, to have confused queries
ONE_STEP = ("fgsm", "r-fgsm")  # which leave what any attack takes


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
    """Every flag that the rows of one setting fire, by defense; of several seeds that fire it, the lowest is shown.

    Args:
        rows: of one data set, model and threat.
        elsewhere: other rows, among which the same cells at other radii are looked for.
    """
    every, others = _by_model(rows), _by_model(elsewhere)
    served = {model: _whole(members) for model, members in every.items()}
    found: dict[tuple[str, str], Flag] = {}

    def signs(model: tuple[str, int]) -> list[Sign]:
        signs = [*_probed(every[model]), *_in_single_samples(every[model])]
        if whole := served[model]:
            twins = served.get((_undefended(whole[0].cell), model[1]), [])
            at_other_radii = _whole(others.get(model, []))
            every_attack = len(whole) == len(every[model])
            signs += [*_alone(whole, every_attack), *_beside(whole, twins), *_at_radii(whole, at_other_radii)]
        return signs

    models = sorted(every)
    for (defense, seed), fired in zip(models, spread(signs, models), strict=True):
        for flag, evidence in fired:
            shown = f"{evidence}, seed {seed}" if seed else evidence
            found.setdefault((defense, flag), Flag(every[defense, seed][0].cell.setting, defense, flag, shown))
    for row in ordered(rows):
        if sign := _certificate_contradicted(row):
            defense = row.cell.defense_label
            found.setdefault((defense, sign.flag), Flag(row.cell.setting, defense, *sign))
    return list(found.values())


def write_flags(path: Path, found: Sequence[Flag]) -> None:
    """Keep the flags as JSON, for programs; a file that says so already stays as it is.

    Raises:
        StoreError: it cannot be written, for example because a folder has its name.
    """
    text = json.dumps([asdict(flag) for flag in found], indent=1, ensure_ascii=False) + "\n"
    content = text.encode(errors="backslashreplace")
    if not path.is_file() or path.read_bytes() != content:
        keep_file(path, content)


def _by_model(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows with records of attacks on served models, by defense and seed: a seed may train a network of its own."""
    served: dict[tuple[str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.cell.attack.spec, query_budget(row))):
        if "first_hit" in row.measured:
            served.setdefault((row.cell.defense_label, row.cell.seed), []).append(row)
    return served


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The rows that attacks are compared by: what others had left to an attack says nothing of either."""
    return [row for row in rows if not row.partial]


def _undefended(cell: Cell) -> str:
    """The chain without its output defense, which acts last; empty where none acts on outputs."""
    # An old row does not say where the defense of a user's file acts; most act on outputs.
    if not cell.defense or cell.defense[-1].stage not in ("output", ""):
        return ""
    return replace(cell, defense=cell.defense[:-1]).defense_label


def _probed(rows: Sequence[Row]) -> list[Sign]:
    """What probing the served model has found, once for each flag."""
    findings = [finding for row in rows for shard in row.shards for finding in shard.findings if finding["fired"]]
    return [Sign(*pair) for pair in sorted({finding["flag"]: finding["evidence"] for finding in findings}.items())]


def _in_single_samples(rows: Sequence[Row]) -> list[Sign]:
    """Flags that one sample can fire, whichever samples its attack has met."""
    met = list(map(seen, rows))
    return [sign for check in (_invalid_answers, _constraint_violation) if (sign := check(met))]


def _alone(rows: Sequence[Row], whole: bool) -> list[Sign]:
    """Flags of a served model by itself; what holds an attack against all others only where these are ``whole``."""
    of_all = (
        _labels_beat_scores, _transfer_beats_queries, _queries_beat_gradients, _noise_beats_attacks,
        _survives_any_radius,
    )  # fmt: skip
    checks = (
        _hits_do_not_hold, _search_is_blind, _labels_beat_scores, _transfer_beats_queries, _queries_beat_gradients,
        _square_beats_gradients, _noise_beats_attacks, _survives_any_radius, _explained_by_chance,
    )  # fmt: skip
    return [sign for check in checks if (whole or check not in of_all) and (sign := check(rows))]


def _explained_by_chance(rows: Sequence[Row]) -> Sign | None:
    """RF-44: clean predictions that agree with the truth hardly more than if neither knew of the other.

    A model whose images are normalised twice, or not at all, looks like that, and nothing can be said of its
    robustness. Measured by Cohen's kappa, which is 0 for chance and for a constant answer, and 1 for the truth.
    """
    row = max(rows, key=lambda row: row.n)
    predicted, true = column(row, "clean_pred"), column(row, "y")
    if len(predicted) < LEAST:
        return None
    classes = np.union1d(predicted, true)
    shares = [np.array([(labels == each).mean() for each in classes]) for labels in (predicted, true)]
    chance, right = float(shares[0] @ shares[1]), int((predicted == true).sum())
    above = binomial_above(right, len(true), min(chance, 1.0)) < SIGNIFICANT
    if above and right / len(true) - chance > THRESHOLDS["explained-by-chance"] * (1 - chance):
        return None
    return Sign(
        "explained-by-chance",
        f"{100 * right / len(true):.1f} % of the clean images are right (n={len(true)}), where predictions that know "
        f"nothing of them would get {100 * chance:.1f} %; check how images are normalised and classes numbered",
    )


def _invalid_answers(rows: Sequence[Row]) -> Sign | None:
    """RF-10: NaN or infinite scores."""
    hurt = [column(row, "sample_id")[column(row, "invalid")] for row in rows if "invalid" in row.columns]
    count = len(set().union(*hurt))
    return Sign("invalid-answers", f"{count} attacked samples got NaN or infinite scores") if count else None


def _certificate_contradicted(row: Row) -> Sign | None:
    """RF-47: an attack within the certified radius of an image is answered otherwise, so its certificate is false."""
    against = int(column(row, "contradicted").sum())
    if not against:
        return None
    proven = int((column(row, "radius") > 0).sum())
    return Sign(
        "certificate-contradicted",
        f"{row.cell.attack.spec}: {against} of {proven} certificates do not hold, an attack at 0.99 of the radius has "
        "found another answer",
    )


def _constraint_violation(rows: Sequence[Row]) -> Sign | None:
    """RF-30: final examples outside the ball or the box, by more than float32 rounding."""
    names = ("ball_violation", "box_violation")
    worst = max(float(column(row, name).max(initial=0)) for row in rows for name in names)
    if worst <= THRESHOLDS["constraint-violation"]:
        return None
    return Sign("constraint-violation", f"a final example left the ball or the box by {worst:.2g}")


def _hits_do_not_hold(rows: Sequence[Row]) -> Sign | None:
    """RF-32, RF-33: queries that succeeded fail when re-evaluated, on more than 2 points of all samples."""
    found = []
    for row in rows:
        both = Comparison(robust(row, query_budget(row)).right, final(row).right)
        if both.exceeds(THRESHOLDS["hits-do-not-hold"]):
            evidence = (
                f"{row.cell.attack.spec}: {_percent(both.left)} by first hit, {_percent(both.beside)} when the same "
                f"examples are re-evaluated (n={both.n})"
            )
            found.append((both.gap, Sign("hits-do-not-hold", evidence)))
    return _widest(found)


def _search_is_blind(rows: Sequence[Row]) -> Sign | None:
    """RF-45: the final examples take over 1 point more than the queries did: they were answered in other precision.

    A defense that acts in the precision of the search alone shows so. Minimum-norm attacks return, projected into the
    ball, what they have not asked about, and say nothing here.
    """
    found = []
    for row in rows:
        both = Comparison(final(row).right, robust(row, query_budget(row)).right)
        asked = not np.isfinite(column(row, "best_distance")).any()
        if both.exceeds(THRESHOLDS["search-is-blind"]) and asked:
            evidence = (
                f"{row.cell.attack.spec}: {_percent(both.beside)} by first hit, but {_percent(both.left)} when the "
                f"final examples are re-evaluated (n={both.n})"
            )
            found.append((both.gap, Sign("search-is-blind", evidence)))
    return _widest(found)


def _labels_beat_scores(rows: Sequence[Row]) -> Sign | None:
    """RF-26: an attack that sees labels only leaves more than 1 point less than all that see scores, at its queries."""
    labels = [row for row in rows if _sees(row, "labels") and not _learns_nothing(row)]
    return _less("labels-beat-scores", labels, "score attacks", _scored(rows))


def _transfer_beats_queries(rows: Sequence[Row]) -> Sign | None:
    """RF-17, RF-25: examples of the undefended network leave more than 1 point less than all attacks that query do."""
    if not _undefended(rows[0].cell):
        return None  # there it is a white-box attack, and may
    transfer = [row for row in rows if is_control(row)]
    queries = [row for row in rows if not _learns_nothing(row) and (_sees(row, "labels") or _sees(row, "scores"))]
    return _less("transfer-beats-queries", transfer, "all queries", queries)


def _queries_beat_gradients(rows: Sequence[Row]) -> Sign | None:
    """RF-25: what needs no gradient leaves more than 1 point less than all attacks that follow one for several steps.

    Then the gradients lead astray, and a figure of white-box attacks says little. Examples of the undefended network
    count where the defense acts on outputs.
    """
    gradients = [row for row in rows if _sees(row, "gradients") and row.cell.attack.name not in ONE_STEP]
    queries = [row for row in rows if not _learns_nothing(row) and (_sees(row, "labels") or _sees(row, "scores"))]
    transfer = [row for row in rows if is_control(row)] if _undefended(rows[0].cell) else []
    return _less("queries-beat-gradients", [*queries, *transfer], "all attacks with gradients", gradients)


def _square_beats_gradients(rows: Sequence[Row]) -> Sign | None:
    """RF-25, as AutoAttack warns of it: its Square takes more than 0.2 points of what its gradients have left."""
    found = []
    for row in rows:
        taken = int((column(row, "fell_to") == "square").sum())
        if taken > THRESHOLDS["square-beats-gradients"] * row.n:
            beaten = f"{taken} of {row.n} samples"
            evidence = f"{row.cell.attack.spec}: Square beat {beaten} that attacks with gradients left"
            found.append((taken / row.n, Sign("square-beats-gradients", evidence)))
    return _widest(found)


def _noise_beats_attacks(rows: Sequence[Row]) -> Sign | None:
    """RF-24: random noise fools samples that no attack does; not for random defenses, where every query may."""
    noise, others = [row for row in rows if _is(row, "noise")], [row for row in rows if not _is(row, "noise")]
    if not noise or all(_learns_nothing(row) for row in others):
        return None
    if any("random" in part.traits for part in rows[0].cell.defense):
        return None
    both = compared(noise, others, max(query_budget(row) for row in others))
    missed = int((both.beside & ~both.left).sum())
    if missed <= THRESHOLDS["noise-beats-attacks"] * both.n:
        return None
    return Sign("noise-beats-attacks", f"random noise fooled {missed} of {both.n} samples that no attack did")


def _survives_any_radius(rows: Sequence[Row]) -> Sign | None:
    """RF-23: all attacks together leave more than 1 % where half the range of a pixel may change."""
    threat, attacked = rows[0].cell.threat, [row for row in rows if not _learns_nothing(row)]
    if threat.norm != "linf" or threat.eps < HALF_THE_RANGE or not attacked:
        return None
    left = standing(attacked, max(query_budget(row) for row in attacked)).by_sample
    most = THRESHOLDS["survives-any-radius"]
    if not len(left) or binomial_above(int(left.sum()), len(left), most) >= SIGNIFICANT:
        return None
    names = ", ".join(row.cell.attack.spec for row in attacked)
    return Sign("survives-any-radius", f"{names} at {threat}: {_percent(left)} stand (n={len(left)})")


def _beside(rows: Sequence[Row], twins: Sequence[Row]) -> list[Sign]:
    """Flags of a defense beside the undefended model under the same attacks."""
    of_twins = {_attack(twin): twin for twin in twins}  # of several budgets, the largest
    pairs = [(row, of_twins[_attack(row)]) for row in rows if _attack(row) in of_twins]
    checks = (_budget_does_not_help, _other_tactic_wins, _confuses_queries)
    return [sign for check in checks if (sign := check(pairs))]


Pairs = Sequence[tuple[Row, Row]]  # of a defense and of the undefended model, under one attack


def _budget_does_not_help(pairs: Pairs) -> Sign | None:
    """RF-18: of what stands at a tenth of the queries, the rest of them takes a quarter of what it takes undefended.

    What stands differs on both sides, so the test is Fisher's.
    """
    found = []
    for row, twin in pairs:
        late, full = _common_budget(row, twin) // 10, _common_budget(row, twin)
        if not _sees(row, "scores") or late < 10:
            continue
        (stood, fell), (twin_stood, twin_fell) = (_late(hits, late, full) for hits in _hits(row, twin).T)
        if fell * twin_stood > THRESHOLDS["budget-does-not-help"] * twin_fell * stood:
            continue
        table = np.array([[fell, stood - fell], [twin_fell, twin_stood - twin_fell]])
        if fisher_below(table) < SIGNIFICANT:
            evidence = (
                f"{row.cell.attack.spec}: queries {late:,} to {full:,} took {fell} of {stood} samples that still "
                f"stood, {twin_fell} of {twin_stood} without the defense"
            )
            found.append((twin_fell / twin_stood - fell / stood, Sign("budget-does-not-help", evidence)))
    return _widest(found)


def _other_tactic_wins(pairs: Pairs) -> Sign | None:
    """RF-21, RF-35: a score attack leaves over 2 points less than Square, and undefended at most half of that.

    Undefended, the widest gap at any number of queries counts, since in the end both may have taken all.
    """
    scored = [(row, twin) for row, twin in pairs if _sees(row, "scores")]

    @cache  # each is beside every other
    def stands(place: int, queries: int) -> Samples:
        return standing([scored[place][0]], queries)

    found = []
    for place, (plain, plain_twin) in enumerate(scored):
        if not _is(plain, "square"):
            continue
        for other, (row, twin) in enumerate(scored):
            if other == place:
                continue
            queries = min(_common_budget(row, twin), _common_budget(plain, plain_twin))
            here = beside(stands(other, queries), stands(place, queries))
            if here.exceeds(THRESHOLDS["other-tactic-wins"]) and (
                undefended := _widest_gap(twin, plain_twin, queries)
            ) <= here.gap / 2:
                evidence = (
                    f"{row.cell.attack.spec} leaves {_percent(here.left)}, {plain.cell.attack.spec} "
                    f"{_percent(here.beside)} at {queries:,} queries (n={here.n}, p={here.p:.1g}); without the defense "
                    f"it is never more than {100 * undefended:.1f} points ahead"
                )
                found.append((here.gap, Sign("other-tactic-wins", evidence)))
    return _widest(found)


def _confuses_queries(pairs: Pairs) -> Sign | None:
    """RF-37: a defense gains over 10 points against a score attack, and under 2 against transfer or labels.

    These must take over 10 points from the undefended model, so that there was something to gain. The test is whether
    single samples gain more against scores, by their signs.
    """
    found, least = [], THRESHOLDS["confuses-queries"]
    scores = [pair for pair in pairs if _sees(pair[0], "scores")]
    labels = [pair for pair in pairs if _sees(pair[0], "labels") and not _is(pair[0], "noise")]
    if not scores or not labels:
        return None
    scored, labelled = ([(pair, _gain(*pair)) for pair in kind] for kind in (scores, labels))
    for pair, gained in scored:
        for other, gained_there in labelled:
            gains = in_common(gained, gained_there)                                    # (n, 2)
            if not len(gains):
                continue
            gain, idle = gains.sum(axis=0) / len(gains)
            more = gains[:, 0] - gains[:, 1]
            clear = gain > least and idle < IDLE and _taken(other[1]) > least
            if clear and mcnemar(more > 0, more < 0) < SIGNIFICANT:
                shown = [f"{100 * gain:+.1f} against {pair[0].cell.attack.spec}"]
                shown += [f"{100 * idle:+.1f} against {other[0].cell.attack.spec}"]
                evidence = f"points over the undefended model: {', '.join(shown)} (n={len(gains)})"
                found.append((gain - idle, Sign("confuses-queries", evidence)))
    return _widest(found)


def _at_radii(rows: Sequence[Row], elsewhere: Sequence[Row]) -> list[Sign]:
    """RF-22: an attack leaves over 1 point more at a larger radius."""
    found = []
    for row in rows:
        for smaller in elsewhere:
            if _but_radius(row) != _but_radius(smaller) or smaller.cell.threat.eps >= row.cell.threat.eps:
                continue
            both = compared([smaller], [row], _common_budget(row, smaller))
            if both.exceeds(THRESHOLDS["radius-does-not-help"]):
                evidence = (
                    f"{row.cell.attack.spec} leaves {_percent(both.beside)} at {row.cell.threat}, "
                    f"{_percent(both.left)} at {smaller.cell.threat} (n={both.n}, p={both.p:.1g})"
                )
                found.append((both.gap, Sign("radius-does-not-help", evidence)))
    sign = _widest(found)
    return [sign] if sign else []


def _less(flag: str, ours: Sequence[Row], name: str, theirs: Sequence[Row]) -> Sign | None:
    """Fires where one of ``ours`` leaves more than 1 point less than all of ``theirs`` do together.

    Both may ask equally often; to what transfer leaves in its few queries, all of the others' compare.
    """
    if not theirs:
        return None
    most, found = max(query_budget(row) for row in theirs), []
    for row in ours:
        queries = most if is_control(row) else min(most, query_budget(row))
        both = compared([row], theirs, queries)
        if both.exceeds(THRESHOLDS[flag]):
            evidence = (
                f"{row.cell.attack.spec} leaves {_percent(both.left)}, {name} {_percent(both.beside)} at {queries:,} "
                f"queries (n={both.n}, p={both.p:.1g})"
            )
            found.append((both.gap, Sign(flag, evidence)))
    return _widest(found)


def _hits(row: Row, other: Row) -> NDArray[Any]:
    """(n, 2) the first hit in each of both rows, on the samples that both have met."""
    return in_common(*(Samples(column(each, "sample_id"), column(each, "first_hit")) for each in (row, other)))


def _late(hits: NDArray[Any], late: int, full: int) -> tuple[int, int]:
    """How many samples with these first ``hits`` stand after ``late`` queries, and how many of those fall by ``full``.
    """
    stood, left = (int(np.count_nonzero((hits == NEVER) | (hits > queries))) for queries in (late, full))
    return stood, stood - left


def _widest_gap(row: Row, other: Row, queries: int) -> float:
    """By how much less ``row`` leaves than ``other``, at the number of queries up to ``queries`` where that is most."""
    both = _hits(row, other)
    moments = np.unique(both[(both != NEVER) & (both <= queries)])
    fallen = [np.searchsorted(np.sort(hit[hit != NEVER]), moments, side="right") for hit in both.T]
    return float((fallen[0] - fallen[1]).max(initial=0)) / max(len(both), 1)


def _gain(row: Row, twin: Row) -> Samples:
    """1 where it stands with the defense only, -1 where without it only, else 0."""
    queries = _common_budget(row, twin)
    with_it, without = standing([row], queries), standing([twin], queries)
    both = in_common(with_it, without).astype(int)
    return Samples(common_ids([with_it, without]), both[:, 0] - both[:, 1])


def _taken(row: Row) -> float:
    """The share of the samples that were right when clean and fell."""
    return float(clean(row).right.mean() - robust(row, query_budget(row)).right.mean())


def _common_budget(row: Row, other: Row) -> int:
    return min(query_budget(row), query_budget(other))


def _widest(found: Iterable[tuple[float, Sign]]) -> Sign | None:
    """The sign with the largest effect, if there is one."""
    return max(found, key=lambda each: each[0], default=(0.0, None))[1]


def _attack(row: Row) -> tuple[str, int | None]:
    """What two rows under one attack have in common; a schedule that follows the budget is another one at another."""
    attack = row.cell.attack
    return attack.spec, query_budget(row) if "rescaled" in attack.traits else None


def _but_radius(row: Row) -> tuple[object, ...]:
    cell = row.cell
    model = cell.data_hash, cell.model.spec, cell.weights_hash, cell.numerics, cell.quantise
    return *model, cell.threat.norm, *_attack(row)


def _is(row: Row, name: str) -> bool:
    return row.cell.attack.name == name


def _learns_nothing(row: Row) -> bool:
    """Whether its attack draws nothing from the answers: one that works on another network, or random noise."""
    return is_control(row) or _is(row, "noise")


def _sees(row: Row, access: str) -> bool:
    return row.cell.threat.access == access


def _scored(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if _sees(row, "scores")]


def _percent(right: NDArray[np.bool_]) -> str:
    return f"{100 * right.mean():.1f} %"
