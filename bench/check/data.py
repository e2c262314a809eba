"""What every data defense keeps to."""

import dataclasses

import torch
from torch import Tensor

from bench.check.problem import DIGITS, digits
from bench.check.subject import Subject
from bench.check.verdict import Rules, require
from bench.dataset import Split
from bench.norms import lp_norm
from bench.protection import check_release, declared_threat, protected_rows
from bench.protocols import Job

SHARE = 0.3


def released(subject: Subject, seed: int = 0) -> Split:
    """What the defense releases of a few digits, which stay as they were."""
    defense, data = subject.component, digits()
    found = defense(data, Job(seed=seed))
    same = torch.equal(data.train.images, digits().train.images)
    require(same, "it writes into data.train.images", "work on a copy: grey_levels(data.train).clone()")
    return check_release(found, digits().train, declared_threat(defense))


def keeps_to_its_ball(subject: Subject) -> str:
    """As many uint8 images with the same labels in the same order, in the ball; some of them changed."""
    defense, before = subject.component, digits().train.images
    change = released(subject).images.double() - before.double()
    size = lp_norm(change / (1 if defense.norm == "l0" else 255), defense.norm)
    require(size.max() > 0, "it releases the images as they were",
            "round to grey levels that differ: eps below 1/255 changes no uint8 image")  # fmt: skip
    moved = int((size > 0).sum())
    return f"{moved} of {DIGITS} images moved, by up to {float(size.max()):.3g} of {defense.eps:.3g} in {defense.norm}"


def repeats(subject: Subject) -> str:
    """One seed, one release."""
    torch.manual_seed(1)
    first = released(subject, seed=2).images
    torch.manual_seed(2)
    require(torch.equal(released(subject, seed=2).images, first), "one seed gives two releases",
            'draw from SampleRng.create(job.seed, rows, "name") alone')  # fmt: skip
    return "one seed gives one release"


def keeps_to_its_share(subject: Subject) -> str:
    """With ``share`` below 1, only the rows change that :func:`bench.protection.protected_rows` draws."""
    names = {field.name for field in dataclasses.fields(subject.component)}
    if "share" not in names:
        return "protects every image; it has no share"
    fewer = dataclasses.replace(subject, component=dataclasses.replace(subject.component, share=SHARE))
    changed = (released(fewer, seed=2).images != digits().train.images).flatten(1).any(dim=1).nonzero().squeeze(1)
    drawn = protected_rows(digits().train, SHARE, Job(seed=2))
    require(set(changed.tolist()) <= set(drawn.tolist()), f"at share = {SHARE} it changes others than the drawn rows",
            "take rows = protected_rows(data.train, self.share, job) and merge(data.train, rows, images)")  # fmt: skip
    require(len(changed), f"at share = {SHARE} it changes nothing", "protect the rows that protected_rows gives")
    return f"at share = {SHARE}, {len(changed)} of {DIGITS} images change"


def trial(subject: Subject) -> Tensor:
    """A result that is the same in every process."""
    return released(subject).images


RULES: Rules[Subject] = {
    "ball, order and labels": keeps_to_its_ball, "one seed, one result": repeats, "share": keeps_to_its_share,
}  # fmt: skip
