"""How often the intervals of tables hold the truth, and how often a comparison calls chance a difference.

    python benchmarks/coverage.py

Wilson's interval of one accuracy is counted out exactly, over all outcomes of n images. The paired interval of a
difference, and p-values adjusted by Holm over a whole table, are simulated with fixed seeds: images differ in how hard
they are, both defenses and all attacks meet the same ones, and the budgets of an attack are nested, as in a run.
"""

from functools import cache

import numpy as np
from scipy import stats as exact
from tabulate import tabulate

from bench.report.ranking import SIGNIFICANT
from bench.report.stats import holm, mcnemar_of, paired_bootstrap, wilson_bounds

SIZES = (100, 200, 1000)
SHARES = np.linspace(0.001, 0.999, 999)
DISCORDANT = ((0.02, 0.02), (0.05, 0.05), (0.15, 0.05), (0.3, 0.3), (0.1, 0.0))  # right with A alone, with B alone
DRAWS, TABLES = 2000, 2000
ATTACKS, BUDGETS = 10, (0.1, 0.5, 1.0, 2.0)


def main() -> None:
    print("Wilson, one accuracy: how often the interval holds p, in percent (exact)\n")
    print(tabulate([_one(n) for n in SIZES], headers="keys", tablefmt="github", floatfmt=".1f"))
    print(f"\nPaired bootstrap, A - B: the same, {DRAWS} draws each\n")
    rng = np.random.default_rng(0)
    lines = [{"A alone, B alone": f"{a:g}, {b:g}", **{f"n = {n}": _paired(n, a, b, rng) for n in SIZES}}
             for a, b in DISCORDANT]  # fmt: skip
    print(tabulate(lines, headers="keys", tablefmt="github", floatfmt=".1f"))
    print(f"\nTables of {ATTACKS} attacks at {len(BUDGETS)} budgets in which equal defenses pass for different "
          f"(p < {SIGNIFICANT}), in percent, {TABLES} tables each\n")  # fmt: skip
    lines = [{"images": n, "attacks that do differ": unequal, **_family(n, unequal, rng)}
             for n in SIZES[:2] for unequal in (0, ATTACKS // 2)]  # fmt: skip
    print(tabulate(lines, headers="keys", tablefmt="github", floatfmt=".1f"))


def _one(n: int) -> dict[str, float | int]:
    """Coverage over all p, and where it is least, with ``n`` images."""
    right = np.arange(n + 1)
    low, high = wilson_bounds(right, n)
    holds = (low <= SHARES[:, None]) & (SHARES[:, None] <= high)  # (p, outcomes)
    covered = 100 * (exact.binom.pmf(right, n, SHARES[:, None]) * holds).sum(axis=1)
    middle = (SHARES >= 0.05) & (SHARES <= 0.95)
    return {"n": n, "mean over p": covered.mean(), "least": covered.min(), "at p": 100 * SHARES[covered.argmin()],
            "least, p from 5 to 95": covered[middle].min()}  # fmt: skip


def _paired(n: int, a: float, b: float, rng: np.random.Generator) -> float:
    """How often the interval holds the difference of two that are right alone on such shares of all images."""
    drawn = rng.multinomial(n, (a, b, 1 - a - b), size=DRAWS)
    return 100 * float(np.mean([low - 1e-9 <= a - b <= high + 1e-9 for low, high in
                                (_interval(n, int(more), int(less)) for more, less, _ in drawn)]))  # fmt: skip


@cache
def _interval(n: int, more: int, less: int) -> tuple[float, float]:
    return paired_bootstrap(np.arange(n) < more, np.arange(n) >= n - less)


def _family(n: int, unequal: int, rng: np.random.Generator) -> dict[str, float]:
    """How often any line of the attacks under which the two are equal passes for a difference."""
    false = np.zeros((TABLES, 2), dtype=bool)
    for table in range(TABLES):
        hard = rng.gamma(1.0, size=n)
        fall_a, fall_b = rng.exponential(hard, size=(2, ATTACKS, n))
        fall_a[:unequal] *= 3
        held_a, held_b = (fall[..., None] > np.array(BUDGETS) for fall in (fall_a, fall_b))  # (attacks, n, budgets)
        p = mcnemar_of((held_a & ~held_b).sum(axis=1), (held_b & ~held_a).sum(axis=1)).ravel()
        equal = np.arange(len(p)) >= unequal * len(BUDGETS)
        false[table] = [(values[equal] < SIGNIFICANT).any() for values in (p, holm(p))]
    return dict(zip(("each line by itself", "Holm"), 100 * false.mean(axis=0), strict=True))


if __name__ == "__main__":
    main()
