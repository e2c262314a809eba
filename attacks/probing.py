"""What kind of scores a service tells: a few questions for each sample, and what each sample's answers say."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.decoding import Edit
from attacks.sawtooth import Reported, explained
from bench.losses import margin
from bench.norms import per_sample
from bench.oracle import Oracle
from bench.rng import SampleRng

# What the answers of a sample have shown.
PLAIN, SCALED, RANDOM, COARSE, EDITED, REVERSED, LABELS = range(7)

SAME = 1e-4      # answers that differ by less, relative to their spread, are the same but for rounding errors
LEVEL = 1e-5     # margins of two images that differ by less, relative to the largest, are on one step
MAY, DOES = 0.25, 0.5  # of a gap that is left: it may be a jump; it is one
STEPS = 12       # halvings of the way to the boundary
FIRST = 7        # of them, after which a margin that runs down to 0 has shown that it does
BETWEEN = 8      # images between the clean one and the boundary, where there is a jump
EDGE = 9         # halvings towards an edge of the edit
NEXT = 8         # answers next to the boundary
ALONE = 0.1     # of the height of an edge: other scores that move by less do not move with it
BACK = 0.75      # of a margin that is nearer to the boundary: those of a network rarely fall below that
STEEP = 0.1      # of the clean margin that the slope at the boundary promises
SMALL = 0.05     # of the largest margin: a jump at the boundary below that changes no search


@dataclass
class Scores:
    """What is known of each sample: its kind (B,), and the edit that is undone in those that are ``EDITED``."""

    kind: Tensor
    edit: Edit
    classes: int


def probe(oracle: Oracle, x: Tensor, y: Tensor, rng: SampleRng) -> Scores:
    """Ask what kind of scores each sample is told; mostly 10 questions where they are plain, 35 at most.

    1. The clean image, twice. Other logits: ``SCALED`` where they are the same up to a scale and a shift, as a random
       scale leaves them (of two classes, up to a scale), else ``RANDOM``.
    2. Black, white, the negative, and noise, until one is misclassified; then halvings of the way there. Margins of a
       network run down to 0 at the boundary, so each halving halves their gap across it. A gap that stays says that
       they are edited.
    3. Where it stays, images between: all margins are equal, ``LABELS``; neighbours are, ``COARSE``; else ``EDITED``,
       and halvings towards an edge on this side of the boundary find out how (:func:`attacks.sawtooth.explained`).

    The ways lead out of the ball, so this is for attacks whose rules say that they roam.
    """
    kind = torch.full_like(y, PLAIN)
    edit = Edit(*(torch.full_like(x[:, 0, 0, 0], torch.nan) for _ in range(3)))
    twice = oracle.scores(x[:, None].expand(-1, 2, -1, -1, -1))                                  # (B, 2, K)
    one, other = twice.unbind(1)
    kind = torch.where(_differ(one, other), torch.where(_differ(_unit(one), _unit(other)), RANDOM, SCALED), kind)

    end = _ends(oracle, x, y, rng, kind)
    rows = oracle.active()
    rows = rows[(kind[rows] == PLAIN) & end.isfinite().all(dim=(1, 2, 3))[rows]]
    if len(rows) == 0:
        return Scores(kind, edit, twice.shape[2])
    way = _Way(oracle, x[rows], end[rows], y[rows], rows, one[rows])
    way.halve(FIRST)
    back = way.runs_back()
    kind[rows] = torch.where(back, REVERSED, PLAIN)
    rows = way.keep(way.jumps(MAY) | way.steep() | back)
    if len(rows) == 0:
        return Scores(kind, edit, twice.shape[2])
    way.halve(STEPS - FIRST)
    rows = way.keep(way.jumps(DOES) | ~way.runs_back())  # where one ran far down at first, a jump shows only now
    if len(rows) == 0:
        return Scores(kind, edit, twice.shape[2])
    way.look_between(BETWEEN)
    level, all_level = way.level()
    high = way.reported.nan_to_num(-torch.inf).amax(dim=1)
    jumps = way.jumps(DOES)
    found = torch.where(all_level, LABELS, torch.where(level, COARSE, EDITED))
    plain = torch.where(way.runs_back(), REVERSED, PLAIN)
    found = torch.where(jumps & ((way.inside > SMALL * high) | level), found, plain)
    kind[rows] = found
    rows = way.keep(found == EDITED)
    if len(rows):
        for whole, found in zip(vars(edit).values(), vars(explained(way.edge(EDGE))).values(), strict=True):
            whole[rows] = found.to(whole)
    return Scores(kind, edit, twice.shape[2])


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Which answers (B, K) are others; none that are missing."""
    spread = (a.amax(dim=1) - a.amin(dim=1)).abs()
    return (a - b).abs().amax(dim=1) > SAME * spread


def _unit(logits: Tensor) -> Tensor:
    """``logits`` (B, K) without their mean, where there are more than two, and at unit length."""
    centred = logits - logits.mean(dim=1, keepdim=True) if logits.shape[1] > 2 else logits
    unit: Tensor = centred / centred.norm(dim=1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
    return unit


def _ends(oracle: Oracle, x: Tensor, y: Tensor, rng: SampleRng, kind: Tensor) -> Tensor:
    """A misclassified image (B, C, H, W) for each ``PLAIN`` sample, somewhere in the box; NaN where none is found."""
    end = torch.full_like(x, torch.nan)
    noise = rng.fork("end").uniform(*x.shape[1:]).to(x)
    for image in (torch.zeros_like(x), torch.ones_like(x), 1 - x, noise):
        rows = oracle.active()
        rows = rows[(kind[rows] == PLAIN) & end[rows, 0, 0, 0].isnan()]
        if len(rows) == 0:
            break
        logits = oracle.scores(image[rows], rows)
        wrong = (logits.argmax(dim=1) != y[rows]) & logits.isfinite().all(dim=1)
        end[rows] = torch.where(per_sample(wrong), image[rows], torch.nan)
    return end


class _Way:
    """The straight ways from clean images to misclassified ones, and the margins (n, m) that were reported on them.

    ``inside`` and ``outside`` (n,) are the margins on both sides of the boundary, between ``low`` and ``high``, shares
    of the way; ``places`` (n, m) are those of all answers that were right.
    """

    def __init__(self, oracle: Oracle, x: Tensor, end: Tensor, y: Tensor, rows: Tensor, logits: Tensor) -> None:
        clean = margin(logits, y)
        self.oracle, self.x, self.end, self.y, self.rows = oracle, x, end, y, rows
        self.low = torch.zeros_like(clean, dtype=torch.float64)
        self.high = torch.ones_like(self.low)
        self.inside, self.outside = clean, torch.full_like(clean, -torch.inf)
        self.places, self.reported = self.low[:, None], clean[:, None]
        self.scores = logits[:, None]
        self.gaps = list[Tensor]()

    def keep(self, stay: Tensor) -> Tensor:
        """Go on with those that ``stay`` (n,); returns their rows."""
        staying = stay.nonzero().squeeze(1)
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value[staying])
        self.gaps = [gap[staying] for gap in self.gaps]
        return self.rows

    def ask(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """The margins (n,) that are reported at shares ``at`` (n,) of the way, and which of them are right."""
        image = torch.lerp(self.x, self.end, per_sample(at.to(self.x))).clamp(0, 1)
        logits = self.oracle.scores(image, self.rows)  # NaN where a sample has fallen
        right = logits.argmax(dim=1) == self.y
        shown = margin(logits, self.y)
        self.places = torch.cat((self.places, at[:, None]), dim=1)
        self.reported = torch.cat((self.reported, torch.where(right, shown, torch.nan)[:, None]), dim=1)
        self.scores = torch.cat((self.scores, logits[:, None]), dim=1)
        return shown, right & ~shown.isnan()

    def halve(self, steps: int) -> None:
        """Bring both sides of the boundary closer together."""
        for _ in range(steps):
            middle = (self.low + self.high) / 2
            shown, right = self.ask(middle)
            self.low, self.high = torch.where(right, middle, self.low), torch.where(right, self.high, middle)
            self.inside = torch.where(right, shown, self.inside)
            self.outside = torch.where(right, self.outside, shown)
            self.gaps.append(self.inside - self.outside)

    def jumps(self, share: float) -> Tensor:
        """Whether the last three halvings, which make a slope an eighth of it, left that ``share`` of a gap."""
        return self.gaps[-1] > share * self.gaps[-4]

    def runs_back(self) -> Tensor:
        """Whether margins fall somewhere on the way from the boundary to the clean image (n,), to :data:`BACK`."""
        order = torch.where(self.reported.isnan(), -1, self.places).argsort(dim=1, descending=True)
        shown = self.reported.gather(1, order)
        highest = shown.nan_to_num(0).cummax(dim=1).values
        return (shown < BACK * highest).any(dim=1)

    def steep(self) -> Tensor:
        """Whether margins rise at the boundary so fast (n,) that the clean one is low for that: they may run back."""
        slope = (self.inside - self.outside) / (self.high - self.low)
        return self.reported[:, 0] < STEEP * slope * self.low

    def look_between(self, count: int) -> None:
        """Ask at ``count`` places between the clean image and the boundary."""
        for place in range(1, count + 1):
            self.ask(self.low * place / (count + 1))

    def level(self) -> tuple[Tensor, Tensor]:
        """Whether the two right answers next to the boundary are the same (n,), and whether all are."""
        order = torch.where(self.reported.isnan(), -1, self.places).argsort(dim=1, descending=True)
        sorted_ = self.reported.gather(1, order)
        slack = LEVEL * self.reported.nan_to_num(0).abs().amax(dim=1)
        near = (sorted_[:, 0] - sorted_[:, 1]).abs() <= slack
        apart = (self.reported - self.reported[:, :1]).nan_to_num(0).abs().amax(dim=1)
        return near, apart <= slack

    def edge(self, steps: int) -> Reported:
        """What was reported, from the boundary on, and halvings towards where that rises most."""
        order = torch.where(self.reported.isnan(), -1, self.places).argsort(dim=1, descending=True)
        shown, places = self.reported.gather(1, order), self.places.gather(1, order)
        rise = (shown[:, 1:] - shown[:, :-1]).nan_to_num(-torch.inf)
        most = rise.argmax(dim=1, keepdim=True)
        (below, near), (above, far) = (
            (shown.gather(1, at).squeeze(1), places.gather(1, at).squeeze(1)) for at in (most, most + 1)
        )
        at = (order.gather(1, most + side).squeeze(1) for side in (0, 1))
        samples = torch.arange(len(order), device=order.device)
        under, over = (self.scores[samples, each] for each in at)
        for _ in range(steps):
            middle = (near + far) / 2
            told, right = self.ask(middle)
            up = told > (below + above) / 2
            near, far = torch.where(up, near, middle), torch.where(up, middle, far)
            lower, upper = right & ~up, right & up
            below, above = torch.where(lower, told, below), torch.where(upper, told, above)
            under = torch.where(lower[:, None], self.scores[:, -1], under)
            over = torch.where(upper[:, None], self.scores[:, -1], over)
        order = torch.where(self.reported.isnan(), -1, self.places).argsort(dim=1, descending=True)
        shown = self.reported.gather(1, order)
        moved = (over - under).scatter(1, self.y[:, None], torch.nan)
        moved = (moved - moved.nanmean(dim=1, keepdim=True)).abs().nan_to_num(0).amax(dim=1)
        beside = shown[:, 1:NEXT] - shown[:, :1]
        both = (beside > 0).any(dim=1) & (beside < 0).any(dim=1)
        return Reported(shown, below, above, both & (moved < ALONE * (above - below)))
