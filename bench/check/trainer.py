"""What everything that trains keeps to: training defenses, and learners, which attack released data."""

import torch
from torch import Tensor, nn

from bench.check.problem import pretrained, to_train
from bench.check.subject import Subject
from bench.check.verdict import Remark, Rules, require
from bench.measure.pipeline import kept_weights
from bench.oracle.served import as_module
from bench.protocols import Job


def trained(subject: Subject, seed: int = 0, reported: list[tuple[int, int]] | None = None) -> nn.Module:
    """The network that it trains on a few digits, which stay as they were."""
    said: list[tuple[int, int]] = [] if reported is None else reported
    job = Job(seed, progress=lambda done, total: said.append((done, total)), pretrained=pretrained())
    build, data = to_train(subject.component)
    model = as_module(subject.component(build, data, job), "it")
    kept = to_train(subject.component)[1].fingerprint == data.fingerprint
    require(kept, "it writes into the data", "work on copies: data.train.pixels()")
    return model


def weights_of(model: nn.Module) -> Tensor:
    """All weights and buffers in a row."""
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def is_ready(subject: Subject) -> str:
    """It gives a network in eval mode, with finite logits, and has told of its epochs."""
    reported: list[tuple[int, int]] = []
    build, data = to_train(subject.component)
    model = trained(subject, reported=reported)
    require(not model.training, "the network is in training mode", "end with model.eval(); Trainer.train does")
    x = data.test.pixels()
    with torch.no_grad():
        logits = model(x)
    expected = (len(x), len(data.classes))
    require(logits.shape == expected, f"logits {tuple(logits.shape)}", f"train build(), which gives {expected}")
    require(logits.isfinite().all(), "NaN or infinite logits", "lower the learning rate, or clamp the loss")
    kept_weights(model, build, x, "it")
    if not reported:
        return Remark("trains, and says nothing of its epochs: call job.progress(done, total), or use Trainer.train")
    require(reported[-1][0] == reported[-1][1], f"ends at epoch {reported[-1][0]} of {reported[-1][1]}",
            "call job.progress(total, total) at the end")  # fmt: skip
    return "a network in eval mode, of which weights say all"


def repeats(subject: Subject) -> str:
    """One seed, one network, and another seed another one."""
    torch.manual_seed(3)
    first = weights_of(trained(subject))
    torch.manual_seed(4)
    fix = "start from bench.training.initialised(build, job) and draw from the streams; Trainer.train does both"
    require(torch.equal(weights_of(trained(subject)), first), "one seed gives two networks", fix)
    require(not torch.equal(weights_of(trained(subject, seed=1)), first), "two seeds give one network", fix)
    return "one seed gives one network, another another"


def trial(subject: Subject) -> Tensor:
    """A result that is the same in every process."""
    return weights_of(trained(subject))


RULES: Rules[Subject] = {"network": is_ready, "one seed, one result": repeats}
