"""Servers and functions that others run: addresses, keys, when to ask again, and how long to wait by default."""

import math
import os

from rlhf.core.errors import ConfigError

TIMEOUT_SECONDS = 60.0
"""What an answer may take."""
CONCURRENCY = 32
"""What is asked at once."""
PATIENCE_SECONDS = 600.0
"""What servers may be away or full for."""


def check_address(name: str, url: str, *, example: str = "http://127.0.0.1:8000") -> None:
    """Refuse what is no address of a server, or holds more than that.

    Args:
        name: of the setting, for the message.
        url: the address. It is not shown where it may hold a secret.
        example: an address of that kind.
    Raises:
        ValueError: naming the setting.
    """
    import httpx

    try:
        parsed = httpx.URL(url)
        is_server = parsed.scheme in ("http", "https") and bool(parsed.host)
        is_server = (
            is_server and (parsed.port or 1) < 2**16 and not (parsed.userinfo or parsed.query or parsed.fragment)
        )
    except (httpx.InvalidURL, TypeError):
        is_server = False
    if not is_server:
        shown = name if any(mark in url for mark in "@?#") else f"{name} = {url if url.isprintable() else repr(url)}"
        raise ValueError(
            f"{shown}: expected the address of a server, such as {example}, without user, password and query"
        )


def key_in(variable: str) -> str | None:
    """The key of a server in an environment variable; ``None`` where it is not set, or empty.

    Raises:
        ConfigError: as :func:`checked_key`.
    """
    given = os.environ.get(variable, "").strip()
    return checked_key(given, variable) if given else None


def checked_key(given: str, origin: str) -> str:
    """A key that a header can hold, without blanks around it.

    Raises:
        ConfigError: naming ``origin``, if it is empty or no plain text. The key itself is not shown.
    """
    key = given.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{origin}: expected a key of letters, digits and signs, without spaces and ends of lines; found "
            f"{len(key)} characters"
        )
    return key


def retry_after(header: str | None) -> float:
    """Seconds that a server asks to be left alone for; 0 where it names none that can be waited for, or a date."""
    try:
        seconds = float(header or "0")
    except ValueError:
        return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
