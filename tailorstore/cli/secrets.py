"""Which parts of what was typed are secret, and how they are kept out of everything that is printed."""

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote, urlsplit

HIDDEN = "***"

_SECRET_NAME = re.compile(r"key|secret|token|pass|credential|sas|signature|auth|connection_string", re.IGNORECASE)
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD")
_SHORTEST = 4
"""Shorter texts stand in too many innocent words to be replaced."""


def is_secret_name(name: str) -> bool:
    """Tell whether the value of an option of this name must not be shown.

    Examples:
        >>> is_secret_name("aws_secret_access_key"), is_secret_name("endpoint_url")
        (True, False)
    """
    return _SECRET_NAME.search(name) is not None


def secrets_in(urls: Mapping[str, str | None], options: Mapping[str, object]) -> tuple[str, ...]:
    """Return every secret text in some URLs, storage options and the environment, the longest first."""
    found = {text for url in urls.values() if url for text in _in_url(url)}
    found.update(_in_options(options))
    found.update(os.environ.get(name, "") for name in _SECRET_VARIABLES)
    return tuple(sorted((text for text in found if len(text) >= _SHORTEST), key=len, reverse=True))


def scrub(text: str, secrets: tuple[str, ...]) -> str:
    """Return a text without the secrets."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def _in_url(url: str) -> Iterator[str]:
    for link in url.split("::"):
        try:
            parts = urlsplit(link)
        except ValueError:
            continue
        user, at, _ = parts.netloc.rpartition("@")
        if at:
            password = user.partition(":")[2]
            yield from (password, unquote(password))
        for pair in parts.query.split("&"):
            name, _, value = pair.partition("=")
            if is_secret_name(name):
                yield from (value, unquote(value))


def _in_options(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _in_options(value)
        elif is_secret_name(name) and not isinstance(value, bool) and value is not None:
            yield str(value)
