"""Names with arguments: what is read, what is refused, and that writing gives the same component back."""

import pytest

from bench.errors import ConfigError
from bench.spec import Spec, parse_chain


@pytest.mark.parametrize(
    ("text", "name", "args"),
    [
        ("square", "square", {}),
        ("  square( ) ", "square", {}),
        ("square(p_init=0.3, preset=aaa)", "square", {"p_init": 0.3, "preset": "aaa"}),
        ("pgd-at(eps=8/255)", "pgd-at", {"eps": 8 / 255}),
        ("rnd(clip=false)", "rnd", {"clip": False}),
        ("rnd(clip=True)", "rnd", {"clip": True}),
        ("a(x=None, y=-1)", "a", {"x": None, "y": -1}),
        ("a(sizes=[1, 2], name='b, c')", "a", {"sizes": [1, 2], "name": "b, c"}),
        ("npz(path=some/folder/file.npz)", "npz", {"path": "some/folder/file.npz"}),
        ("torchattacks:PGD(steps=10)", "torchattacks:PGD", {"steps": 10}),
        ("mine/attack.py:Mine(k=1)", "mine/attack.py:Mine", {"k": 1}),
        ("my dir/attack.py:Mine", "my dir/attack.py:Mine", {}),
        ("my dir/attack.py:Mine(k=1)", "my dir/attack.py:Mine", {"k": 1}),
        ("'a (1) + b/attack.py:Mine'(k=1)", "a (1) + b/attack.py:Mine", {"k": 1}),
        ('"it\'s/attack.py:Mine"', "it's/attack.py:Mine", {}),
        ("C:/mine/attack.py:Mine", "C:/mine/attack.py:Mine", {}),
        ("a(b='2', c='1.10', d='true', e='1/2')", "a", {"b": "2", "c": "1.10", "d": "true", "e": "1/2"}),
        ("tap(network='my dir/net.py:build(k=1)')", "tap", {"network": "my dir/net.py:build(k=1)"}),
    ],
)
def test_a_name_and_its_arguments_are_read(text, name, args):
    spec = Spec.parse(text)
    assert spec == Spec(name, args)
    assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "cannot read ''"),
        ("two words", "two words"),
        ("square(", "write name or name"),
        ("square)", "write name or name"),
        ("square(0.3)", "cannot read '0.3'"),
        ("square(p_init=)", "p_init="),
        ("square(p init=1)", "p init=1"),
        ("square(p_init=1, p_init=2)", "gives 'p_init' twice"),
    ],
)
def test_anything_else_is_refused_with_its_text(text, complaint):
    with pytest.raises(ConfigError, match=r"cannot read|twice") as refusal:
        Spec.parse(text)
    assert complaint in str(refusal.value)


def test_a_path_that_cannot_be_read_as_it_is_earns_a_word_about_quotes():
    for text in ("a (1)/mine.py:Mine(k=1)", "a (1)/mine.py"):
        with pytest.raises(ConfigError, match=r"in quotes of its own: \"'my \(dir\)/file.py:Name'\(key=value\)"):
            Spec.parse(text)


def test_a_path_in_quotes_stands_in_a_chain():
    assert [part.name for part in parse_chain("'a + b/d.py:D'(k=1) + rnd")] == ["a + b/d.py:D", "rnd"]


def test_a_chain_is_cut_at_plus_signs_outside_of_arguments():
    chain = parse_chain("pgd-at(eps=0.1) + rnd(name='a + b')")
    assert [str(spec) for spec in chain] == ["pgd-at(eps=0.1)", "rnd(name='a + b')"]
    assert parse_chain("none") == ()


@pytest.mark.parametrize("text", ["", " + ", "none + rnd"])
def test_a_chain_without_a_meaning_is_refused(text):
    with pytest.raises(ConfigError, match="none"):
        parse_chain(text)


def test_whole_grey_levels_are_written_as_people_write_them():
    for text in ("sep(eps=2/255)", "sep(eps=0.2)", "rnd(sigma=0.02)", "tap(eps=32/255, rel_step=0.05)"):
        assert str(Spec.parse(text)) == text
        assert Spec.parse(str(Spec.parse(text))) == Spec.parse(text)


def test_a_very_long_name_is_refused_in_a_short_line():
    with pytest.raises(ConfigError, match="100,000 characters") as caught:
        Spec.parse("a" * 100_000)
    assert len(str(caught.value)) < 200
