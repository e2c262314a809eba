"""The tracks: what differs between attacks on served models, certificates and attacks on released data, a file for
each.

A new track is a file here and an entry in :data:`TRACKS`.
"""

from bench.plan.cell import Cell
from bench.tracks.certificate import Certificate
from bench.tracks.data import Data
from bench.tracks.query import Query
from bench.tracks.track import Contested, Progress, Tools, Track
from bench.tracks.white_box import WhiteBox

__all__ = ["TRACKS", "Contested", "Progress", "Tools", "Track", "track_of"]

TRACKS: tuple[Track, ...] = (Query(), WhiteBox(), Certificate(), Data())  # in the order of their tables


def track_of(cell: Cell) -> Track:
    """The track of a cell."""
    return next(track for track in TRACKS if cell.threat.access in track.accesses)
