"""API keys: a file names tenants and the SHA-256 of their keys, and no key itself.

A key has 256 random bits, so its hash needs no salt and no slow function: it cannot be guessed.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tomllib
from pathlib import Path

TENANT = r"[a-z0-9][a-z0-9_-]{0,63}"
LOCAL = "local"
"""The tenant of a server without keys."""


class Keys:
    """Whose a key is. Without a file every request is `LOCAL`'s.

    Raises:
        ValueError: a file that is none of keys, or has none.
        OSError: a file that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._tenants: dict[str, str] | None = None if path is None else _read(Path(path))

    @property
    def asked(self) -> bool:
        """Whether requests need a key."""
        return self._tenants is not None

    def tenant(self, authorization: str | None) -> str | None:
        """Whose a request with such a header is; None for nobody's. How long it takes tells nothing of other keys: what
        is looked up is a hash that nobody can choose.
        """
        if self._tenants is None:
            return LOCAL
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._tenants.get(hashlib.sha256(key.strip().encode()).hexdigest())


def new_key(tenant: str, path: str | os.PathLike[str]) -> str:
    """A new key of a tenant, whose hash is put into the file; raises `ValueError` for a name that is none."""
    if not re.fullmatch(TENANT, tenant):
        raise ValueError(f"the tenant {tenant!r} is not named by 1 to 64 of a-z, 0-9, _ and -")
    path = Path(path)
    if path.exists():
        _read(path)
    key = f"mn-{secrets.token_urlsafe(32)}"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as file:
        file.write(f'[[key]]\ntenant = "{tenant}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n\n')
    return key


def _read(path: Path) -> dict[str, str]:
    wrong = f"{path} is no file of keys; make one by mnemic keys TENANT --keys {path.name}"
    try:
        entries = tomllib.loads(path.read_text("utf-8"))["key"]
        found = {entry["sha256"]: entry["tenant"] for entry in entries}
    except (KeyError, TypeError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(wrong) from error
    for digest, tenant in found.items():
        if not (re.fullmatch(r"[0-9a-f]{64}", str(digest)) and re.fullmatch(TENANT, str(tenant))):
            raise ValueError(wrong)
    if not found:
        raise ValueError(wrong)
    return found
