"""What attacks share that lower one of several losses of the scores."""

from bench.losses import check_classes


class Scored:
    """Lowers ``loss``: ``margin``, ``ce`` (the log-likelihood), ``prob``, or ``dlr``, which no scale of scores moves.

    A defense that scales its scores anew at each query makes the others hard to compare, and no weaker a network.
    """

    loss: str | None

    @property
    def top_scores(self) -> bool:
        """Whether it does with the scores of the best classes: dlr sees the third."""
        return self.loss != "dlr"

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the data have the classes that the loss compares."""
        check_classes(self.loss or "", classes)
