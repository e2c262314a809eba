"""The referee: judges every query, and keeps the ledger."""

import math
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import cast

import torch
from torch import Tensor

from bench.errors import AccessError, RefereeError, ThreatViolation
from bench.losses import margin
from bench.norms import lp_norm, per_sample
from bench.oracle.balls import TOLERANCE, limit
from bench.oracle.ledger import Ledger
from bench.oracle.oracle import Oracle
from bench.oracle.quantise import check_levels, eight_bit
from bench.oracle.repeats import repeats
from bench.oracle.served import ServedModel
from bench.rng import SampleRng
from bench.rules import COMMON, NEVER, Rules
from bench.scratch import Scratch
from bench.threat import Threat

REFRESH = 16  # queries of a sample between two looks at who is still alive, where looking means waiting for a GPU


class Referee:
    """Answers what the threat allows, for as long as it allows it, and writes everything down.

    An attack never holds it: it asks through :attr:`oracle`. The referee works on copies of its own, so nothing that an
    attack or a model writes into a tensor moves a ball, a clean image or a hit.

    A random model answers the same image differently each time, so an attack that takes the first lucky answer proves
    little. For one that averages (``Rules.averages``), the k queries of a call are k draws of one image: all are
    counted, and the sample falls, at the last of them, if their mean is misclassified.

    A model in coarse numbers (bf16) errs near the boundary, where every search ends: of Square's hits on an undefended
    network one in eight was right in float32. With ``exact``, a hit stands only once this model has given the same
    verdict on the same image under the same draws; else the sample is alive again. Until it is looked at, with the next
    look at who is alive, it gets no answers.

    A service is asked nothing that is not answered, since each question is paid for: the k queries of a sample go one
    after another, and none after the one that beats it.

    Args:
        model: the defended model.
        x, y: the batch, images (B, C, H, W) in [0, 1] and true labels (B,) int64.
        threat: what the attack may change, see and spend; its ``query_budget`` counts for each sample by itself.
        rng: one stream for each sample, the model's own randomness.
        quantise: round every query to 8 bit first, as a service that takes images does.
        rules: what the attack declares.
        classes: how many the data have.
        surrogate: what an attack whose rules have ``surrogate`` works on, in plain float32.
        fitted: what an attack that is fitted came to on other images.
        exact: ``model`` in plain float32, which confirms the hits of one in coarser numbers.
        falls: whether a misclassified query ends a sample; not where examples are made for another model.
        scratch: what is done by attacks that take turns, so that a run that is killed goes on from there.
        attack: the name to put in complaints.
        on_spent: called now and then with the queries that are spent, or saved because their sample fell.
    """

    def __init__(
        self,
        model: ServedModel,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        rng: SampleRng,
        *,
        quantise: bool = False,
        rules: Rules = COMMON,
        classes: int | None = None,
        surrogate: ServedModel | None = None,
        fitted: Mapping[str, Tensor] | None = None,
        exact: ServedModel | None = None,
        falls: bool = True,
        scratch: Scratch | None = None,
        attack: str = "attack",
        on_spent: Callable[[int], None] = lambda queries: None,
    ) -> None:
        if threat.query_budget is None:
            raise AccessError(f"{attack}: a threat without a query budget grants no queries")
        if rules.lookahead and threat.access != "gradients":
            raise AccessError(f"{attack}: only attacks that differentiate may look ahead; a service is asked inside")
        if quantise:
            check_levels(x, threat)
        x, y = x.detach().clone(), y.clone()
        self.ledger = Ledger.blank(x)
        self.stages = list[str]()  # names of the attacks that have taken their turns
        self.query_budget = threat.query_budget
        self.oracle = Oracle(self)
        self._model, self._x, self._y, self.threat, self._rng = model, x, y, threat, rng
        self._quantise, self._rules, self._classes = quantise, rules, classes
        self._surrogate, self._exact, self.attack, self._on_spent = surrogate, exact, attack, on_spent
        self._fitted = None if fitted is None else {name: value.clone() for name, value in fitted.items()}
        self._falls, self._scratch = falls, scratch or Scratch()
        self.reach = math.inf if rules.beyond else threat.eps  # how far queries may go
        self._margin = math.inf if rules.lookahead else TOLERANCE  # how far out of the box
        self._excess = torch.zeros(len(x), dtype=x.dtype, device=x.device)  # worst trespass of each sample
        self._active, self._active_x = self._all_rows(), x
        self._lent = self._active.clone()  # what attacks are given; the same object until somebody drops out
        self._refresh = REFRESH if x.is_cuda else 1
        self._asked_since_refresh = self._asked_since_confirmed = 0
        self._draws = torch.zeros_like(self.ledger.forwards)  # of a hit that is to be confirmed, 0 for none

    @property
    def surrogate(self) -> ServedModel:
        """See :attr:`Oracle.surrogate`."""
        if self._surrogate is None:
            raise AccessError(f"{self.attack} asked for the undefended network; declare rules = Rules(surrogate=True)")
        return self._surrogate

    @property
    def fitted(self) -> Mapping[str, Tensor]:
        """See :attr:`Oracle.fitted`."""
        if self._fitted is None:
            raise AccessError(f"{self.attack} asked for what it was fitted to; give it the methods fit and apply")
        return self._fitted

    @property
    def classes(self) -> int:
        """See :attr:`Oracle.classes`."""
        if self._classes is None:
            raise AccessError(f"{self.attack} asked how many classes there are, and nobody has told the referee")
        return self._classes

    @property
    def size(self) -> int:
        """How many samples there are."""
        return len(self._x)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._x.device

    def images(self, rows: Tensor) -> Tensor:
        """The clean images (n, C, H, W) of ``rows``, to be kept."""
        return self._x[rows]

    @property
    def live(self) -> Tensor:
        """(B,) bool: the samples that still get answers."""
        return (self.ledger.first_hit == NEVER) & (self.ledger.forwards < self.query_budget)

    def active(self) -> Tensor:
        """See :meth:`Oracle.active`."""
        if self._asked_since_refresh < self._refresh:
            return self._lent
        self._asked_since_refresh = 0
        self._compare_lent()
        self._confirm()
        live = self.live
        settled = torch.where(live, self.ledger.forwards, self.query_budget).sum()
        worst, settled = torch.stack((self._worst().double(), settled.double())).tolist()  # one wait for both
        self._complain(worst)
        self._on_spent(round(settled))
        rows = live.nonzero().squeeze(1)
        if len(rows) < len(self._active):
            self._active, self._active_x, self._lent = rows, self._x[rows], rows.clone()
        return self._lent

    def grant(self, *access: str) -> None:
        """Raise an AccessError unless the threat grants one of ``access``."""
        if self.threat.access not in access:
            raise AccessError(
                f"{self.attack} asked for {access[0]}, but its threat grants {self.threat.access}; "
                f"declare access = {access[0]!r}"
            )

    def truth(self, rows: Tensor | None) -> Tensor:
        """The true classes (n,) of the samples ``rows``, to be kept."""
        return self._y.clone() if rows is None else self._y[rows]

    def charge(self, rows: Tensor | None, answered: Tensor, times: int = 1) -> None:
        """Count ``times`` backward passes for each query (n,) or (n, k) of ``rows`` that was answered."""
        rows = self._all_rows() if rows is None else rows
        queries = answered.long() if answered.ndim == 1 else answered.sum(dim=1)
        self.ledger.backwards.index_add_(0, rows, times * queries)

    def ask(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (n[, k], K) with NaN for those who get no answer, and who got one (n[, k])."""
        many = x if x.ndim == 5 else x[:, None]                                         # (n, k, C, H, W)
        again = None
        if rows is None:
            rows, clean = self._all_rows(), self._x
        elif rows is self._lent:
            if not rows.is_cuda:
                self._compare_lent()
            rows, clean = self._active, self._active_x
        elif rows.dtype != torch.int64 or rows.ndim != 1:
            raise ThreatViolation(f"{self.attack} named rows by {rows.dtype} {tuple(rows.shape)}; give (n,) positions")
        else:
            again, clean = repeats(rows), self._x[rows]
        if many.shape[:1] + many.shape[2:] != clean.shape:
            raise ThreatViolation(
                f"{self.attack} asked about images {tuple(x.shape)} of {len(clean)} samples; "
                f"expected {tuple(clean.shape)}, or k queries each, ({len(clean)}, k, C, H, W)"
            )
        if again is None:
            logits, answered = self._answer(many, rows, clean)
        else:
            folded = self._answer(again.stack(many), again.rows, self._x[again.rows], again.asked, many.shape[1])
            logits, answered = (again.unstack(part, many.shape[1]) for part in folded)
        if self._asked_since_confirmed >= self._refresh or self.threat.access == "gradients":
            self._confirm()
        return (logits, answered) if x.ndim == 5 else (logits[:, 0], answered[:, 0])

    def keep(self, x_adv: Tensor) -> None:
        """See :meth:`Oracle.keep`; what is worth less than half a minute of work is not kept."""
        if self._scratch.due():
            self._confirm()
            ledger = vars(self.ledger)
            self._scratch.save(self._turns, {"ledger": ledger, "stages": self.stages, "x_adv": x_adv.detach()})

    def resume(self, x_adv: Tensor) -> tuple[int, Tensor]:
        """See :meth:`Oracle.resume`."""
        kept = self._scratch.load(self._turns)
        if kept is None:
            return 0, x_adv
        for name, column in kept["ledger"].items():
            getattr(self.ledger, name).copy_(column)
        self.stages[:] = kept["stages"]
        self._asked_since_refresh = self._refresh
        return len(self.stages), kept["x_adv"].to(x_adv)

    @property
    def _turns(self) -> str:
        """The name under which the turns of these samples are kept."""
        return f"turns-{sha256(self._rng.keys.cpu().numpy().tobytes()).hexdigest()[:16]}"

    def finish(self, x_adv: Tensor) -> Tensor:
        """End the attack: the final example (B, C, H, W) of each sample, which is the query that beat it, if one did.

        Args:
            x_adv: what the attack returned.

        Raises:
            ThreatViolation: a query or an example outside the ball or the box, or an example of another shape.
            RefereeError: no tensor.
        """
        if not isinstance(x_adv, Tensor):
            raise RefereeError(f"{self.attack} returned a {type(x_adv).__name__}; return x_adv, a tensor like x")
        if x_adv.shape != self._x.shape or x_adv.dtype != self._x.dtype:
            raise ThreatViolation(
                f"{self.attack} returned {x_adv.dtype} {tuple(x_adv.shape)}; "
                f"expected x_adv like x, {self._x.dtype} {tuple(self._x.shape)}"
            )
        self._confirm()
        x_adv = x_adv.detach()
        if self._quantise:
            x_adv = eight_bit(x_adv, self._x, self.threat, self.threat.eps)
        final = torch.where(per_sample(self.ledger.first_hit != NEVER), self.ledger.hits, x_adv)
        self._legal(final[:, None], self._x, self._all_rows(), self.threat.eps, TOLERANCE)
        self._complain()
        self._compare_lent()
        self._on_spent(self.query_budget * len(self._x))
        return final

    def _all_rows(self) -> Tensor:
        return torch.arange(len(self._x), device=self._x.device)

    def _answer(
        self, probes: Tensor, rows: Tensor, clean: Tensor, asked: Tensor | None = None, each: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Logits (n, k, K) and who is answered (n, k) of distinct ``rows``; ``asked`` (n, k / each) leaves some out."""
        n, k = probes.shape[:2]
        paid = self._model.desk is not None
        if paid and k > 1 and not self._rules.averages:
            places = [None if asked is None else asked[:, [place // each]] for place in range(k)]
            turns = zip(probes.split(1, dim=1), places, strict=True)
            told = [self._answer(turn, rows, clean, place) for turn, place in turns]
            return torch.cat([logits for logits, _ in told], dim=1), torch.cat([got for _, got in told], dim=1)
        if self._rules.averages:
            probes = probes[:, :1].expand_as(probes)
        self._asked_since_refresh += k
        self._asked_since_confirmed += k
        legal = self._legal(probes.detach(), clean, rows, self.reach, self._margin)
        if asked is not None:
            legal = legal & asked.repeat_interleave(each, dim=1)
        after = 1 if k == 1 else torch.arange(1, k + 1, device=rows.device)
        number = self.ledger.forwards[rows, None] + after                       # (n, k)
        images = probes.flatten(0, 1)
        if self._quantise:
            images = eight_bit(images, clean.repeat_interleave(k, dim=0), self.threat, self.reach)
        streams = self._rng
        if self._model.random:
            streams = streams[rows if k == 1 else rows.repeat_interleave(k)].fork(number.flatten())
        wanted = None if asked is None else asked.repeat_interleave(each, dim=1)
        if paid:
            answerable = legal & self.live[rows, None] & (number <= self.query_budget)
            wanted = answerable if wanted is None else wanted & answerable
        if wanted is None:
            logits = self._forward(images, streams, k)
        else:  # padding is kept out of batches, on which an answer may depend
            shown, sizes = wanted.flatten().nonzero().squeeze(1), wanted.sum(dim=1).tolist()
            given = self._forward(images[shown], streams[shown] if self._model.random else streams, sizes)
            logits = given.new_zeros(n * k, given.shape[1]).index_copy(0, shown, given)
        logits = logits.unflatten(0, (n, k))                                    # (n, k, K)
        answered = self._record(logits.detach(), images.detach().view_as(probes), rows, number, legal, clean)
        return torch.where(answered[..., None], logits, torch.nan), answered

    def _forward(self, images: Tensor, streams: SampleRng, sizes: int | list[int]) -> Tensor:
        """Logits (N, K) of ``images`` (N, C, H, W), in one batch or, for ``alone``, in batches of ``sizes``."""
        if not self._rules.alone:
            return self._model(images, streams)
        batches = torch.arange(len(images), device=images.device).split(sizes)
        apart = [self._model(images[batch], streams[batch] if self._model.random else streams) for batch in batches]
        return torch.cat(apart)

    def _record(
        self, logits: Tensor, x: Tensor, rows: Tensor, number: Tensor, legal: Tensor, clean: Tensor
    ) -> Tensor:
        """Enter queries into the ledger; returns which of them (n, k) are answered."""
        ledger, k = self.ledger, x.shape[1]
        labels = self._y[rows]
        answered = legal & (number <= self.query_budget) & (ledger.first_hit[rows, None] == NEVER)
        judged, draws = answered, cast(Tensor | int, 1)
        if self._rules.averages:
            draws = averaged = answered.sum(dim=1)
            total = torch.where(answered[..., None], logits, 0).sum(dim=1, keepdim=True)
            logits = (total / averaged.clamp(min=1)[:, None, None]).expand_as(logits)
            judged = answered & (answered.cumsum(dim=1) == averaged[:, None])  # the last of them
        finite = logits.abs().amax(dim=-1) < torch.inf  # NaN is not
        wrong = judged & finite & (logits.argmax(dim=-1) != labels[:, None])
        if not self._falls:
            wrong = torch.zeros_like(wrong)
        counts = finite
        if self._rules.beyond:
            distance, outside_box = self._measure(x, clean)
            misclassified = wrong & (outside_box <= TOLERANCE)
            inside = (distance <= limit(self.threat.eps)) & (outside_box <= TOLERANCE)
            wrong, counts = wrong & inside, finite & inside
        if k > 1:
            first = wrong.cumsum(dim=1) <= wrong  # up to the first hit
            answered, wrong = answered & first, wrong & first
        margins = margin(logits.flatten(0, 1), labels if k == 1 else labels.repeat_interleave(k)).view_as(wrong)
        lowest = _over(torch.amin, torch.where(answered & counts, margins, torch.inf))

        ledger.forwards.index_add_(0, rows, _over(torch.sum, answered.long()))
        _lower(ledger.best_margin, rows, lowest.to(ledger.best_margin.dtype))
        if self._rules.minimal:
            nearest = torch.where(answered & misclassified, distance, torch.inf).amin(dim=1)
            _lower(ledger.best_distance, rows, nearest)
        if x.is_cuda or not finite.all():
            ledger.invalid[rows] |= _over(torch.any, answered & ~finite)
        hit = _over(torch.any, wrong)
        if x.is_cuda or hit.any():  # most calls beat nobody, and looking is free on a CPU
            at = number[:, 0] if k == 1 else (number * wrong).sum(dim=1)
            _raise(ledger.first_hit, rows, torch.where(hit, at, NEVER))
            _raise(ledger.stage, rows, torch.where(hit, len(self.stages) - 1, -1))
            _raise(self._draws, rows, torch.where(hit, draws, 0))
            winner = x[:, 0] if k == 1 else x[torch.arange(len(rows), device=x.device), wrong.long().argmax(dim=1)]
            ledger.hits[rows] = torch.where(per_sample(hit), winner, ledger.hits[rows])
        return answered

    def _confirm(self) -> None:
        """Take back the hits since the last look that are none in exact numbers."""
        self._asked_since_confirmed = 0
        if self._exact is None:
            return
        rows = self._draws.nonzero().squeeze(1)
        if not len(rows):
            return
        draws, ledger = self._draws[rows], self.ledger
        each = torch.arange(len(rows), device=rows.device).repeat_interleave(draws)  # (N,), whose draw it is
        to_come = draws.cumsum(0)[each] - 1 - torch.arange(len(each), device=rows.device)  # of the same hit
        streams = self._rng[rows[each]].fork(ledger.first_hit[rows][each] - to_come)
        with torch.no_grad():
            logits = self._exact(ledger.hits[rows][each], streams)
        total = logits.new_zeros(len(rows), logits.shape[1]).index_add_(0, each, logits)
        none = rows[total.argmax(dim=1) == self._y[rows]]
        ledger.first_hit[none] = NEVER
        ledger.stage[none] = -1
        ledger.hits[none] = self._x[none]
        ledger.unconfirmed[none] += 1
        self._draws.zero_()

    def _measure(self, x: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """How far (n, k) queries ``x`` (n, k, C, H, W) are from the clean images, and how far outside the box."""
        n, k = x.shape[:2]
        low, high = x.flatten(2).aminmax(dim=2)
        return lp_norm((x - clean[:, None]).flatten(0, 1), self.threat.norm).view(n, k), torch.maximum(-low, high - 1)

    def _legal(self, x: Tensor, clean: Tensor, rows: Tensor, radius: float, slack: float) -> Tensor:
        """Which queries (n, k) are in ``radius`` and within ``slack`` of the box.

        Trespasses are noted, and raised at once on a CPU.
        """
        if self.threat.norm == "linf" and not x.is_cuda and self._all_inside(x, clean, radius, slack):
            return torch.ones(x.shape[:2], dtype=torch.bool)
        distance, outside_box = self._measure(x, clean)
        legal = (distance <= limit(radius)) & (outside_box <= slack)  # NaN is not legal
        by = torch.maximum(outside_box, distance - radius).nan_to_num(torch.inf)
        _raise(self._excess, rows, _over(torch.amax, torch.where(legal, 0, by)))
        if not x.is_cuda:
            self._complain()
        return legal

    def _all_inside(self, x: Tensor, clean: Tensor, radius: float, slack: float) -> bool:
        """Whether no pixel of any query leaves the linf ball or the box; extremes of all at once are found fastest."""
        if not len(x):
            return True
        (low, high), (down, up) = x.aminmax(), (x - clean[:, None]).aminmax()
        in_box = bool(low >= -slack) and bool(high <= 1 + slack)
        return in_box and bool(-down <= limit(radius)) and bool(up <= limit(radius))  # NaN is not inside

    def _compare_lent(self) -> None:
        if not torch.equal(self._lent, self._active):
            raise RefereeError(f"{self.attack} wrote into the rows of oracle.active(); work on a copy of them")

    def _worst(self) -> Tensor:
        """By how much the worst query has left the ball or the box."""
        return self._excess.amax() if len(self._excess) else self._excess.sum()

    def _complain(self, worst: float | None = None) -> None:
        """Raise what there is to complain of; ``worst`` saves the wait where it is known."""
        if (worst := float(self._worst()) if worst is None else worst) > 0:
            count = f"{int((self._excess > 0).sum())} of {len(self._excess)} samples"
            if worst == math.inf:
                raise ThreatViolation(f"{self.attack} gave images that are not finite, on {count}; check its gradients")
            raise ThreatViolation(
                f"{self.attack} left the {self.threat} ball or the box [0, 1] on {count}, by up to {worst:.3g}; "
                "project every query"
            )


def _over(reduce: Callable[..., Tensor], values: Tensor) -> Tensor:
    """``values`` (n, k) of k queries reduced to (n,); of a single one they are it, at no launch on a GPU."""
    return values[:, 0] if values.shape[1] == 1 else reduce(values, dim=1)


def _raise(column: Tensor, rows: Tensor, values: Tensor) -> None:
    """Have ``column`` (B,) be at least ``values`` (n,) in the distinct ``rows``, in one launch."""
    column.scatter_reduce_(0, rows, values, "amax")


def _lower(column: Tensor, rows: Tensor, values: Tensor) -> None:
    """Have ``column`` (B,) be at most ``values`` (n,) in the distinct ``rows``, in one launch."""
    column.scatter_reduce_(0, rows, values, "amin")
