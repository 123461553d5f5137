"""What a user can do wrong: one exception type, one clear line each."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: a wrong name, a broken file, a machine without what was asked for.

    The message is one line that names the thing and, where there is one, the mend.
    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class ReportedByOtherRank(UserError):
    """A UserError that another rank of the run tells of: this one ends without a word."""


class RankFailure(UserError):
    """The other ranks of the run are gone, or hang: the run can go on from its last checkpoint."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, "try again"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The tail of an error message: `` (did you mean 'adamw'?)``, or the empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(f"{purpose} needs {package}, which is not installed: pip install 'gpt2[{extra}]'")
