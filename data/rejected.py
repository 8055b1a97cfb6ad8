"""Samples that cannot be used: why, and how many."""

from collections import Counter
from collections.abc import Iterable

from lightning_semgen.errors import UserError

ENOUGH = 200  # samples, before which a share says little


class Rejected(Exception):
    """Why a sample cannot be used; its text is the cause that is counted."""


class RejectionCount:
    """Samples seen, and rejected ones by cause."""

    def __init__(self) -> None:
        self.seen, self.causes = 0, Counter()

    def add(self, used: int, rejected: Iterable[tuple[str, str]]) -> None:
        """Counts samples that were used, and the (key, cause) of others."""
        causes = [cause for _, cause in rejected]
        self.seen += used + len(causes)
        self.causes.update(causes)

    def __add__(self, other: "RejectionCount") -> "RejectionCount":
        both = RejectionCount()
        both.seen, both.causes = self.seen + other.seen, self.causes + other.causes
        return both

    def check(self, max_share: float) -> None:
        """UserError with the causes where more than a share of the samples were rejected."""
        bad = self.causes.total()
        if bad > max_share * max(self.seen, ENOUGH):
            table = "\n".join(f"{count:>8,}  {cause}" for cause, count in self.causes.most_common())
            raise UserError(
                f"{bad:,} of {self.seen:,} samples were rejected, more than data.max_bad_share {max_share:g} allows:\n"
                + table
            )
