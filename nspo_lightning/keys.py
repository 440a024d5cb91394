"""Keys stay in the environment: a setting names the variable, and one that seems to hold a key itself is refused.

A configuration is saved with every run and shown in TensorBoard, so none of these messages repeats what it refuses.
What a credential is called is said once, by `_CREDENTIAL`.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlparse

_SPECIAL = "(?<!pad_|eos_|bos_|unk_|sep_|cls_)(?<!mask_|stop_)"
_CREDENTIAL = rf"(?:api[-_]?key|authorization|password|secret|access[-_]?token|(?<![a-z]){_SPECIAL}token)"
"""How a credential's name ends, in any case; a tokenizer's special tokens are none."""

_VALUE = re.compile(
    rf"""(?ix) (\b\w*{_CREDENTIAL}\b ['"]?\s*(?:=|,\s*val=)\s*['"]?  # an option with its value
    | (?:\b\w+[-_]|['"]|\b(?!token))\w*{_CREDENTIAL}\b ['"]?\s*:\s*['"]?(?:bearer\s+)?  # a field or a header
    | --\S*{_CREDENTIAL}\b ['"]?,?\s+['"]?) [^\s'",)}}\]]+"""
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CURE = "A configuration is saved with every run, so keys stay in the environment (`export NAME=...`, `api_key_env`)."
_LONG_FOR_A_NAME = 20


def looks_secret(name: str) -> bool:
    """Say whether a thing of this name is to be left out of reports."""
    # Leaving out costs little, so more than credentials counts: any kind of key, and headers, which may hold one.
    in_it = ("key", "token_", "secret", "password", "authorization", "headers")
    return _names_a_credential(name) or any(word in name.lower() for word in in_it)


def mask_keys(text: str) -> str:
    """Blot out the values of options that are called like credentials.

    Args:
        text: A message, which may repeat what a user gave.

    Returns:
        It, with `***` in their place.

    Examples:
        >>> mask_keys("Key 'api_key' is not expected. Given: {'api_key': 'sk-123', 'model': 'm'}")
        "Key 'api_key' is not expected. Given: {'api_key': '***', 'model': 'm'}"
    """
    return _VALUE.sub(r"\1***", text)


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
    if not _VARIABLE.fullmatch(name) or (looks_like_a_key and name not in os.environ):
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
            if _names_a_credential(str(name)):
                raise ValueError(f"`{option}` holds a field called {name!r}: leave it out. {_CURE}")
            check_no_key(option, inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_no_key(option, inner)


def _names_a_credential(name: str) -> bool:
    # As words: accessToken is access_token, and "X API key" is x_api_key.
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")
    return re.search(rf"{_CREDENTIAL}$", words) is not None
