"""Recorded gradients: the same training, by whatever repeats what was done to the device's memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench import replay
from bench.models import resolve
from bench.numerics import InBfloat16
from bench.protocols import Job
from bench.registry import attacks, defenses
from bench.replay import WARM_UP, Replay, recordable
from bench.rng import SampleRng
from tests.pretend import GPU, pretended_gpu
from tests.test_device import build, few

CPU = torch.device("cpu")


class Tape:
    """Repeats a call into the memory that it first left its gradients in, as a CUDA graph does."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.recorded, self.played = model, 0, 0

    def record(self, call: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.recorded += 1
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        call()
        self.model.load_state_dict(before)  # nothing is done yet
        kept = [parameter.grad for parameter in self.model.parameters()]

        def play() -> None:
            self.played += 1
            for parameter in self.model.parameters():
                parameter.grad = None
            call()
            for gradient, parameter in zip(kept, self.model.parameters(), strict=True):
                gradient.copy_(parameter.grad)
                parameter.grad = None

        return play


@pytest.fixture
def tape(monkeypatch):
    made = []

    def record(call, device):
        return made[0].record(call, device)

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(replay, "aside", lambda call, device: call())
    return made


@pytest.mark.parametrize("seed", range(3))
def test_the_gradients_are_those_of_each_batch(tape, seed):
    torch.manual_seed(seed)
    model, images = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), torch.randn(40, 5)
    tape.append(Tape(model))

    def backward(rows: Tensor, epoch: Tensor) -> None:
        ((epoch + 1) * model(images[rows]).square().sum()).backward()

    replay = Replay(backward, model, CPU)
    for turn in range(12):
        rows, epoch = torch.randperm(40)[: 7 + turn % 2], torch.tensor(turn)
        statistics = {name: value.clone() for name, value in model.state_dict().items()}
        replay(rows, epoch)
        found, after = [p.grad.clone() for p in model.parameters()], model.state_dict()
        after = {name: value.clone() for name, value in after.items()}
        model.load_state_dict(statistics)
        model.zero_grad()
        backward(rows, epoch)
        for gradient, parameter in zip(found, model.parameters(), strict=True):
            assert torch.equal(gradient, parameter.grad)
        assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())
    assert tape[0].recorded == 2
    assert tape[0].played == 12 - 2 * WARM_UP  # of which two of each size are called, too


@pytest.mark.parametrize("what", ["weight", "running_mean"])
def test_a_network_that_moves_in_memory_is_called_again(tape, what):
    model, images = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), torch.randn(40, 5)
    tape.append(Tape(model))
    called = []

    def backward(rows: Tensor, epoch: Tensor) -> None:
        called.append(len(rows))
        model(images[rows]).square().sum().backward()

    replayed = Replay(backward, model, CPU)
    for turn in range(10):
        if turn == 7:
            if what == "weight":
                model[0].weight.data = model[0].weight.data.clone()
            else:
                model[1].running_mean = model[1].running_mean.clone()
        replayed(torch.arange(turn, turn + 7), torch.tensor(0))
    assert tape[0].played == 7 - WARM_UP
    assert "moved in memory" in replayed.refused
    assert len(called) > tape[0].played + 3


def test_what_cannot_be_recorded_is_called_each_time(monkeypatch):
    def record(call, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(replay, "aside", lambda call, device: call())
    model, calls = nn.Linear(3, 1, bias=False), []

    def backward(rows: Tensor, epoch: Tensor) -> None:
        calls.append(len(rows))
        (model.weight.sum() * rows.sum()).backward()

    replayed = Replay(backward, model, CPU)
    for turn in range(6):
        replayed(torch.full((2,), turn), torch.tensor(0))
        assert torch.equal(model.weight.grad, torch.full((1, 3), 2.0 * turn))
    assert calls == [2] * 6
    assert replayed.refused == "operation not permitted when stream is capturing"


@pytest.mark.parametrize("stale", ["rows", "epoch", "statistics"])
def test_a_recording_that_leaves_something_else_is_not_used(tape, stale):
    """It plays the batch or the epoch that it was recorded with, or does not move the running statistics."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), torch.randn(40, 5)
    first: list[tuple[Tensor, Tensor]] = []
    playing = False

    def backward(rows: Tensor, epoch: Tensor) -> None:
        if playing and stale == "rows":
            rows = first[0][0]
        if playing and stale == "epoch":
            epoch = first[0][1]
        model[1].momentum = 0.0 if playing and stale == "statistics" else 0.1
        ((epoch + 1) * model(images[rows]).square().sum()).backward()

    class Stale(Tape):
        def record(self, call, device):
            play = super().record(call, device)

            def played():
                nonlocal playing
                playing = True
                play()
                playing = False

            return played

    tape.append(Stale(model))
    replayed = Replay(backward, model, CPU)
    for turn in range(8):
        rows, epoch = torch.arange(turn, turn + 7), torch.tensor(turn)
        if turn == WARM_UP:
            first.append((rows.clone(), epoch.clone()))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        replayed(rows, epoch)
        found = [parameter.grad.clone() for parameter in model.parameters()]
        after = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(before)
        model.zero_grad()
        backward(rows, epoch)
        assert all(torch.equal(g, p.grad) for g, p in zip(found, model.parameters(), strict=True))
        assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())
    assert "off by" in replayed.refused


@pytest.mark.parametrize(("registry", "name"), [(attacks, "standard"), (defenses, "fast-at"), (defenses, "pgd-at")])
def test_a_training_goes_the_same_way_with_recordings(monkeypatch, registry, name):
    """Each batch of 10 of 60 images, six of an epoch; the fourth is the first that is played."""
    tapes = []

    def record(call, device):
        (parameters,) = [made.parameters for made in made_replays]
        tapes.append(Tape(networks[0]))
        assert [id(p) for p in parameters] == [id(p) for p in networks[0].parameters()]
        return tapes[-1].record(call, device)

    made_replays, networks = [], []

    def built() -> nn.Module:
        networks.append(build())
        return networks[-1]

    class Seen(Replay):
        def __init__(self, *args):
            super().__init__(*args)
            made_replays.append(self)

    trained = {}
    for kind in ("played", "called"):
        made_replays.clear()
        networks.clear()
        with pretended_gpu():
            if kind == "played":
                monkeypatch.setattr(replay, "record", record)
            monkeypatch.setattr("bench.training.Replay", Seen)
            model = registry.create(f"{name}(epochs=2, batch_size=10)")(built, few(), Job(device=GPU))
            trained[kind] = {key: value.cpu() for key, value in model.state_dict().items()}
        monkeypatch.undo()
    assert tapes[0].played > 0
    assert all(torch.equal(trained["called"][key], value) for key, value in trained["played"].items())


def test_a_number_of_an_epoch_may_be_on_the_device():
    rng = SampleRng.create(0, torch.arange(5), "training")
    assert torch.equal(rng.fork(7).keys, rng.fork(torch.tensor(7)).keys)


class Mine(nn.Module):
    pass


def test_layers_of_others_are_not_recorded():
    assert recordable(resolve("resnet20")(10, (3, 16, 16), None))
    assert not recordable(nn.Sequential(nn.ReLU(), Mine()))


def test_the_logits_in_bfloat16_are_float32_and_the_weights_stay():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(4, 3, 2, 2)
    plain, coarse = network(x), InBfloat16(network)(x)
    assert coarse.dtype == torch.float32
    assert network[1].weight.dtype == torch.float32
    assert 0 < (plain - coarse).abs().max() < 2**-6
