"""What components say, kept for those who make none: the same as an import says, and never older than the code."""

import pytest

from bench import catalogue
from bench.catalogue import REGISTRIES, declared, defaults, described, facts, keep, listed
from bench.errors import StoreError
from bench.registry import attacks, defenses


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file that :func:`keep` has written, read by a process that has imported nothing."""
    monkeypatch.setenv("BENCH_CACHE_DIR", str(tmp_path))
    keep()
    live = {registry.kind: dict(listed(registry)) for registry in REGISTRIES}

    class Unloaded:
        @staticmethod
        def cache_info():
            return type("Info", (), {"currsize": 0})

        def __call__(self):
            raise AssertionError("imports the plug-ins")

    catalogue._remembered.cache_clear()
    monkeypatch.setattr(catalogue, "load_plugins", Unloaded())
    yield live
    catalogue._remembered.cache_clear()


def test_what_is_kept_is_what_the_components_say(kept):
    assert {registry.kind: dict(listed(registry)) for registry in REGISTRIES} == kept
    assert declared(attacks, "transfer(from=cnn)", "control", False) is True
    assert declared(attacks, "square(", "control", True, True) is False, "a row cannot say of ours what it is not"
    assert declared(attacks, "theirs.py:A", "control", False, True) is True
    assert declared(defenses, "aaa-linear(x)", "stage", "", "data") == "output"
    assert defaults(attacks, "pgd")["steps"] == 40
    assert described(attacks, "square")
    assert not described(attacks, "nobody")
    assert facts(attacks, "nobody") is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"attack": 1}', b'{"attack": {"square": {"x": 1}}}'])
def test_what_is_no_catalogue_is_made_anew(content, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE_DIR", str(tmp_path))
    catalogue._file().parent.mkdir(exist_ok=True)
    catalogue._file().write_bytes(content)
    catalogue._remembered.cache_clear()
    assert catalogue._remembered()["attack"].keys() == set(attacks.names())
    catalogue._remembered.cache_clear()


def test_other_code_has_a_catalogue_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE_DIR", str(tmp_path))
    before = catalogue._file()
    monkeypatch.setattr(catalogue, "code_hash", lambda: "of changed code")
    assert catalogue._file() != before


def test_a_cache_that_cannot_be_written_costs_time_alone(monkeypatch):
    def full(path, content):
        raise StoreError("the disk is full")

    monkeypatch.setattr(catalogue, "keep_file", full)
    assert "square" in keep()["attack"]
