"""What components declare of themselves, and what is wrong with one that does not.

A declaration is a class attribute or, where it depends on the parameters, a property. Whoever reads one later can count
on it: all of them are looked at when a component is registered, and once more when it has been made.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

from bench.errors import ConfigError, nearest
from bench.rules import Rules
from bench.spec import Spec
from bench.threat import Access, Norm

Stage = Literal["data", "training", "output"]  # of a pipeline, where a defense acts


class Declaration(NamedTuple):
    """What stands after ``name =`` in a class: an example, to be shown, and whether a value fits."""

    example: str
    fits: Callable[[Any], bool]
    required: bool = False


Declarations = Mapping[str, Declaration]
RULES = tuple(rule.name for rule in dataclasses.fields(Rules))


def one_of(kind: Any, **given: Any) -> Declaration:
    """One of the strings of the literal type ``kind``."""
    values = get_args(kind)
    return Declaration(" or ".join(f'"{value}"' for value in values), lambda value: value in values, **given)


def _yes_or_no(**given: Any) -> Declaration:
    return Declaration("True or False", lambda value: isinstance(value, bool), **given)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_norms(value: object) -> bool:
    return isinstance(value, frozenset | set | tuple) and bool(value) and set(value) <= set(get_args(Norm))


def _are_attacks(value: object) -> bool:
    """Whether these are names of attacks, with arguments or without, as suites write them."""
    return isinstance(value, tuple) and all(isinstance(name, str) and _reads(name) for name in value)


def _are_parameters(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _reads(name: str) -> bool:
    try:
        return bool(Spec.parse(name))
    except ConfigError:
        return False


def _is_radius(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


ANY: Declarations = {
    "version": Declaration("1", _whole),
    "paper": Declaration('"Who, when, where"', lambda value: isinstance(value, str)),
}
ATTACKER: Declarations = {"access": one_of(Access, required=True), **ANY}
LEARNER: Declarations = {
    **ATTACKER,
    "sources": Declaration('("resnet20(weights=FILE)",), the model it starts from',
                           lambda value: isinstance(value, tuple)),
    "source_classes": Declaration("100, or as many as its source tells apart",
                                  lambda value: value is None or _whole(value)),
}  # fmt: skip
ATTACK: Declarations = {
    **ATTACKER,
    "norms": Declaration('frozenset({"linf"}), or what it works in', _are_norms, required=True),
    "rules": Declaration("Rules(minimal=True), or another of bench.oracle.Rules",
                         lambda value: isinstance(value, Rules)),
    "batch_dependent": _yes_or_no(),
    "whole_set": _yes_or_no(),
    "rescaled": _yes_or_no(),
    "top_scores": _yes_or_no(),
    "fine_scores": _yes_or_no(),
    "most_queries": Declaration("1000, or as many as it asks at most", _whole),
    "check": Declaration("a method check(classes, shape)", callable),
    "most_images": Declaration("5000, or as many training images as it is fitted on at most", _whole),
    "fit": Declaration("a method fit(model, data, threat, job)", callable),
    "apply": Declaration("a method apply(x, threat, fitted)", callable),
    "sources": Declaration('("resnet20", "cnn"), the models it works on', lambda value: isinstance(value, tuple)),
    "replays": Declaration('"apgd", the attack whose examples it takes', lambda value: isinstance(value, str)),
}  # fmt: skip
CERTIFIER: Declarations = {
    **ATTACKER,
    "norm": one_of(Norm, required=True),
    "draws": Declaration("1000, or as many forward passes as an image costs", _whole, required=True),
    "predict": Declaration("a method predict(network, x, rng, batch, draws, alpha)", callable, required=True),
    "soften": Declaration("a method soften(network, x, rng, draws)", callable, required=True),
}
DEFENSE: Declarations = {"stage": one_of(Stage, required=True), **ANY}
TRAINING_DEFENSE: Declarations = {
    **DEFENSE,
    "trains": Declaration('"two-layer", the one model that it can train', lambda value: isinstance(value, str)),
    "check": Declaration("a method check(classes, shape)", callable),
}
OUTPUT_DEFENSE: Declarations = {
    **DEFENSE,
    "random": Declaration("False, or True where it is called with random numbers", _yes_or_no().fits, required=True),
    "batch_dependent": _yes_or_no(),
    "stateful": _yes_or_no(),
    "by_sample": _yes_or_no(),
    "needs_batch_norm": _yes_or_no(),
    "outside": _yes_or_no(),
    "knows": Declaration('("decode-square", "square(loss=dlr)"), the attacks that know it', _are_attacks),
    "fit": Declaration("a method fit(model, data, job)", callable),
    "serving": Declaration('("random",), the parameters that its fit does not depend on', _are_parameters),
}
DATA_DEFENSE: Declarations = {
    **DEFENSE,
    "norm": one_of(Norm, required=True),
    "eps": Declaration("8 / 255, or the radius that it keeps to", _is_radius, required=True),
    "needs_classes": _yes_or_no(),
}
ATTACKING: Mapping[object, Declarations] = {"training-data": LEARNER, "certificate": CERTIFIER}
DEFENSES: Mapping[object, Declarations] = {
    "output": OUTPUT_DEFENSE, "training": TRAINING_DEFENSE, "data": DATA_DEFENSE,
}  # fmt: skip


def of_attack(component: object) -> Declarations:
    """What ``component``, an attack or its class, declares; learners and certifiers are told by their access."""
    return ATTACKING.get(getattr(component, "access", None), ATTACK)


def of_defense(component: object) -> Declarations:
    """What ``component``, a defense or its class, declares at its stage."""
    return DEFENSES.get(getattr(component, "stage", None), TRAINING_DEFENSE)


def fault(component: object, declarations: Declarations) -> str:
    """What is wrong with the declarations of ``component`` or, as far as it tells, of a class; empty if nothing."""
    owner = component if isinstance(component, type) else type(component)
    parameters = {field.name for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    said = {name: value for kind in reversed(owner.__mro__[:-1]) for name, value in vars(kind).items()
            if name not in parameters}  # fmt: skip
    untold = parameters if component is owner else set()  # what only a component that has been made can tell
    return next(chain(_strange(said, declarations), _unfit(component, untold, declarations)), "")


def _strange(said: Mapping[str, object], declarations: Declarations) -> Iterator[str]:
    """Complaints about what a class says beside its declarations, and means to be one."""
    for name, value in said.items():
        if name.startswith("_") or name in declarations:
            continue
        if "rules" in declarations and name in RULES:
            yield f"declares {name} by itself; write rules = Rules({name}=True), with Rules from bench.oracle"
        missing = [] if callable(value) else [other for other in declarations if other not in said]
        if meant := "rules" if isinstance(value, Rules) else nearest(name, missing, cutoff=0.8):
            yield f"declares {name}; did you mean {meant!r}?"


def _unfit(component: object, untold: Collection[str], declarations: Declarations) -> Iterator[str]:
    """Complaints about declarations that are missing or hold what cannot be."""
    for name, declaration in declarations.items():
        value = getattr(component, name, None)
        if name in untold or isinstance(value, property):
            continue
        if not hasattr(component, name):
            if declaration.required:
                yield f"does not declare {name}; add {name} = {declaration.example}"
        elif not declaration.fits(value):
            yield f"declares {name} = {value!r}; write {name} = {declaration.example}"


def is_entangled(*components: object) -> bool:
    """Whether what comes of a sample depends on which others are there, under an attack and defenses like these."""
    return any(
        getattr(part, "batch_dependent", False)
        or (getattr(part, "stateful", False) and not getattr(part, "by_sample", False))
        for part in components
    )
