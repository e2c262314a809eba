"""Rows on disk: what they hold, how they are written, how they are read with suspicion."""
