"""Keys stay in the environment: a setting names the variable, and one that seems to hold a key itself is refused.

A configuration is saved with every run and shown in TensorBoard, so none of these messages repeats what it refuses.
What a credential is called is said once, by `_CREDENTIAL`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlparse

_SPECIAL = "(?<!pad_|eos_|bos_|unk_|sep_|cls_)(?<!mask_|stop_)"
_KINDS = (
    "api|access|secret|priv|private|subscription|account|signing|encryption|session|service|client|auth|ssh|license"
    "|openai|anthropic|azure|aws|google|gemini|cohere|mistral|groq|together|hf|hugging_?face|wandb|comet|neptune|swanlab"
)
_CREDENTIAL = (
    rf"(?:(?:{_KINDS})[-_]?keys?(?:[-_]id)?|authori[sz]ation|pass(?:words?|wd?|phrase|code)|(?<![a-z])(?:pwd|pass|auth)|secrets?"
    rf"|cred(?:ential)?s?|sessionid|(?<![a-z])(?:bearer|cookie|jwt|pat)|connection[-_]?string|(?:api|access|auth|refresh|bearer)[-_]?tokens?"
    rf"|(?<![a-z]){_SPECIAL}token)"
)
"""How a credential's name ends, in any case; a tokenizer's special tokens are none."""

_SCHEME = r"(?:(?:bearer|basic|token|digest|apikey)\s+)?"
_BARE = r"(?<![\w'\"-])(?:token|pat|pass|auth|cookie|bearer|secrets?|cred(?:ential)?s?)\b['\"]?\s*:"
# Every repetition has a bound or one place to begin at: a message may hold a text of any length.
_OPTION = re.compile(
    rf"""(?ix) ({_CREDENTIAL}\b ['"]?\s*(?:=|,\s*val=)\s*['"]?{_SCHEME}  # an option with its value
    | (?!{_BARE}){_CREDENTIAL}\b ['"]?\s*:\s*['"]?{_SCHEME}  # a field or a header
    | (?<!-)--(?=\w)\S{{0,60}}?{_CREDENTIAL}\b ['"]?,?\s+['"]?) [^\s'",)}}\]&]+"""
)
_KEY = re.compile(
    r"""(?x) (?<![A-Za-z0-9]) (?:  # what issuers of keys begin them with
    sk-(?=[\w-]{0,200}[0-9])[\w-]{10,} | [spr]k_(?:live|test)_\w{8,}
    | (?:hf|npm|gsk|r8)_(?=[A-Za-z0-9]*[0-9A-Z])[A-Za-z0-9]{10,}
    | gh[pousr]_[A-Za-z0-9]{10,} | github_pat_\w{10,} | (?:glpat|nvapi|pypi)-[\w-]{10,} | (?:AKIA|ASIA)[0-9A-Z]{12,}
    | AIza[\w-]{20,} | ya29\.[\w-]{10,} | xox[a-z]-[\w-]{8,} | eyJ[\w-]{8,999}\.[\w-]{8,}(?:\.[\w-]*)?
    | (?i:bearer|basic)\s+(?=\S{0,200}[0-9=])[\w.~+/=-]{8,}
    | (?=[A-Za-z]*[0-9])(?=(?:[A-Za-z]*[0-9]){4})(?=[0-9a-z]*[A-Z])(?=[0-9A-Z]*[a-z])[A-Za-z0-9]{32,} )
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----[\s\S]*"""
)
_IN_ADDRESS = re.compile(
    r"""(?ix) (?<![^\s'"=,(\[{/]) [^\s/@:'"=,(\[{]* : (?!//) [^\s'"]{1,200} (?=@[\w\[])  # user:password@host
    | (?<=://) (?=[a-z]*[0-9]) [^\s/@:'"]{8,200} (?=@)  # a token alone
    | (?<=[?&]) (?:key|sig|signature|auth|code|x-amz-[a-z-]+) = [^\s&'"]+"""
)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CURE = "A configuration is saved with every run, so keys stay in the environment (`export NAME=...`, `api_key_env`)."
_LONG_FOR_A_NAME = 20
_LONG_FOR_A_WORD = 12


def looks_secret(name: str) -> bool:
    """Say whether a thing of this name is to be left out of reports."""
    # Leaving out costs little, so more than credentials counts: any kind of key, and headers, which may hold one.
    in_it = ("key", "token_", "secret", "password", "authorization", "headers")
    return _names_a_credential(name) or any(word in name.lower() for word in in_it)


def mask_keys(text: str) -> str:
    """Replace values of options that are named like credentials, and whatever looks like a key, by ``***``.

    Args:
        text: A message, which may repeat what a user gave.

    Returns:
        The message without them.

    Examples:
        >>> mask_keys("Key 'api_key' is not expected. Given: {'api_key': 'sk-123', 'model': 'm'}")
        "Key 'api_key' is not expected. Given: {'api_key': '***', 'model': 'm'}"
    """
    for value in _environment_keys():
        text = text.replace(value, "***")
    if "%" in text and (plain := unquote(text)) != text and mask_keys(plain) != plain:
        text = plain
    return _IN_ADDRESS.sub("***", _KEY.sub("***", _OPTION.sub(r"\1***", text)))


def holds_key(text: str) -> bool:
    """Say whether a text holds something that looks like a key, or that a variable of the environment keeps as one."""
    return mask_keys(text) != text


def _environment_keys() -> list[str]:
    kept = {value for name, value in os.environ.items() if _names_a_credential(name)}
    # A path is none: the shell's PWD sounds like a password, and every file below it would be refused.
    paths = {value for value in kept if os.path.isabs(value) and os.path.exists(value)}
    return sorted((value for value in kept - paths if len(value) >= _LONG_FOR_A_WORD), key=len, reverse=True)


def check_key_name(option: str, name: str) -> None:
    """Refuse what is no name of an environment variable.

    Args:
        option: The setting's name, for the message.
        name: The setting's value.

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
        address: The setting's value.

    Raises:
        ValueError: If it is none.
    """
    if "@" in address or "?" in address:
        raise ValueError(f"`{option}` carries a name or password, or a query: leave that out. {_CURE}")
    url = urlparse(address)
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise ValueError(
            f"`{option}` must be an address such as http://localhost:8000/v1, got {mask_keys(repr(address))}."
        )


def check_no_key(option: str, value: Any, path: str = "") -> None:
    """Refuse credentials among settings.

    Args:
        option: The setting's name, for the message; empty for a whole configuration.
        value: Its value; dictionaries, lists, pairs and texts are searched at all depths.
        path: Where in it the search is.

    Raises:
        ValueError: If a field is called `api_key`, `Authorization` or the like, or a text looks like a key.
    """
    where = option or path or "the configuration"
    if isinstance(value, Mapping):
        fields = {str(name).lower(): inner for name, inner in value.items()}
        _check_pair(where, fields.get("name", fields.get("key")), fields.get("value"))
        for name, inner in value.items():
            if holds_key(str(name)):
                raise ValueError(f"`{where}` has a field whose name looks like a key: leave it out. {_CURE}")
            _check_pair(where, name, inner)
            check_no_key(option, inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple, set)):
        items = list(value)
        if len(items) == 2:
            _check_pair(where, *items)
        for inner in items:
            check_no_key(option, inner, path)
    elif isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode("utf-8", "replace")
        if holds_key(text):
            raise ValueError(f"`{where}` holds what looks like a key, or a name or password: leave it out. {_CURE}")


def _check_pair(where: str, name: Any, value: Any) -> None:
    if not isinstance(name, str) or not _names_a_credential(name):
        return
    if value is None or isinstance(value, bool) or value == "":
        return
    if isinstance(value, str) and re.fullmatch(r"[<\[].*[>\]]", value):  # a tokenizer's token
        return
    raise ValueError(f"`{where}` holds a field called {name!r}: leave it out. {_CURE}")


def _names_a_credential(name: str) -> bool:
    # As words: accessToken is access_token, and "X API key" is x_api_key, in any kind of letters.
    seen = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c)[0] != "C")
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", seen).lower()).strip("_")
    words = re.sub(r"(?:_?(?:value|string|text|header|[0-9]))+$", "", words)
    return re.search(rf"{_CREDENTIAL}$", words) is not None
