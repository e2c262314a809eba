"""Users' own files, ``path/to/file.py:Name``: how they are loaded, and the hash that tells one version from the next.

A file's folder comes first on its import path, in what it imports at once and in what its functions import later; the
modules of two folders never meet, whatever their names. The hash is of the file and of every local module that any
import statement in it can reach, through the others too, executed or not. What is imported under a computed name is
not seen.
"""

import ast
import builtins
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from hashlib import sha256
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bench.errors import ConfigError, RefereeError
from bench.system.interrupt import Stopped

PREFIX = "bench_user_"  # of the packages that stand for users' folders
DIGITS = 12  # of a hash


def named_file(name: str) -> tuple[Path, str] | None:
    """The file and what is named in it, where ``name`` is ``path/to/file.py:Name``; "" where no name follows."""
    path, mark, inside = name.rpartition(".py:")
    if not mark and name.endswith(".py"):
        return Path(name), ""
    return (Path(f"{path}.py"), inside) if mark else None


def local_hash(file: Path) -> str:
    """A hash of the code of ``file`` and of all local code that it can import; the path is no part of it."""
    file = _placed(file)
    digest = sha256(file.read_bytes())
    for path in sorted(local_files(file) - {file}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(file.parent).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:DIGITS]


def joint_hash(files: Iterable[Path]) -> str:
    """One hash of several files, of the code in them with all that it can import; the order does not matter."""
    hashes = sorted(
        local_hash(file) if file.suffix == ".py" else sha256(file.read_bytes()).hexdigest() for file in files
    )
    return hashes[0][:DIGITS] if len(hashes) == 1 else sha256(" ".join(hashes).encode()).hexdigest()[:DIGITS]


def load(file: Path) -> ModuleType:
    """The module in ``file``, executed once for each version of its code.

    Raises:
        ConfigError: it does not import, or replaces code that all cells share.
    """
    from bench.system.shared_code import shared_code  # only here: who names no file needs no torch

    package = package_of(file)
    name = f"{package}.{file.stem.replace('.', '_')}"
    _ROOTS[package] = _placed(file)
    if name in sys.modules:
        return sys.modules[name]
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    folder = ModuleType(package)
    folder.__path__ = [str(_placed(file).parent)]
    sys.modules[package] = folder
    spec = spec_from_file_location(name, file, loader=_Loader(name, str(file)))
    assert spec is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        with shared_code() as code:
            _Loader(name, str(file)).exec_module(module)
            code.check(str(file))
    except BaseException as error:  # sys.exit among it
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == package]:
            del sys.modules[loaded]
        if isinstance(error, Stopped | KeyboardInterrupt):
            raise
        if isinstance(error, RefereeError):
            raise ConfigError(str(error)) from None
        raise ConfigError(f"{file} does not import: {type(error).__name__}: {error}") from error
    return module


def package_of(file: Path) -> str:
    """The name of the package that stands for the folder of ``file``, which has the place and the code in it."""
    where = sha256(f"{_placed(file)} {local_hash(file)}".encode()).hexdigest()[:DIGITS]
    return f"{PREFIX}{where}"


_ROOTS: dict[str, Path] = {}  # by package, the file that was loaded


def loaded() -> dict[str, Path]:
    """By the packages that stand for users' folders, the file in each that another process has to :func:`load`."""
    return dict(_ROOTS)


class _Finder:
    """Finds the modules of users' folders, whose packages all begin with PREFIX."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(PREFIX):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


_FINDER = _Finder()


class _Loader(SourceFileLoader):
    """Runs a user's module with import statements that look into its folder first.

    Python looks ``__import__`` up in the builtins of a module, so giving it some of its own changes nothing elsewhere.
    No compiled file is read or written: a quick edit might not be noticed.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _importer(package)}
        super().exec_module(module)


def _importer(package: str) -> Callable[..., ModuleType]:
    """What import statements do in the modules of ``package``, which stands for a user's folder."""
    (folder,) = sys.modules[package].__path__

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        top = name.partition(".")[0]
        if level or not _is_local(top, folder):
            return builtins.__import__(name, globals, locals, fromlist, level)
        module = builtins.__import__(f"{package}.{name}", globals, locals, fromlist, 0)
        return module if fromlist else getattr(module, top)  # as Python defines it

    return import_


def _is_local(top: str, folder: str) -> bool:
    """Whether ``import top`` means a module in ``folder``; a mere folder of that name yields to a real module."""
    spec = PathFinder.find_spec(top, [folder])
    if spec is None:
        return False
    if top in _benchmark():
        return not _same_file(spec.origin, getattr(sys.modules.get(top), "__file__", None))  # in a checkout it may be
    return spec.origin is not None or (other := PathFinder.find_spec(top)) is None or other.origin is None


def _same_file(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


@cache
def _benchmark() -> frozenset[str]:
    """The packages of the benchmark and its plug-ins, which users' files import from anywhere."""
    return frozenset({"bench", *(plugin.module.partition(".")[0] for plugin in entry_points(group="bench.plugins"))})


def _placed(file: Path) -> Path:
    """``file`` by the true path of its folder."""
    return file.parent.resolve() / file.name


def local_files(file: Path) -> set[Path]:
    """``file`` and every file of its folder that its import statements can reach, by the true path of the folder."""
    importlib.invalidate_caches()  # one of them may be new
    file = _placed(file)
    root = file.parent
    found: set[Path] = set()
    todo = [file]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            within = path.parent.relative_to(root).parts
            for level, name in _imports(path.read_bytes()):
                if level == 0 and not _is_local(name.partition(".")[0], str(root)):
                    continue
                package = within[: len(within) - level + 1] if level else ()
                todo += _files_of((*package, *filter(None, name.split("."))), root)
    return found


def _files_of(parts: Sequence[str], root: Path) -> Iterator[Path]:
    """The files that importing the module ``parts`` below ``root`` executes, as far as there are any."""
    folder = root
    for position, part in enumerate(parts):
        if part == "*":  # a package may import all that is in it
            yield from sorted(folder.glob("*.py"))
            return
        spec = PathFinder.find_spec(".".join(parts[: position + 1]), [str(folder)])
        if spec is None:
            return
        if spec.origin is not None:
            yield Path(spec.origin)
        folder /= part


@lru_cache(maxsize=1024)
def _imports(source: bytes) -> tuple[tuple[int, str], ...]:
    """Every module that an import statement in ``source`` names, as (dots before it, its name)."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # whoever loads it will hear of that
        return ()
    named: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named += [(node.level, f"{node.module or ''}.{alias.name}".lstrip(".")) for alias in node.names]
    return tuple(named)

