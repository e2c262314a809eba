"""What an attack asks the referee to do otherwise, and what that makes of it; how hits are written down."""

from dataclasses import dataclass

NEVER = -1  # first hit of a sample that no query beat


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an attack declares to its referee: ``rules: ClassVar[Rules] = Rules(minimal=True)``.

    Args:
        minimal: it looks for the nearest misclassified image. Its queries may leave the ball, not the box; a
            misclassified one outside the ball is answered and sets ``best_distance``, and only one inside is a hit.
        roams: it asks outside the ball to find something out, and not how near the boundary is. Its queries may leave
            the ball as those of ``minimal`` may, and no distance is kept of them.
        lookahead: a white-box attack looks where it does not go. Its queries may leave the ball and the box; only one
            inside both can be a hit.
        averages: the k queries of a call are draws of its first image, whatever the others show, and are judged
            together: by the mean of the logits that were answered, k or as many as the budget leaves.
        alone: forward the queries of each row as a batch of their own, for an attack on defenses that couple a batch.
            What a row is answered then depends on its own queries alone; it costs a forward pass for each row.
        surrogate: it works on the undefended network, found at ``oracle.surrogate``, or on the networks that it names
            in ``sources``, which are then found there.
    """

    minimal: bool = False
    roams: bool = False
    lookahead: bool = False
    averages: bool = False
    alone: bool = False
    surrogate: bool = False

    @property
    def beyond(self) -> bool:
        """Whether its queries may leave the ball."""
        return self.minimal or self.roams or self.lookahead

    @property
    def control(self) -> bool:
        """Whether it stands beside the attacks and in no worst case: no attacker of a service has that network.

        An attack that names ``sources`` works on networks that anybody can have, and is none.
        """
        return self.surrogate


COMMON = Rules()  # of an attack that declares none


def rules_of(attack: object) -> Rules:
    """What ``attack`` declares, which the registry has looked at; the common rules where it declares none."""
    rules: Rules = getattr(attack, "rules", COMMON)
    return rules
