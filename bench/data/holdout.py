"""How many training images are put aside for calibration, and the folder that sources read from."""

from pathlib import Path

from bench.dataset import Split
from bench.errors import DataError
from bench.system.files import reachable


def held_out(n: int) -> int:
    """How many of ``n`` training images go to calibration: a tenth, at most 1,000."""
    return min(1000, n // 10)


def hold_out(train: Split) -> tuple[Split, Split]:
    """``train`` without its last images, and those images as the calibration split."""
    kept = len(train) - held_out(len(train))
    return train.subset(slice(kept)), train.subset(slice(kept, None))


def require_folder(data_dir: Path | None, name: str) -> Path:
    """``data_dir``, which must be a folder.

    Raises:
        DataError: none was given, or it is no folder.
    """
    if data_dir is None:
        raise DataError(f"{name} needs a folder of data sets; give --data-dir or set BENCH_DATA_DIR")
    if not reachable(data_dir, Path.is_dir):
        raise DataError(f"{name}: {data_dir} is not a folder; give --data-dir or set BENCH_DATA_DIR to one that exists")
    return data_dir


def find(path: str, data_dir: Path | None, name: str) -> Path:
    """``path`` as given (from the working directory), or else below ``data_dir``.

    Raises:
        DataError: neither exists; both are named.
    """
    places = [Path(path).expanduser()]
    if data_dir is not None:
        places.append(data_dir / path)
    for place in places:
        if reachable(place):
            return place
    looked = " or ".join(dict.fromkeys(str(place) for place in places))
    raise DataError(f"{name}: no {looked}; check path, or give its folder with --data-dir or BENCH_DATA_DIR")
