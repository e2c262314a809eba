"""The subspace in which a training has moved, and training inside it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import ConfigError, StoreError
from bench.protocols import Job

RANK = 1e-12  # share of the largest eigenvalue below which a direction is rounding
CHUNK = 1 << 20  # weights at a time in float64


class Trajectory:
    """Snapshots of the parameters of ``model``, batch-norm's affine ones among them and its statistics not.

    The first is taken at once. They are kept in the scratch of ``job``, one piece each, for a run that goes on.
    """

    def __init__(self, model: nn.Module, job: Job) -> None:
        self.model, self.scratch = model, job.scratch
        self.taken: dict[int, Tensor] = {}
        self.take(0)

    def take(self, number: int) -> None:
        """Take snapshot ``number`` now."""
        with torch.no_grad():
            self.taken[number] = as_vector(self.model.parameters()).cpu()
        self.scratch.save(f"snapshot-{number}", self.taken[number])

    def matrix(self, count: int) -> Tensor:
        """The first ``count`` snapshots (count, n), those from before a kill among them.

        Raises:
            StoreError: one of those was lost.
        """
        for number in set(range(count)) - set(self.taken):
            kept = self.scratch.load(f"snapshot-{number}")
            if kept is None:
                raise StoreError(f"snapshot {number} in {self.scratch.folder} is damaged; delete that folder")
            self.taken[number] = kept
        return torch.stack([self.taken[number] for number in range(count)])


def principal_directions(snapshots: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """The directions along which ``snapshots`` (m, n) differ most, by exact principal component analysis.

    With the centred snapshots W = U S P, the eigenvectors of the small matrix ``W W^T`` are U and its eigenvalues S^2,
    so ``P = S^-1 U^T W``. Sums are in float64.

    Returns:
        The basis P (dimensions, n) with orthonormal rows, and the share of the variance along each row, falling.

    Raises:
        ConfigError: the snapshots span fewer dimensions.
    """
    centre = snapshots.double().mean(dim=0)
    chunks = range(0, snapshots.shape[1], CHUNK)

    def centred(first: int) -> Tensor:
        return snapshots[:, first : first + CHUNK].double() - centre[first : first + CHUNK]

    gram = torch.zeros(len(snapshots), len(snapshots), dtype=torch.float64, device=snapshots.device)
    for first in chunks:
        part = centred(first)
        gram += part @ part.T
    values, vectors = torch.linalg.eigh(gram)  # rising
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = int((values > RANK * values[0]).sum())
    if dimensions > rank:
        raise ConfigError(f"{len(snapshots)} snapshots span {rank} dimensions, fewer than {dimensions}; ask for fewer")
    turn = (vectors[:, :dimensions] / values[:dimensions].sqrt()).T  # (dimensions, m)
    basis = torch.cat([(turn @ centred(first)).float() for first in chunks], dim=1)
    return basis, (values / values.sum())[:dimensions]


class SubspaceSGD(torch.optim.Optimizer):
    """SGD with momentum on the coordinates y of weights ``w_0 + P^T y``: exactly SGD on gradients projected onto P.

    Its state has as many numbers as the subspace has dimensions, and the weights cannot drift out of it.

    Args:
        parameters: at w_0.
        basis: P (d, n), orthonormal rows in the order of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], basis: Tensor, lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        (self.group,) = self.param_groups
        self.basis = basis
        self.start = as_vector(self.group["params"]).detach()
        self.coordinates, self.velocity = basis.new_zeros(len(basis)), basis.new_zeros(len(basis))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here evaluates a loss again
        """One step down the gradients as they are; a parameter without one has gradient zero."""
        parts = self.group["params"]
        gradient = as_vector(p.new_zeros(p.shape) if p.grad is None else p.grad for p in parts)
        self.velocity = self.group["momentum"] * self.velocity + self.basis @ gradient
        self.coordinates = self.coordinates - self.group["lr"] * self.velocity
        put_vector(self.start + self.coordinates @ self.basis, parts)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands in the subspace."""
        return {"coordinates": self.coordinates, "velocity": self.velocity, "lr": self.group["lr"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; the weights come with the network."""
        self.coordinates, self.velocity = state["coordinates"].to(self.basis), state["velocity"].to(self.basis)
        self.group["lr"] = state["lr"]


def as_vector(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all values of ``tensors``, one after the other, (n,)."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def put_vector(vector: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Copy ``vector`` (n,) into ``parameters``, each in the memory that it has."""
    first = 0
    for parameter in parameters:
        parameter.copy_(vector[first : first + parameter.numel()].view(parameter.shape))
        first += parameter.numel()
