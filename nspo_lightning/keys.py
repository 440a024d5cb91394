"""Keys stay in the environment: a setting names the variable, and one that seems to hold a key itself is refused.

A configuration is saved with every run and shown in TensorBoard, so none of these messages repeats what it refuses.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlparse

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CURE = "A configuration is saved with every run, so keys stay in the environment (`export NAME=...`, `api_key_env`)."
_CREDENTIALS = {"accesstoken", "apikey", "authorization", "password", "secret", "token", "xapikey"}
_LONG_FOR_A_NAME = 20


def check_key_name(option: str, name: str) -> None:
    """Refuse what is no name of an environment variable.

    Args:
        option: The setting's name, for the message.
        name: Its value.

    Raises:
        ValueError: If it can't be a name, or looks like a key (long, of small letters and digits) and no variable is
            called so.
    """
    looks_like_a_key = len(name) >= _LONG_FOR_A_NAME and re.search("[a-z]", name) and re.search("[0-9]", name)
    if not _NAME.fullmatch(name) or (looks_like_a_key and name not in os.environ):
        raise ValueError(
            f"`{option}` must be the name of an environment variable, such as OPENAI_API_KEY, and what is given is "
            f"none. If it was the key itself: {_CURE}"
        )


def check_address(option: str, address: str) -> None:
    """Refuse what is no address of a server, or one that carries a password or a query.

    Args:
        option: The setting's name, for the message.
        address: Its value.

    Raises:
        ValueError: If it is none.
    """
    url = urlparse(address)
    if url.username or url.password or url.query:
        raise ValueError(f"`{option}` carries a name or password, or a query: leave that out. {_CURE}")
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise ValueError(f"`{option}` must be an address such as http://localhost:8000/v1, got {address!r}.")


def check_no_key(option: str, value: Any) -> None:
    """Refuse credentials among free settings.

    Args:
        option: The setting's name, for the message.
        value: Its value; dictionaries and lists are searched at all depths.

    Raises:
        ValueError: If a field is called `api_key`, `Authorization` or the like.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            if re.sub("[^a-z]", "", str(name).lower()) in _CREDENTIALS:
                raise ValueError(f"`{option}` holds a field called {name!r}: leave it out. {_CURE}")
            check_no_key(option, inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_no_key(option, inner)
