"""Components by name: how they come in, and what a wrong name or argument says."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from bench.declarations import one_of
from bench.errors import ConfigError
from bench.registry import REQUIRED, Registry, added, describe, parameters, plugins

ACCESS = one_of(Literal["scores", "labels"], required=True)


@dataclass(frozen=True)
class Fox:
    """A component with arguments of several types."""

    tails: int = 1
    size: float = 0.5
    coat: Literal["red", "white"] = "red"

    access = "scores"

    def __post_init__(self) -> None:
        if self.tails < 0:
            raise ConfigError(f"tails is {self.tails}; a fox has none or more")

    def __call__(self) -> str:
        return f"{self.tails} {self.coat}"


@dataclass(frozen=True)
class Den:
    path: str
    foxes: list[str] = field(default_factory=list)

    access = "scores"

    def __call__(self) -> str:
        return self.path


@pytest.fixture
def registry() -> Registry[Any]:
    registry: Registry[Any] = Registry("animal", declares=lambda fox: {"access": ACCESS})
    registry("fox")(Fox)
    registry("den")(Den)

    @registry("zoo:")
    @dataclass(frozen=True)
    class Zoo(Fox):
        name: str = ""

        def __init__(self, name: str, tails: int = 1) -> None:
            if name != "wolf":
                raise ConfigError(f"the zoo has no {name!r}")
            object.__setattr__(self, "name", name)
            object.__setattr__(self, "tails", tails)

    return registry


def refusal(registry: Registry[Any], spec: str) -> str:
    with pytest.raises(ConfigError) as caught:
        registry.create(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_component_gets_its_arguments_in_the_types_of_its_fields(registry):
    fox = registry.create("fox(tails=3, size=1, coat=white)")
    assert fox == Fox(3, 1.0, "white")
    assert isinstance(fox.size, float)
    assert describe(fox) == {"tails": 3, "size": 1.0, "coat": "white"}


def test_a_family_gets_what_follows_its_colon(registry):
    wolf = registry.create("zoo:wolf(tails=2)")
    assert (wolf.name, wolf.tails) == ("wolf", 2)
    assert "'bear'" in refusal(registry, "zoo:bear")
    assert "as in zoo:NAME" in refusal(registry, "zoo:")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("fix", "no animal is named 'fix'; did you mean 'fox'?"),
        ("elephant", "no animal is named 'elephant'; known: den, fox, zoo:"),
        ("fox(tail=2)", "animal 'fox' has no parameter 'tail'; did you mean 'tails'?"),
        ("fox(wings=2)", "animal 'fox' has no parameter 'wings'; it takes: tails, size, coat"),
        ("fox(tails=many)", "animal 'fox': tails is 'many'"),
        ("fox(coat=green)", "'red' or 'white'"),
        ("fox(tails=-1)", "animal 'fox': tails is -1; a fox has none or more"),
        ("den", "animal 'den' needs path; write den(path=...)"),
    ],
)
def test_a_mistake_names_the_component_and_the_nearest_remedy(registry, spec, complaint):
    assert complaint in refusal(registry, spec)


def test_a_name_can_be_taken_once(registry):
    with pytest.raises(ConfigError, match="two animals are named 'fox'"):
        registry("fox")(Den)
    assert registry.create("fox") == Fox()


def test_parameters_tell_defaults_from_what_must_be_given(registry):
    assert parameters(Fox) == {"tails": 1, "size": 0.5, "coat": "red"}
    assert parameters(Den) == {"path": REQUIRED, "foxes": []}
    assert registry.names() == ["den", "fox", "zoo:"]


USER_FILE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine:
    legs: int = 4
    access = "scores"
    def __call__(self): return self.legs

class Mute:
    def __call__(self): return 0

class Confused:
    access = "score"
    def __call__(self): return 0

def number(): return 3
"""


def test_a_component_may_live_in_a_file_of_the_user(registry, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USER_FILE)
    assert registry.create(f"{file}:Mine(legs=6)")() == 6
    assert "has no parameter 'leg'; did you mean 'legs'?" in refusal(registry, f"{file}:Mine(leg=6)")
    assert "has no 'Mime'; it defines Mine, Mute, Confused, number" in refusal(registry, f"{file}:Mime")
    assert 'does not declare access; add access = "scores" or "labels"' in refusal(registry, f"{file}:Mute")
    score = refusal(registry, f"{file}:Confused")
    assert score.endswith("""declares access = 'score'; write access = "scores" or "labels" """.strip())
    assert "is a int; return something callable" in refusal(registry, f"{file}:number")
    assert f"as in {file}:Name" in refusal(registry, str(file))


def test_an_edited_file_is_another_component(registry, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USER_FILE)
    before = registry.create(f"{file}:Mine")
    file.write_text(USER_FILE.replace("legs: int = 4", "legs: int = 8"))
    after = registry.create(f"{file}:Mine")
    assert (before.legs, after.legs) == (4, 8)
    assert type(before).__module__ != type(after).__module__


def test_a_file_that_is_missing_or_does_not_import_is_named(registry, tmp_path):
    file = tmp_path / "broken.py"
    assert f"no file '{file}'" in refusal(registry, f"{file}:Mine")
    file.write_text("def broken(:")
    assert f"{file} does not import: SyntaxError" in refusal(registry, f"{file}:Mine")
    file.write_text("import no_such_library")
    assert f"{file} does not import: ModuleNotFoundError" in refusal(registry, f"{file}:Mine")
    assert "does not import" in refusal(registry, f"{file}:Mine"), "a second try must not find half a module"


def test_a_parameter_added_later_leaves_the_keys_of_stored_cells_alone():
    @dataclass(frozen=True)
    class Component:
        old: int = 1
        new: float = added(0.0)

    assert describe(Component()) == {"old": 1}
    assert describe(Component(old=2, new=0.5)) == {"old": 2, "new": 0.5}


def test_a_checkout_that_is_not_installed_has_its_plugins(monkeypatch):
    announced = {plugin.value for plugin in plugins()}
    monkeypatch.setattr("bench.registry.entry_points", lambda group: ())
    found = plugins.__wrapped__()
    assert {plugin.value for plugin in found} == {"attacks", "defenses", "bench.models", "bench.data"} <= announced
    assert all(plugin.load() for plugin in found)


@pytest.mark.parametrize(("code", "complaint"), [
    ("import sys; sys.exit(0)", "does not import: SystemExit: 0"),
    ("import sys\ndef Thing(): sys.exit(0)", "Thing': SystemExit: 0"),
    ("def Thing(): raise RuntimeError('broken')", "Thing': RuntimeError: broken"),
])
def test_a_file_that_ends_the_process_is_a_users_mistake(tmp_path, code, complaint):
    (tmp_path / "leaves.py").write_text(code)
    with pytest.raises(ConfigError, match=complaint):
        Registry("attack").create(f"{tmp_path / 'leaves.py'}:Thing")
