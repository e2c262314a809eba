"""Sizes checked before memory is asked for, as a file can claim any."""

import os

from bench.errors import DataError


def check_memory(size: int, what: str) -> None:
    """Whether ``size`` bytes for ``what`` (a plural) fit into this machine.

    Raises:
        DataError: they are more than its whole memory.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > whole:
        raise DataError(
            f"{what} take {size / 1e9:,.1f} GB, and this machine has {whole / 1e9:,.1f} GB of memory; "
            "take fewer or smaller ones"
        )
