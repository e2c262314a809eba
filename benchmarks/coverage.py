"""How often the intervals of tables hold the truth, and how often a comparison calls chance a difference.

Of runs that may stop at any sample (`--until`) it is told how often a sequence misses the truth at one of them, which
at most 5 % of all runs may, and what Wilson's interval and McNemar's test would do if they were looked at as often.

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
from bench.report.sequence import capital, paired_sequence, sequence_bounds
from bench.report.stats import holm, mcnemar_of, paired_bootstrap, wilson_bounds
from bench.run.until import looks

SIZES = (100, 200, 1000)
SHARES = np.linspace(0.001, 0.999, 999)
DISCORDANT = ((0.02, 0.02), (0.05, 0.05), (0.15, 0.05), (0.3, 0.3), (0.1, 0.0))  # right with A alone, with B alone
DRAWS, TABLES = 2000, 2000
RUNS, LONGEST = 2000, 1000  # simulated runs that may stop early, and the samples of a cell
TRUTHS, DIFFERING = (0.02, 0.1, 0.3, 0.5, 0.9), (0.05, 0.2, 0.6)
WIDTH = 0.1  # of the intervals at which they stop
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

    print(f"\n{RUNS} runs of up to {LONGEST} samples: in how many an interval misses p at any of them, in percent; and "
          f"after how\nmany samples --until width={100 * WIDTH:g} stops on average\n")  # fmt: skip
    print(tabulate([_sequences(p, rng) for p in TRUTHS], headers="keys", tablefmt="github", floatfmt=".1f"))
    print(f"\nThe same of equal pairs: in how many runs they pass for different (p < {SIGNIFICANT}) at any sample\n")
    print(tabulate([_pairs(share, rng) for share in DIFFERING], headers="keys", tablefmt="github", floatfmt=".1f"))


def _sequences(p: float, rng: np.random.Generator) -> dict[str, float]:
    """In how many runs an interval misses ``p``, with which each sample stands, and when they would have stopped."""
    n = np.arange(1, LONGEST + 1)
    right = (rng.random((RUNS, LONGEST)) < p).cumsum(axis=1)
    missed = capital(right, n - right, p) >= -np.log1p(-0.95)
    at = np.array(looks(LONGEST)) - 1
    low, high = sequence_bounds(right[:, at], n[at])
    narrow = high - low <= WIDTH
    stops, place = narrow.any(axis=1), at[np.argmax(narrow, axis=1)]
    ends = np.stack([wilson_bounds(right[:, each], each + 1) for each in range(LONGEST)], axis=-1)  # (2, runs, n)
    wilson = (p < ends[0]) | (p > ends[1])
    return {"p": 100 * p, "sequence": 100 * missed.any(axis=1).mean(), "Wilson": 100 * wilson.any(axis=1).mean(),
            "Wilson, all samples alone": 100 * wilson[:, -1].mean(),
            "samples": float(np.where(stops, place + 1, LONGEST).mean())}  # fmt: skip


def _pairs(differing: float, rng: np.random.Generator) -> dict[str, float]:
    """How often two that are right alone on as many samples, half of ``differing``, pass for different."""
    drawn = rng.choice([1, 0, -1], p=[differing / 2, 1 - differing, differing / 2], size=(RUNS, LONGEST))
    more, less = ((drawn == each).cumsum(axis=1) for each in (1, -1))
    sequence = paired_sequence(drawn).p < SIGNIFICANT
    fixed = mcnemar_of(more, less) < SIGNIFICANT
    return {"differ": 100 * differing, "sequence": 100 * sequence.mean(), "McNemar": 100 * fixed.any(axis=1).mean(),
            "McNemar, all samples alone": 100 * fixed[:, -1].mean()}  # fmt: skip


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
