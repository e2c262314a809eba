"""Where two curves of accuracy against queries cross, exactly: from the query at which each sample fell."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.report.outcomes import aligned, network
from bench.results.store import Row
from bench.rules import NEVER

STANDS = np.iinfo(np.int64).max  # the fall of a sample that nothing beat
Falls = NDArray[np.int64]


class Crossing(NamedTuple):
    """How often the lead changes; the first number of queries at which whoever was behind leads, and who that is.

    Equal accuracies are nobody's lead: a tie after which the same one leads is no change. Where the lead never changes,
    ``times`` is 0 and ``at`` is None.
    """

    times: int = 0
    at: int | None = None
    ahead: Literal["a", "b", ""] = ""


def crossing(a: Falls, b: Falls) -> Crossing:
    """Where the accuracies of ``a`` (networks, n) and ``b`` (networks, n) cross, as the falls of their samples say.

    Accuracy changes only where a sample falls, and it is compared in whole numbers: no rounding makes a lead.
    """
    moments = np.unique(np.concatenate([[0], a.ravel(), b.ravel()]))
    moments = moments[moments < STANDS]
    lead = np.sign(_standing(a, moments) * len(b) - _standing(b, moments) * len(a))
    led = np.flatnonzero(lead)
    turns = led[1:][lead[led][1:] != lead[led][:-1]]
    if not len(turns):
        return Crossing()
    return Crossing(len(turns), int(moments[turns[0]]), "a" if lead[turns[0]] > 0 else "b")


def falls(rows: Sequence[Row], ids: Sequence[int]) -> Falls | None:
    """(networks, n) the query at which each of the samples ``ids`` fell to the soonest of ``rows``, on each network.

    0 is wrong when clean, :data:`STANDS` not beaten. None where an attack was run only on what others had left: nobody
    knows when it would have beaten a sample that it passed by.
    """
    soonest: dict[int | None, Falls] = {}
    passed: dict[int | None, NDArray[np.bool_]] = {}
    for row in rows:
        samples, hits = (row.measured.get(name, np.zeros(0, dtype=np.int64)) for name in ("sample_id", "first_hit"))
        fell = aligned(np.where(hits == NEVER, STANDS, hits), samples, ids, STANDS)
        soonest[network(row)] = np.minimum(soonest.get(network(row), STANDS), fell)
        passed[network(row)] = passed.get(network(row), np.zeros(len(ids), dtype=bool)) | ~np.isin(ids, samples)
    if any((passed[each] & (soonest[each] > 0)).any() for each in soonest):
        return None
    return np.stack(list(soonest.values()))


def _standing(fell: Falls, moments: Falls) -> Falls:
    """(moments,) on how many samples of all networks together nothing has a hit by then."""
    return fell.size - np.searchsorted(np.sort(fell, axis=None), moments, side="right")
