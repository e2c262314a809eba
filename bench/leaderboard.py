"""Stored rows, read as tables: robust accuracy at every budget asked for, worst cases, intervals and ranks."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.flags import Flag, flags
from bench.outcomes import (
    Share,
    clean,
    column,
    figures,
    final,
    is_transfer,
    lasting,
    query_budget,
    restricted,
    robust,
    tested,
)
from bench.stats import holm, mcnemar
from bench.store import Row

Format = Literal["md", "csv", "latex", "json"]

MARKS = {
    "limited": ("†", "run with --limit on fewer samples than its suite asks for; never ranked"),
    "incomplete": ("…", "not all samples have run yet; never ranked"),
    "failed": ("✗", "failed; run again, or read the traceback in its .failed.json; never ranked"),
    "invalid": ("!", "the model answered NaN or infinity; never ranked"),
    "spared": ("⊂", "not met by every attack that the undefended model has met; never ranked"),
    "rescaled": ("↔", "schedule rescaled to the largest budget, so smaller budgets are not what a run at them gives"),
    "batch-dependent": ("∥", "samples not independent of their batch: a foreign attack, or a defense that mixes rows"),
    "stateful": ("‡", "the defense remembers earlier queries, so figures depend on their order and on resuming"),
    "control": ("⇄", "made on the undefended network, which no attacker of a service has: not in the worst case"),
    "random": (
        "~",
        "random defense: @ counts the first success of a query, or of the mean that an averaging attack asks for, "
        "lucky or not; final, the majority of 16 repeats, flatters the defense where it was lucky",
    ),
}
GLANCE = "At a glance: what each attack leaves with all of its queries, in percent; intervals stand above."
LASTING = (
    "Random defenses, judged afresh: an image counts as beaten within so many queries only where the majority of 16 "
    "new evaluations of its first hit is wrong, too. First hits show what one lucky answer gets; this shows what an "
    "example that works again gets. A search ends at its first hit, so the share is an upper bound."
)
SCORES = (
    "What the defense does to its answers: predictions changed (%), mean change of logits (l2) and of probabilities "
    "(total variation), time of a query against the undefended one; then clean → after the attack that left the least."
)
ERRORS = {"ECE": "ece", "adaptive ECE": "adaptive_ece"}
LOSSES = {"Brier": "brier", "NLL": "nll"}
QUERIES = (
    "What the queries achieved among images that were right when clean: area under accuracy against queries (of all "
    "images), queries of the successes, of all (censored at the budget), and the size of the final changes."
)
ACHIEVED = {  # column: figure, how it is printed
    "AUC": ("auc", "{:.3f}"), "log AUC": ("log_auc", "{:.3f}"), "success": ("success_rate", "{:.1%}"),
    "mean": ("mean_queries", "{:.0f}"), "median": ("median_queries", "{:.0f}"),
    "mean of all": ("restricted_mean_queries", "{:.0f}"), "median of all": ("censored_median_queries", "{:.0f}"),
    "linf": ("linf", "{:.4f}"), "RMSE": ("rmse", "{:.4f}"),
    "expected": ("expected_accuracy", "{:.1%}"),
}  # fmt: skip
RELEASED = {  # column of a learner's line: figure; shares are printed in percent
    "peak": "peak_test_accuracy", "train": "train_accuracy", "changed pixels": "changed_pixels_mean", "PSNR": "psnr",
}  # fmt: skip
PERCENT = {"clean", "mean", "SD", "peak", "train"}
UNRANKED = {"limited", "incomplete", "failed", "invalid", "spared"}


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
    figures: dict[str, float] = field(default_factory=dict)  # of one row; see bench.outcomes.figures
    lasting: dict[str, Share] = field(default_factory=dict)  # of random defenses; see bench.outcomes.lasting


@dataclass(frozen=True)
class Table:
    """Lines that compare with each other: one data set, model and threat."""

    title: str
    lines: list[Line]
    origin: str = ""  # hardware, version and commit that the rows come from
    flags: list[Flag] = field(default_factory=list)


def tables(rows: Iterable[Row], budgets: Sequence[int] = ()) -> list[Table]:
    """One table for each model under each threat, one for the learners on each data set.

    Args:
        rows: what :meth:`bench.store.Store.rows` read.
        budgets: query budgets to show; those that the rows have run with are always there.
    """
    rows = list(rows)
    result = []
    for (_, title, *_), group in groupby(sorted(rows, key=_comparable), key=_comparable):
        members = list(group)
        lines = _released_lines(members) if members[0].cell.learns else _served_lines(members, budgets)
        result.append(Table(title, lines, _origin(members), flags(members, rows)))
    return result


def render(tables: Sequence[Table], style: Format, details: bool = True) -> str:
    """The tables as text: Markdown, LaTeX (booktabs), or tidy CSV and JSON with one record for each line.

    ``details`` adds what the defenses do to their scores and what the queries achieved. CSV and JSON always hold that;
    a censored median is empty there where fewer than half of the samples fell.
    """
    if style in ("csv", "json"):
        records = [record for table in tables for record in _records(table)]
        if style == "json":
            return json.dumps(records, indent=1)
        return pd.DataFrame(records).to_csv(index=False)
    return "\n".join((_latex if style == "latex" else _markdown)(table, details) for table in tables)


def _markdown(table: Table, details: bool) -> str:
    parts = [f"### {table.title}", *(f"{title}\n\n{_text(frame)}" for title, frame in _frames(table, details))]
    parts.insert(2, "  \n".join(filter(None, (_legend(table), table.origin))))
    if table.flags:
        signs = [f"- {flag.defense}: **{flag.flag}**. {flag.evidence}." for flag in table.flags]
        parts.insert(3, "\n".join(["Red flags (computed; each is a reason to look, none a verdict):\n", *signs]))
    return "\n\n".join(parts).replace("\n\n\n", "\n") + "\n"


def _text(frame: pd.DataFrame) -> str:
    return frame.to_markdown(index=False, disable_numparse=True)


def _latex(table: Table, details: bool) -> str:
    parts = []
    for title, frame in _frames(table, details):
        notes = (_legend(table, latex=True), table.origin) if not title else ()
        caption = _latex_text(" ".join((f"{table.title}.", title, *notes)).strip())
        frame = frame.map(lambda text: _latex_text(str(text)))
        frame.columns = [_latex_text(name) for name in frame.columns]
        parts.append(frame.to_latex(index=False, escape=False, caption=caption, position="ht"))
    return "\n".join(parts)


def summary(row: Row) -> str:
    """A finished cell in one phrase."""
    if row.errors:
        return "failed: " + row.errors[-1].strip().splitlines()[-1]
    if row.cell.learns:
        return f"test accuracy {tested(row)} %"
    budget = query_budget(row)
    return f"clean {clean(row)} %, robust @{budget} {robust(row, budget)} %"


def _served_lines(rows: list[Row], budgets: Sequence[int]) -> list[Line]:
    largest = max(query_budget(row) for row in rows)
    shown = sorted({budget for budget in budgets if budget < largest} | {query_budget(row) for row in rows})
    by_defense: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.cell.defense_name, row.cell.attack.spec, row.cell.seed)):
        by_defense.setdefault(row.cell.defense_name, []).append(row)

    worst = {
        name: _worst_case([row for row in members if not is_transfer(row)] or members, shown)
        for name, members in by_defense.items()
    }
    for name in _spared(by_defense):
        worst[name] = replace(worst[name], marks=worst[name].marks | {"spared"})
    decisive = {name: line.shares[f"@{largest}"] for name, line in worst.items()}
    ranks = _ranks({name: decisive[name].right for name, line in worst.items() if not line.marks & UNRANKED})
    lines = []
    for name in sorted(worst, key=lambda name: (ranks.get(name, len(worst) + 1), -decisive[name].value)):
        line = worst[name]
        lines.append(replace(line, rank=ranks.get(name)))
        if line.attack.startswith("worst") or len(by_defense[name]) > 1:
            lines += [_served_line(row, shown) for row in by_defense[name]]
    return lines


def _served_line(row: Row, budgets: Sequence[int]) -> Line:
    shares = {"clean": clean(row)}
    shares |= {f"@{budget}": robust(row, budget) for budget in budgets}
    shares["final"] = final(row)
    seed = f", seed {row.cell.seed}" if row.cell.seed else ""
    name = row.cell.attack.spec + seed
    marks = _marks(row)
    again = {f"@{budget}": lasting(row, budget) for budget in budgets} if "random" in marks else {}
    return Line(row.cell.defense_name, name, shares, len(row.records), marks, figures=figures(row), lasting=again)


def _worst_case(rows: list[Row], budgets: Sequence[int]) -> Line:
    """The line of a defense: each sample under whichever of the attacks beats it soonest."""
    if len(rows) == 1:
        return _served_line(rows[0], budgets)
    common = set.intersection(*(set(column(row, "sample_id")) for row in rows))
    same = [restricted(row, common) for row in rows]
    shares = {"clean": Share(np.logical_and.reduce([clean(row).right for row in same]))}
    for budget in budgets:
        shares[f"@{budget}"] = _standing(same, budget, robust)
    shares["final"] = Share(np.logical_and.reduce([final(row).right for row in same]))
    marks = frozenset().union(*(_marks(row) for row in rows)) - {"rescaled", "batch-dependent", "control"}
    again = {f"@{budget}": _standing(same, budget, lasting) for budget in budgets} if "random" in marks else {}
    return Line(rows[0].cell.defense_name, f"worst of {len(rows)}", shares, len(common), marks, lasting=again)


def _standing(rows: list[Row], budget: int, share: Callable[[Row, int], Share]) -> Share:
    """The samples that stand after ``budget`` queries of each attack, by :func:`robust` or :func:`lasting`."""
    # An attack that ran with a smaller budget has beaten its samples within this one, too.
    return Share(np.logical_and.reduce([share(row, min(budget, query_budget(row))).right for row in rows]))


def _released_lines(rows: list[Row]) -> list[Line]:
    """Each protection under each learner; the learner that gets furthest decides, and low is good for the defender."""
    ordered = sorted(rows, key=lambda row: (row.cell.defense_name, row.cell.attack.spec, row.cell.seed))
    by_defense = {name: list(group) for name, group in groupby(ordered, key=lambda row: row.cell.defense_name)}
    clean = {name: value for name, (value, _) in _over_seeds(by_defense.get("none", [])).items()}
    best = {name: _best_learner(members) for name, members in by_defense.items()}
    marks = {name: frozenset().union(*map(_marks, members)) for name, members in by_defense.items()}
    spared = _spared(by_defense)
    marks |= {name: marks[name] | {"spared"} for name in spared}
    ranks = _ranks({name: ~tested(best[name]).right for name in best if not marks[name] & UNRANKED})
    lines = []
    for name in sorted(best, key=lambda name: (ranks.get(name, len(best) + 1), tested(best[name]).value)):
        members, spread = by_defense[name], _over_seeds(by_defense[name])
        if len(spread) > 1:
            learner = best[name].cell.attack.spec
            extra = {"clean": clean[learner]} if learner in clean else {}
            lines.append(
                Line(name, f"best of {len(spread)}: {learner}", {"test": tested(best[name])}, len(best[name].records),
                     marks[name], ranks.get(name), extra)
            )  # fmt: skip
        for row in members:
            learner, seed = row.cell.attack.spec, f", seed {row.cell.seed}" if row.cell.seed else ""
            extra = {"clean": clean[learner]} if learner in clean else {}
            if sum(other.cell.attack.spec == learner for other in members) > 1:
                extra |= dict(zip(("mean", "SD"), spread[learner], strict=True))
            extra |= {title: row.figures[figure] for title, figure in RELEASED.items() if figure in row.figures}
            decides = len(spread) == 1
            own = _marks(row) | ({"spared"} if decides and name in spared else set())
            rank = ranks.get(name) if decides else None
            lines.append(Line(name, learner + seed, {"test": tested(row)}, len(row.records), own, rank, extra))
    return lines


def _spared(by_defense: dict[str, list[Row]]) -> set[str]:
    """The defenses that some attack on the undefended model has not met: their worst case would flatter them."""
    met = {name: {row.cell.attack.spec for row in rows} for name, rows in by_defense.items()}
    return {name for name in met if met.get("none", set()) - met[name]}


def _over_seeds(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """By learner: mean and standard deviation over seeds of its test accuracy."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if len(row.records):
            values.setdefault(row.cell.attack.spec, []).append(tested(row).value)
    return {name: (mean(found), stdev(found) if len(found) > 1 else 0.0) for name, found in values.items()}


def _best_learner(rows: Sequence[Row]) -> Row:
    """The row of the learner with the highest test accuracy, on average over seeds."""
    means = _over_seeds(rows)
    return max(rows, key=lambda row: means.get(row.cell.attack.spec, (-1.0, 0.0))[0])


def _ranks(right: dict[str, NDArray[np.bool_]]) -> dict[str, int]:
    """1 + the number of defenses that are significantly better: exact McNemar, Holm over all pairs, 5 %.

    Differences inside the noise share a rank. Defenses compare on equal samples only.
    """
    names = [name for name in right if len(right[name]) == max(len(other) for other in right.values())]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if not pairs:
        return dict.fromkeys(names, 1)
    p_values = holm(np.array([mcnemar(right[a], right[b]) for a, b in pairs]))
    ranks = dict.fromkeys(names, 1)
    for (a, b), p in zip(pairs, p_values, strict=True):
        if p < 0.05:
            ranks[a if right[a].mean() < right[b].mean() else b] += 1
    return ranks


def _origin(rows: list[Row]) -> str:
    """Where the rows were measured, and by which code."""
    facts = [shard.provenance for row in rows for shard in row.shards if shard.provenance]
    hardware = sorted({f"{fact['hardware']}, {fact['device']}" for fact in facts})
    code = sorted(
        {f"Parry {fact['parry']} at {fact['commit'][:8]}, torch {fact['libraries']['torch']}" for fact in facts}
    )
    days = sorted({fact["finished"][:10] for fact in facts})
    return f"Measured on {'; '.join(hardware)}; {'; '.join(code)}; {' and '.join(days)}." if facts else ""


def _comparable(row: Row) -> tuple[bool, str, str, str]:
    """Rows compare when all this is equal; two files of weights under one name must not share a table."""
    cell = row.cell
    return cell.learns, cell.setting, cell.data_hash, cell.weights_hash


def _marks(row: Row) -> frozenset[str]:
    found = {
        "limited": row.cell.limited,
        "incomplete": not row.complete,
        "failed": bool(row.errors),
        "invalid": bool(column(row, "invalid").any()),
        "control": not row.cell.learns and is_transfer(row) and row.cell.defense_name != "none",
    }
    traits = [trait for component in (row.cell.attack, *row.cell.defense) for trait in component.traits]
    return frozenset([name for name, present in found.items() if present] + traits)


def _frames(table: Table, details: bool) -> list[tuple[str, pd.DataFrame]]:
    """The table as people read it: accuracies; what the defenses do to their scores; what the queries achieved."""
    parts = [("", _accuracies(table))]
    if details:
        parts += [(GLANCE, _glance(table)), (LASTING, _lasting(table))]
        parts += [(SCORES, _scores(table)), (QUERIES, _queries(table))]
    return [(title, frame) for title, frame in parts if len(frame) or not title]


def _accuracies(table: Table) -> pd.DataFrame:
    lines = []
    for line in table.lines:
        marks = "".join(MARKS[name][0] for name in MARKS if name in line.marks)
        shares = {name: str(share) for name, share in line.shares.items()}
        extra = {
            name: f"{100 * value:.1f}" if name in PERCENT else f"{value:.2f}"
            for name, value in line.extra.items()
        }
        lines.append(
            {
                "rank": "" if line.rank is None else str(line.rank),
                "defense": line.defense,
                "attack": f"{line.attack} {marks}".strip(),
                **shares,
                **extra,
                "n": str(line.n),
            }
        )
    frame = _once(lines)
    return frame if any(line.rank for line in table.lines) else frame.drop(columns="rank")


def _glance(table: Table) -> pd.DataFrame:
    """Defenses against attacks, the more numerous as lines; nothing where one attack is all there is."""
    lines: dict[str, dict[str, str]] = {}
    for line in table.lines:
        shown = lines.setdefault(line.defense, {"defense": line.defense})
        measured = [name for name, share in line.shares.items() if share.n and name not in ("clean", "final")]
        if measured:
            name = line.attack.partition(" of ")[0] + measured[-1].replace("@", " @").replace("test", "")
            shown[name] = f"{100 * line.shares[measured[-1]].value:.1f}"
    if all(len(shown) <= 2 for shown in lines.values()):
        return pd.DataFrame()
    frame = pd.DataFrame(list(lines.values())).fillna("")
    if len(frame.columns) - 1 > len(frame):
        frame = frame.set_index("defense").T.reset_index(names="attack").rename_axis(columns=None)
    return frame


def _lasting(table: Table) -> pd.DataFrame:
    """The accuracies of random defenses with hits judged afresh."""
    lines = [
        {"defense": line.defense, "attack": line.attack}
        | {budget: str(share) for budget, share in line.lasting.items()}
        | {"n": str(line.n)}
        for line in table.lines
        if line.lasting
    ]
    return _once(lines)


def _scores(table: Table) -> pd.DataFrame:
    """One line for each defense, the scores under attack those under the attack that left it the least."""
    lines = []
    for defense in dict.fromkeys(line.defense for line in table.lines):
        own = [line for line in table.lines if line.defense == defense and "ece" in line.figures]
        if not own:
            continue
        line = min(own, key=lambda line: line.shares["final"].value)
        found = line.figures
        lines.append(
            {
                "defense": defense,
                "changed": f"{100 * found['changed_predictions']:.1f}",
                "Δ logits": f"{found['logit_change']:.2f}",
                "Δ probs": f"{found['probability_change']:.3f}",
                "cost": f"{found['cost']:.2f}" if "cost" in found else "",
                **{name: _before_after(found, key, "{:.1%}") for name, key in ERRORS.items()},
                **{name: _before_after(found, key, "{:.2f}") for name, key in LOSSES.items()},
                "under": line.attack,
            }
        )
    return pd.DataFrame(lines)


def _before_after(found: dict[str, float], key: str, form: str) -> str:
    return f"{form} → {form}".format(found[key], found[f"attacked_{key}"])


def _queries(table: Table) -> pd.DataFrame:
    lines = []
    for line in table.lines:
        found = line.figures
        if "auc" not in found:
            continue
        shown = {"defense": line.defense, "attack": line.attack}
        for name, (key, form) in ACHIEVED.items():
            shown[name] = form.format(found[key]).replace("inf", "> all") if key in found else ""
        lines.append(shown)
    return _once(lines)


def _once(lines: list[dict[str, str]]) -> pd.DataFrame:
    """The lines, each defense named in its first one alone."""
    frame = pd.DataFrame(lines).fillna("")
    if len(frame):
        frame["defense"] = frame["defense"].where(frame["defense"] != frame["defense"].shift(), "")
    return frame


def _legend(table: Table, latex: bool = False) -> str:
    present = [name for name in MARKS if any(name in line.marks for line in table.lines)]
    if latex:
        return " ".join(f"{MARKS[name][0]} {MARKS[name][1]}." for name in present)
    return "  \n".join(f"{MARKS[name][0]} {MARKS[name][1]}" for name in present)


def _records(table: Table) -> list[dict[str, Any]]:
    records = []
    for line in table.lines:
        record: dict[str, Any] = {
            "table": table.title, "rank": line.rank, "defense": line.defense, "attack": line.attack, "n": line.n,
            "marks": " ".join(sorted(line.marks)),
        }  # fmt: skip
        for name, share in line.shares.items():
            low, high = share.interval if share.n else (None, None)
            value = share.value if share.n else None
            record |= {name: value, f"{name} low": low, f"{name} high": high}
        record |= {f"{name} afresh": share.value for name, share in line.lasting.items() if share.n}
        finite = {name: value if math.isfinite(value) else None for name, value in line.figures.items()}
        records.append({**record, **line.extra, **finite})
    return records


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"$\dagger$", "‡": r"$\ddagger$",
    "✗": r"$\times$", "…": r"$\ldots$", "⊂": r"$\subset$",
    "⇄": r"$\rightleftarrows$", "↔": r"$\leftrightarrow$", "∥": r"$\parallel$",
    "·": r"$\cdot$", "<": "$<$", ">": "$>$", "|": "$|$",
    "Δ": r"$\Delta$", "→": r"$\to$",
}  # fmt: skip


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)
