"""A served model in a process of its own, which holds neither the labels nor the ledger.

A defense in a user's file is anybody's code. In the process of the referee it could read the labels off the stack or
write into the ledger; here it is sent the network, the calibration images and what is asked, and nothing that it does
to its interpreter reaches ours. It has the rights of its user, as every program has: this is no sandbox for files.

What comes from there is not trusted. An answer is a header in JSON and plain numbers, nothing is ever unpickled, and a
process that does not answer, ends, or answers nonsense fails its cell in one line.
"""

import copy
import json
import math
import pickle
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import RefereeError
from bench.measure.fitting import around
from bench.measure.inside import Look, look, optimisation, seeded
from bench.models.lent import changes, contents
from bench.oracle.served import ServedModel
from bench.protocols import AtOutput
from bench.registry import load_plugins
from bench.rng import SampleRng, pinned
from bench.system.frames import fill, receive, send
from bench.system.nursery import Begun, begin
from bench.system.parcel import pack, unpack
from bench.system.process_state import seed_globals

PATIENCE = 600.0  # seconds in which every answer has to come
MESSAGE = 20_000  # characters of an error that are kept
HEADER = 1 << 24  # bytes, more than any honest one has
ENTRY = "bench.measure.isolated:serve"
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)}


class RemoteError(Exception):
    """What was raised in the process of a defense, with the traceback there."""


@dataclass(frozen=True)
class Deployment:
    """All that a process is given: networks, and an output ``defense`` to be put around each of them, in this order.

    ``who`` is what the defense is called in complaints, and ``fitted`` what it has learned where it was trained.
    """

    defense: AtOutput
    networks: Sequence[nn.Module]
    calibration: Split
    seed: int
    batch_size: int
    device: torch.device
    who: str
    fitted: Mapping[str, Tensor] | None = None


@contextmanager
def in_own_process(deployment: Deployment) -> Iterator[list["Remote"]]:
    """The served modules of ``deployment``, in a process that ends with the context.

    Raises:
        RefereeError: the defense or the network cannot be sent there, or the process has failed, has ended, or has
            changed what its networks share.
    """
    process = _Process(deployment)
    try:
        yield process.modules()
        process.check()
    finally:
        process.close()


@contextmanager
def untouched(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` as it was deployed: a copy, and of one in a process of its own, one that nobody has asked yet."""
    if isinstance(module, Remote):
        with module.process.again() as process:
            yield process.modules()[module.number]
    else:
        yield copy.deepcopy(module)


def examine(module: nn.Module) -> Look:
    """What ``module`` is now, wherever it is; one in a process of its own says so itself."""
    return module.look() if isinstance(module, Remote) else look(module)


class Remote(nn.Module):
    """A served module in a process of its own; a copy of it is a copy there. It has no gradients."""

    def __init__(self, process: "_Process", handle: int, number: int) -> None:
        super().__init__()
        self.process, self.handle, self.number = process, handle, number
        self.optimised = 0  # backward passes and optimiser steps in its last answer
        self.eval()

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W), with the streams ``rng`` of a random model."""
        streams = () if rng is None else (rng.keys, rng.owners)
        header = {"ask": self.handle, "grad": torch.is_grad_enabled(), "leaf": x.requires_grad, "seed": pinned.get()}
        told, (logits,) = self.process.call(header, (x.detach(), *streams), tensors=1)
        if logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
            raise RefereeError(f"the process of {self.process.who} answers {len(x)} images with {tuple(logits.shape)}")
        self.optimised = int(told.get("optimised", 0))
        return logits.to(x.device)

    def look(self) -> Look:
        """What it says of itself; see :func:`bench.measure.inside.look`."""
        told, _ = self.process.call({"look": self.handle})
        return Look(int(told["training"]), tuple(map(str, told["weights"])))

    def double(self) -> "Remote":
        """It computes in float64 from now on."""
        self.process.call({"double": self.handle})
        return self

    def __deepcopy__(self, memo: object) -> "Remote":
        told, _ = self.process.call({"copy": self.handle})
        return Remote(self.process, int(told["handle"]), self.number)

    def __del__(self) -> None:
        if "process" in vars(self):
            self.process.dropped.append(self.handle)


class _Process:
    """Our side: one question at a time, each with its answer."""

    def __init__(self, deployment: Deployment, packed: bytes | None = None) -> None:
        self.who, self._deployment = deployment.who, deployment
        self._packed = packed or _packed(deployment)
        self.dropped: list[int] = []  # handles that nobody holds any more
        self.ended = ""
        self.begun: Begun = begin(ENTRY)
        self.begun.channel.settimeout(PATIENCE)
        try:
            self._send(self._packed)
            self._receive(0)
        except BaseException:
            self.close()
            raise

    def modules(self) -> list[Remote]:
        """The modules that it serves, in the order of its networks."""
        return [Remote(self, number, number) for number in range(len(self._deployment.networks))]

    def again(self) -> "_Process":
        """Another process with the same deployment."""
        return _Process(self._deployment, self._packed)

    def call(
        self, header: dict[str, Any], given: Sequence[Tensor] = (), tensors: int = 0
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """What it answers: a header, and so many ``tensors``, on the CPU.

        Raises:
            RefereeError: what it was asked for failed there, or it is at its end.
        """
        if self.ended:
            raise RefereeError(self.ended)
        gone, self.dropped = self.dropped, []
        plain = [_dense(tensor) for tensor in given]
        shapes = [(str(tensor.dtype), tuple(tensor.shape), tensor.stride()) for tensor in plain]
        self._send(pickle.dumps({**header, "dropped": gone, "tensors": shapes}), *map(_bytes, plain))
        return self._receive(tensors)

    def check(self) -> None:
        """Whether its networks still share with each other what they did.

        Raises:
            RefereeError: they do not.
        """
        told, _ = self.call({"check": True})
        if changed := told.get("changed"):
            raise RefereeError(f"{self.who} has changed the network that other cells share: {str(changed)[:300]}")

    def close(self) -> None:
        """End the process, and show what it has printed."""
        how = self.begun.end()
        self.ended = self.ended or f"the process of {self.who} {how}"
        if said := self.begun.printed.strip():
            print(f"{self.who} printed:\n{said}", file=sys.stderr)

    def __enter__(self) -> "_Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, *parts: "bytes | memoryview") -> None:
        try:
            send(self.begun.channel, *parts)
        except OSError as error:
            raise self._lost(error) from None

    def _receive(self, tensors: int) -> tuple[dict[str, Any], list[Tensor]]:
        try:
            told = json.loads(receive(self.begun.channel, HEADER))
            if not isinstance(told, dict):
                raise ValueError("its header is no object")
            shapes = told.get("tensors", [])
            if "error" not in told and len(shapes) != tensors:
                raise ValueError(f"it sent {len(shapes)} tensors")
            found = [] if "error" in told else [self._tensor(*shape) for shape in shapes]
        except (EOFError, OSError) as error:
            raise self._lost(error) from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.ended = f"the process of {self.who} answers nonsense ({error})"
            self.begun.end()
            raise RefereeError(self.ended) from None
        if "error" in told:
            message = _line(str(told["error"]))
            where = RemoteError(f"in the process of {self.who}:\n{str(told.get('traceback', ''))[-MESSAGE:]}")
            raise RefereeError(message) from where
        return told, found

    def _tensor(self, name: str, shape: list[int]) -> Tensor:
        dtype = DTYPES[name]
        if len(shape) > 4 or not all(isinstance(size, int) and 0 <= size < 1 << 24 for size in shape):
            raise ValueError(f"its answer has the shape {shape}")
        size = math.prod(shape) * dtype.itemsize
        if size > 1 << 31:
            raise ValueError(f"its answer has the shape {shape}")
        return _read(self.begun.channel, dtype, shape)

    def _lost(self, error: BaseException) -> RefereeError:
        """Why there is no answer, of a process that is gone then."""
        if not self.ended:
            how = self.begun.end()
            late = f"has not answered in {PATIENCE:g} s and was ended"
            self.ended = f"the process of {self.who} {late if isinstance(error, TimeoutError) else how}"
        return RefereeError(self.ended)


def _packed(deployment: Deployment) -> bytes:
    """What a new process is sent.

    Raises:
        RefereeError: something of it cannot be sent.
    """
    try:
        return pack((torch.get_num_threads(), replace(deployment, calibration=deployment.calibration.clone())))
    except Exception as error:  # pickling runs their own code, which may raise anything
        raise RefereeError(
            f"{deployment.who} has a process of its own, to which it or its network cannot be sent "
            f"({_line(f'{type(error).__name__}: {error}')}); make both of what can be pickled, not of lambdas and "
            "local classes"
        ) from error


# What follows runs in the process of the defense.


def prepare() -> None:
    """Load what every such process needs, in the one that they are forked from."""
    load_plugins()


def serve(channel: socket.socket) -> None:
    """Deploy what is sent, then answer what is asked until the channel is closed."""
    try:
        state = _State(*unpack(receive(channel)))
    except EOFError:
        return
    except BaseException as error:  # the defense's own code, which may raise anything, sys.exit among it
        _answer(channel, _complaint(error))
        return
    _answer(channel, {})
    while True:
        try:
            asked = pickle.loads(receive(channel))
        except EOFError:
            return
        given = [_read(channel, DTYPES[name], shape, stride) for name, shape, stride in asked["tensors"]]
        try:
            told, made = state.answer(asked, given)
        except BaseException as error:
            told, made = _complaint(error), []
        _answer(channel, told, made)


class _State:
    """What is deployed, by handles: a served model for each network, and copies of them."""

    def __init__(self, threads: int, told: Deployment) -> None:
        torch.set_num_threads(threads)
        self.device, self.next = told.device, len(told.networks)
        self._reference = told.networks[-1]
        networks = [*told.networks[:-1], copy.deepcopy(self._reference)]
        self._contents = contents(self._reference)
        self.served: dict[int, ServedModel] = {}
        seed_globals(told.seed)
        for number, network in enumerate(networks):
            calibration = told.calibration.clone().to(told.device)
            module = around(told.defense, network, calibration, told.seed, told.fitted, told.who)
            self.served[number] = ServedModel(module, told.defense.random, told.batch_size)

    def answer(self, asked: dict[str, Any], given: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """What ``asked`` asks for: a header and tensors."""
        for handle in asked["dropped"]:
            self.served.pop(handle, None)
        match asked:
            case {"ask": handle}:
                return self._ask(self.served[handle], asked, given)
            case {"copy": handle}:
                self.served[self.next] = replace(
                    self.served[handle], module=copy.deepcopy(self.served[handle].module)
                )
                self.next += 1
                return {"handle": self.next - 1}, []
            case {"double": handle}:
                self.served[handle].module.double()
                return {}, []
            case {"look": handle}:
                return look(self.served[handle].module)._asdict(), []
            case _:
                return {"changed": ", ".join(changes(self._contents, contents(self._reference)))}, []

    def _ask(
        self, model: ServedModel, asked: dict[str, Any], given: list[Tensor]
    ) -> tuple[dict[str, Any], list[Tensor]]:
        x, *streams = (tensor.to(self.device) for tensor in given)
        rng = SampleRng(*streams) if streams else SampleRng.create(0, torch.zeros(0, dtype=torch.int64), "unused")
        held = nullcontext() if asked["seed"] is None else seeded(model.module, asked["seed"], self.device)
        with held, torch.set_grad_enabled(asked["grad"]), optimisation() as seen:
            logits = model(x.requires_grad_(asked["leaf"]), rng)
        return {"optimised": len(seen)}, [logits.detach().cpu().contiguous()]


def _complaint(error: BaseException) -> dict[str, Any]:
    """What went wrong, in the words that it would have in the process of the referee."""
    said = str(error) if isinstance(error, RefereeError) else f"{type(error).__name__}: {error}"
    return {"error": said[-MESSAGE:], "traceback": traceback.format_exc()[-MESSAGE:]}


def _answer(channel: socket.socket, told: dict[str, Any], made: Sequence[Tensor] = ()) -> None:
    shapes = [(str(tensor.dtype), list(tensor.shape)) for tensor in made]
    header = json.dumps({**told, "tensors": shapes}).encode()
    send(channel, header, *map(_bytes, made))


# What both sides do.


def _read(
    channel: socket.socket, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
) -> Tensor:
    values = torch.empty(math.prod(shape), dtype=dtype)
    if values.numel():
        fill(channel, _bytes(values))
    return values.view(tuple(shape)) if stride is None else values.as_strided(tuple(shape), tuple(stride))


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU, without gaps, in the order in which it lies where a network may care."""
    tensor = tensor.detach().cpu()
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if last else tensor.contiguous()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a ``tensor`` without gaps."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _line(text: str) -> str:
    return " ".join(text.split())[:500]
