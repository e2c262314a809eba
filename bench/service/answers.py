"""The answers of a service, which are not trusted: held against what it declares, and brought into logits."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import ServiceError
from bench.service.declared import Service

FLOOR = 1e-12  # probability that stands for an answer of 0, which has no logarithm
SUM = 1e-3     # by which the probabilities of all classes may miss 1, beside what their rounding explains

Rows = NDArray[np.float32]  # (n, width): K scores, one label, or k labels and then their k scores
Numbers = NDArray[np.float64]


def checked(service: Service, answer: object, n: int, classes: int) -> Rows:
    """The ``answer`` to ``n`` images as plain numbers, in the precision in which they are kept.

    Raises:
        ServiceError: it is not what ``service`` declares, for so many images and classes, in finite numbers.
    """
    if service.top:
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise ServiceError(f"the service answers with a {type(answer).__name__}; expected labels and scores")
        shape, what = (n, service.top), f"of the {service.top} best classes"
        labels, scores = (_numbers(part, shape, what) for part in answer)
        _check_labels(labels, classes)
        if (np.diff(np.sort(labels, axis=1), axis=1) == 0).any():
            raise ServiceError("the service names one class twice for an image")
        if (np.diff(scores, axis=1) > 0).any():
            raise ServiceError("the service does not tell the best class first; sort its answers")
        if service.answers == "probabilities":
            _check_probabilities(service, scores, whole=False)
        return np.concatenate((labels, scores), axis=1).astype(np.float32)
    if service.answers == "labels":
        labels = _numbers(answer, (n,), "labels")
        _check_labels(labels, classes)
        return labels[:, None].astype(np.float32)
    scores = _numbers(answer, (n, classes), service.answers)
    if service.answers == "probabilities":
        _check_probabilities(service, scores, whole=True)
    return scores.astype(np.float32)


def logits(service: Service, rows: Rows, classes: int) -> NDArray[np.float32]:
    """``rows`` as logits (n, K), in which the class that is best is what the service says.

    Probabilities are given their logarithms. A label is one-hot. Of the best classes, the others share what is left of
    the probability, or have the score of the last, and never more than that: the margin of an image that it gets right
    is exact. Where rounding makes the best class equal to others, it is ahead by the least that float32 tells apart.
    """
    if service.answers == "labels" or service.top == 1:
        return np.asarray(np.eye(classes, dtype=np.float32)[rows[:, 0].astype(int)])
    scores = rows[:, service.top :].astype(np.float64)
    floor = FLOOR if service.decimals is None else 0.5 * 10.0**-service.decimals
    if service.top:
        labels, shown = rows[:, : service.top].astype(int), scores
        rest = shown[:, -1:]
        if service.answers == "probabilities":
            others = max(classes - service.top, 1)
            rest = np.minimum(rest, (1 - shown.sum(axis=1, keepdims=True)).clip(min=0) / others)
        scores = np.repeat(rest, classes, axis=1)
        np.put_along_axis(scores, labels, shown, axis=1)
    if service.answers == "probabilities":
        scores = np.log(np.maximum(scores, floor))
    found = np.asarray(scores, dtype=np.float32)
    return _led_by(labels[:, :1], found) if service.top else found


def _led_by(best: NDArray[Any], scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """``scores`` (n, K) in which the class ``best`` (n, 1) of each row has no equal."""
    others = scores.copy()
    np.put_along_axis(others, best, -np.inf, axis=1)
    least = np.nextafter(others.max(axis=1, keepdims=True), np.float32(np.inf))
    led = scores.copy()
    np.put_along_axis(led, best, np.maximum(np.take_along_axis(scores, best, axis=1), least), axis=1)
    return led


def _numbers(answer: Any, shape: tuple[int, ...], what: str) -> Numbers:
    try:
        array = np.asarray(answer)
        numbers = array.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        raise ServiceError(f"the service answers with what are no numbers; expected {what}, {shape}") from None
    if array.dtype.kind not in "iuf":
        raise ServiceError(f"the service answers with {array.dtype}; expected {what}, numbers of the shape {shape}")
    if numbers.shape != shape:
        raise ServiceError(f"the service answers {shape[0]} images with {numbers.shape}; expected {what}, {shape}")
    if not (np.abs(numbers) < 1e30).all():  # NaN is not
        raise ServiceError(f"the service answers with NaN, infinity or a number beyond 1e30 among {what}")
    return numbers


def _check_labels(labels: Numbers, classes: int) -> None:
    if (labels != np.rint(labels)).any() or labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        wrong = labels[(labels != np.rint(labels)) | (labels < 0) | (labels >= classes)].flat[0]
        raise ServiceError(f"the service answers with the label {wrong:g}; labels are integers from 0 to {classes - 1}")


def _check_probabilities(service: Service, scores: Numbers, whole: bool) -> None:
    unit = 0.0 if service.decimals is None else 0.5 * 10.0**-service.decimals
    slack = SUM + unit * scores.shape[1]
    total = scores.sum(axis=1)
    sums = np.abs(total - 1) <= slack if whole else total <= 1 + slack
    if not len(scores) or ((scores >= -SUM).all() and sums.all()):
        return
    if scores.min() < -SUM:
        raise ServiceError(f"the service answers with the probability {scores.min():g}; or does it answer with logits?")
    worst = float(total[int(np.argmax(np.abs(total - 1)))])
    raise ServiceError(
        f"the probabilities of an image add up to {worst:.{max(3, math.ceil(-math.log10(slack)))}g}; expected 1, or "
        'declare answers="logits"'
    )
