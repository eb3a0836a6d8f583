"""From errors to exit codes, and to names that programs can rely on."""

import re

import click

from tailorstore.domain.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ConflictError,
    IntegrityError,
    InvalidInputError,
    MissingDependencyError,
    NotFoundError,
    TailorError,
    UnavailableError,
    VersionError,
)

OK = 0
UNEXPECTED = 1
USAGE = 2
NOT_FOUND = 3
REFUSED = 4
BROKEN = 5
UNAVAILABLE = 6
INTERRUPTED = 130
"""As a shell reports a program that ended by SIGINT."""
PIPE_CLOSED = 141
"""As a shell reports a program that ended by SIGPIPE."""
TERMINATED = 143
"""As a shell reports a program that ended by SIGTERM."""

EXIT_CODES = (
    (OK, "done"),
    (UNEXPECTED, "an error that should not happen"),
    (USAGE, "wrong usage or invalid input; a package is missing"),
    (NOT_FOUND, "store, bucket, ref or layer not found"),
    (REFUSED, "refused: a name is taken, access denied, another catalog owns the root, another version made it"),
    (BROKEN, "broken: stored data is missing or damaged, or verify found damage"),
    (UNAVAILABLE, "storage or catalog cannot be reached, or storage is full; try again"),
    (INTERRUPTED, "interrupted (Ctrl-C)"),
    (TERMINATED, "terminated (SIGTERM)"),
)
"""What ``tailorstore --help`` says of them."""

_BY_ERROR: tuple[tuple[type[TailorError], int], ...] = (
    (NotFoundError, NOT_FOUND),
    (InvalidInputError, USAGE),
    (MissingDependencyError, USAGE),
    (AlreadyExistsError, REFUSED),
    (ConflictError, REFUSED),
    (AccessDeniedError, REFUSED),
    (VersionError, REFUSED),
    (IntegrityError, BROKEN),
    (UnavailableError, UNAVAILABLE),
)


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error.

    Examples:
        >>> exit_code(NotFoundError("no tag 'best'")), exit_code(ZeroDivisionError())
        (3, 1)
    """
    if isinstance(error, click.ClickException):
        return USAGE
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), UNEXPECTED)


def error_kind(error: BaseException) -> str:
    """Return the name under which ``--json`` reports an error: that of its class, in snake case.

    Examples:
        >>> error_kind(AlreadyExistsError("tag")), error_kind(ZeroDivisionError()), error_kind(click.UsageError("?"))
        ('already_exists', 'unexpected', 'usage')
    """
    if isinstance(error, click.ClickException):
        return "usage"
    if not isinstance(error, TailorError):
        return "unexpected"
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<=.)(?=[A-Z])", "_", name).lower()
