"""Images and labels: what a data set is, and one file for each place it can come from."""

from bench.data.dataset import Dataset, Split

__all__ = ["Dataset", "Split"]
