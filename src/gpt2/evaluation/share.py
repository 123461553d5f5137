"""How the work of an evaluation is shared by the ranks of a process group."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Share:
    """This process among those that evaluate together; the defaults mean one process.

    all_gather: a collective that returns every rank's value, in the order of the ranks.
    """

    rank: int = 0
    size: int = 1
    all_gather: Callable[[Any], list[Any]] = _alone
