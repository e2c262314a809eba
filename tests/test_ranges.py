"""Arguments that cannot be meant are refused before anything runs, whichever component takes them."""

import dataclasses
from typing import Annotated, Literal, get_type_hints

import pytest
from pydantic import Field

from bench.errors import ConfigError
from bench.ranges import LARGEST, Count, Positive, convert
from bench.registry import REQUIRED, attacks, datasets, defenses, models, parameters

REGISTRIES = (attacks, defenses, models, datasets)
NAMES = [(registry, name) for registry in REGISTRIES for name in registry.names() if not name.endswith(":")]
FIELDS = [
    (registry, name, field.name, hint)
    for registry, name in NAMES
    if dataclasses.is_dataclass(factory := registry.factory(name))
    for field in dataclasses.fields(factory)
    if (hint := get_type_hints(factory, include_extras=True)[field.name]) and field.init
]


def takes(hint, kind):
    try:
        return type(convert(kind(1), hint)) is kind
    except ValueError:
        return False


def refused(registry, name, field, value):
    given = {"path": "x", "url": "https://example.org", "sigma": "1", "from": "cnn"}
    known = parameters(registry.factory(name))
    needed = "".join(f"{key}={given[key]}, " for key in known if known[key] == REQUIRED and key != field)
    try:
        registry.create(f"{name}({needed}{field}={value})")
    except ConfigError as error:
        return field in str(error) and "\n" not in str(error)
    return False


@pytest.mark.parametrize(("registry", "name"), NAMES, ids=lambda value: getattr(value, "kind", value))
def test_every_default_is_in_its_range(registry, name):
    factory = registry.factory(name)
    hints = get_type_hints(factory, include_extras=True)
    for field in dataclasses.fields(factory):
        if field.init and field.default is not dataclasses.MISSING:
            assert convert(field.default, hints[field.name]) == field.default


@pytest.mark.parametrize("value", ["1e999", "-1e999", "(1e999-1e999)", "True"])
def test_no_float_of_any_component_is_infinite_or_true(value):
    floats = [(registry, name, field) for registry, name, field, hint in FIELDS if takes(hint, float)]
    assert len(floats) > 50
    wrong = [(name, field) for registry, name, field in floats if not refused(registry, name, field, value)]
    assert wrong == []


@pytest.mark.parametrize("value", ["-1", "True", str(10**25)])
def test_no_whole_number_of_any_component_is_negative_true_or_huge(value):
    whole = [(registry, name, field) for registry, name, field, hint in FIELDS if takes(hint, int)]
    assert len(whole) > 30
    wrong = [(name, field) for registry, name, field in whole if not refused(registry, name, field, value)]
    assert wrong == []


@pytest.mark.parametrize("spec", [
    "pgd-at(epochs=0)", "pgd-at(lr=nan)", "pgd-at(eps=nan)", "pgd-at(eps=2)", "rnd(sigma=inf)", "aaa-linear(step=0)",
    "tap(shift=-1)", "em(batch_size=0)", "rem(lr=0)", "em-ops(rounds=0)",
])  # fmt: skip
def test_what_training_and_defenses_cannot_use(spec):
    with pytest.raises(ConfigError):
        defenses.create(spec.replace("nan", "(1e999-1e999)").replace("inf", "1e999"))


@pytest.mark.parametrize("spec", [
    "standard(epochs=0)", "standard(lr=-1)", "standard(batch_size=0)", "standard(weight_decay=-1)", "cutout(lr=0)",
    "orthogonal-projection(linear_epochs=0)", "pgd(rel_step=-1)", "eot-square(draws=1000000)",
])  # fmt: skip
def test_what_attacks_and_learners_cannot_use(spec):
    with pytest.raises(ConfigError):
        attacks.create(spec)


def test_a_network_that_no_memory_holds_is_refused_before_it_is_built():
    with pytest.raises(ConfigError, match="width is 99999999; input should be less than or equal to 4096"):
        models.create("cnn(width=99999999)")


def test_values_become_what_the_field_asks_for():
    assert convert(1, float) == 1.0
    assert convert(True, bool | None) is True
    assert convert("tuned", float | Literal["tuned"]) == "tuned"
    assert convert(float("inf"), Annotated[float, Field(allow_inf_nan=True)]) == float("inf")
    for value, hint in [(True, int), (True, Count | None), (0, Count), (LARGEST + 1, int), (float("nan"), Positive)]:
        with pytest.raises(ValueError, match=r"expected|should be"):
            convert(value, hint)
