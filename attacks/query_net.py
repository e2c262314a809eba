"""QueryNet: networks that learn from the answers propose beside Square, and vote which proposal is worth a query."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.square import Square, lower
from attacks.windows import Proposals
from bench.losses import margin
from bench.models import resolve
from bench.norms import TINY, lp_norm, per_sample, project, steepest
from bench.oracle import Oracle
from bench.protocols import Job
from bench.ranges import Count, Whole
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat
from bench.training import initialised
from defenses.surrogate import check_network

LEARNT = 0.05  # share of the variance of the answers that is left when a training stops early
LOOK = 10      # batches after which that is looked at
PART = 1024    # images that a network sees at once


@attacks("query-net")
@dataclass(frozen=True, kw_only=True)
class QueryNet:
    """QueryNet (Chen et al., 2021) with small fixed networks: they are trained on queries and answers alone.

    In each round every network proposes the corner of the ball to which its gradient points from the incumbent, twice
    eps away, and Square proposes its own. The networks vote: the proposal of the lowest margin is asked about, one
    query for each image, each network counting by its authority, the share of its proposals that were improvements when
    they were last asked about (none where fewer than ten were). When Square has the most, or all have none, Square goes
    on alone. Without networks it is Square, bit for bit. All samples of a cell are attacked together, and what becomes
    of one depends on the others.

    The paper evolves its networks (PC-DARTS), filters Square's proposals by a Lipschitz estimate, and begins with the
    clean images; here networks are fixed, there is no filter, and clean images are not paid for. Sizes and trainings
    are ours, for a CPU: on ResNet-20 at linf 16/255, 85 images cost 19.3 queries on average where Square takes 24.4,
    and 3.5 times its CPU time. The loss is the mean squared error of logits, each less the mean over classes.

    Args:
        networks: how many there are.
        network: what they are; each begins from weights of its own.
        first_steps, steps: trainings' most batches, of the first round and of others; they stop early once a twentieth
            of the variance is left.
        batch_size: queries in a batch.
        fewest: proposals below which a network or Square has no authority.
        p_init: of Square, as for :class:`attacks.square.Square`.

    Source: arXiv:2105.15010, algorithm 1, and the authors' code.
    """

    networks: Whole = 3
    network: str = "cnn(width=8)"
    first_steps: Count = 100
    steps: Count = 20
    batch_size: Count = 64
    fewest: Count = 10
    p_init: float | None = None

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    batch_dependent: ClassVar[bool] = True
    whole_set: ClassVar[bool] = True
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Chen et al., 2021, arXiv:2105.15010"

    def __post_init__(self) -> None:
        Square(p_init=self.p_init)  # complains about an impossible one
        check_network(self.network)

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the networks can be built for the data."""
        resolve(self.network)(classes, shape, None)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's incumbent."""
        team = _Team(self, oracle, x, y, threat, rng)
        return Square(p_init=self.p_init).search(team, x, y, threat, rng, margin, team.rule, team.beside)


class _Team:
    """The networks, what they have learnt from, and who has which authority: an oracle and a rule for Square's search.

    Attackers are numbered: the networks, then Square.
    """

    def __init__(
        self, attack: QueryNet, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng
    ) -> None:
        self.attack, self.oracle, self.x, self.y, self.threat = attack, oracle, x, y, threat
        self.query_budget = oracle.query_budget
        self.networks, self.optimisers = list[nn.Module](), list[torch.optim.Optimizer]()
        self.authority = [1.0] * attack.networks + [0.0]
        self.alone = attack.networks == 0                   # from then on, Square asks about its own proposals
        self.asked, self.told = list[Tensor](), list[Tensor]()  # uint8 (n, C, H, W) and centred logits (n, K)
        self.steps = attack.first_steps
        self.chosen: Tensor | None = None                   # (n,) whose proposals the last question was about
        if self.alone:
            return
        seed = int(rng.fork("networks").words(1).sum().item()) & 0xFFFFFFFF  # one for the whole set
        self.shuffle = torch.Generator().manual_seed(seed)
        build = resolve(attack.network)
        for number in range(attack.networks):
            job = Job(seed + number, x.device)
            network = initialised(lambda: build(oracle.classes, tuple(x.shape[1:]), None), job)  # type: ignore[arg-type]
            self.networks.append(network.to(x.device))
            self.optimisers.append(torch.optim.Adam(network.parameters(), lr=1e-3))

    def active(self) -> Tensor:
        return self.oracle.active()

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The oracle's answers (n, K), which are kept."""
        logits = self.oracle.scores(x, rows)
        if not self.alone:
            answered = logits.isfinite().all(dim=1)
            self.asked.append((x[answered] * 255).round().to(torch.uint8))
            self.told.append(_centred(logits[answered]).float())
        return logits

    def rule(self, held: Tensor, value: Tensor, memory: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """Square's, after which authorities are those of this round."""
        taken, memory = lower(held, value, memory, rng)
        if self.chosen is not None:
            whose, size = self.chosen[~value.isnan()], len(self.authority)
            asked = torch.bincount(whose, minlength=size)
            better = torch.bincount(self.chosen[taken], minlength=size)
            enough = asked >= self.attack.fewest
            self.authority = torch.where(enough, better / asked.clamp(min=1), 0.0).tolist()
            self.alone = self.authority[-1] >= max(self.authority[:-1])
            self.chosen = None
        return taken, memory

    def beside(self, own: Proposals, rows: Tensor) -> Proposals:
        """Square's ``own`` proposals for the samples ``rows`` (n,), and those of the networks beside them."""
        return own if self.alone else _Voted(self, own, self.x[rows], self.y[rows])

    def learn(self) -> None:
        """Train the networks on all that was asked so far."""
        images, targets = torch.cat(self.asked), torch.cat(self.told)
        self.asked, self.told = [images], [targets]
        enough = LEARNT * targets.var()
        for network, optimiser in zip(self.networks, self.optimisers, strict=True):
            network.train()
            for step, rows in enumerate(self._batches(len(images)), 1):
                with torch.enable_grad():
                    loss = F.mse_loss(_centred(network(images[rows].float() / 255)), targets[rows])
                    optimiser.zero_grad()
                    loss.backward()
                optimiser.step()
                if step % LOOK == 0 and loss < enough:
                    break
            network.eval()
        self.steps = self.attack.steps

    def _batches(self, count: int) -> Sequence[Tensor]:
        """Rows of ``count`` images for each step, every image once before any comes again."""
        size = min(self.attack.batch_size, count)
        passes = -(-self.steps * size // count)
        order = torch.cat([torch.randperm(count, generator=self.shuffle) for _ in range(passes)])
        batches: Sequence[Tensor] = order[: self.steps * size].to(self.x.device).split(size)
        return batches


class _Voted:
    """Proposals for the samples ``x`` (n, C, H, W) of classes ``y`` (n,), each the one that the networks vote for."""

    def __init__(self, team: _Team, own: Proposals, x: Tensor, y: Tensor) -> None:
        self.team, self.own, self.x, self.y = team, own, x, y

    def start(self, rng: SampleRng) -> Tensor:
        return self.own.start(rng)

    def side(self, side: int) -> int:
        return self.own.side(side)

    def propose(self, incumbent: Tensor, side: int, rng: SampleRng, corner: Tensor | None = None) -> Tensor:
        """The proposal of the lowest margin in the eyes of the networks, of Square's and one of each of them."""
        windows = self.own.propose(incumbent, side, rng, corner)
        if self.team.alone:
            return windows
        self.team.learn()
        options = torch.stack([*(self._corner(network, incumbent) for network in self.team.networks), windows])
        self.team.chosen = chosen = self._votes(options).argmin(dim=0)
        return options[chosen, torch.arange(len(chosen), device=chosen.device)]

    def _corner(self, network: nn.Module, incumbent: Tensor) -> Tensor:
        """Twice eps up the cross-entropy of ``network`` from ``incumbent``, and back to the end of the ball."""
        with torch.enable_grad():
            u = incumbent.detach().float().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(network(u), self.y, reduction="sum"), u)
        threat = self.team.threat
        moved = incumbent + 2 * threat.eps * steepest(gradient.to(incumbent), threat.norm)
        if threat.norm == "l2":
            delta = moved - self.x
            moved = self.x + delta * per_sample(threat.eps / (lp_norm(delta, "l2") + TINY))
        return project(moved, self.x, threat)

    def _votes(self, options: Tensor) -> Tensor:
        """The margin (m, n) of each of ``options`` (m, n, C, H, W), averaged over networks by their authority."""
        images, y = options.flatten(0, 1).float(), self.y.repeat(len(options))
        total = torch.zeros(len(images), device=images.device)
        with torch.no_grad():
            for network, weight in zip(self.team.networks, self.team.authority, strict=False):
                logits = torch.cat([network(part) for part in images.split(PART)])
                total += weight * margin(logits, y) / len(self.team.networks)
        return total.view(options.shape[:2])


def _centred(logits: Tensor) -> Tensor:
    """``logits`` (n, K), each row less its mean, which no class depends on."""
    return logits - logits.mean(dim=1, keepdim=True)
