"""API keys: who may call, and that callers with different keys share nothing in the prefix cache."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import stat
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import FenError
from server.errors import ApiError, error_response
from server.logs import KEY

log = logging.getLogger("fen.server")

MIN_KEY_CHARACTERS = 8
PUBLIC = frozenset({"/", "/health", "/ready"})  # and the files of the page, under /page/


def read_keys(path: str | None, environment: MutableMapping[str, str]) -> list[str]:
    """The keys in the file `path` (one a line; # begins a comment), FEN_API_KEYS (commas between) and FEN_API_KEY.

    Takes the two variables out of the environment: child processes have no use for them. Raises FenError.
    """
    keys = _from_file(path) if path is not None else []
    for name in ("FEN_API_KEYS", "FEN_API_KEY"):
        value = environment.pop(name, None)
        if value is not None:
            found = [key.strip() for key in value.split(",")] if name == "FEN_API_KEYS" else [value.strip()]
            found = [key for key in found if key]
            if not found:
                raise FenError(f"{name} is set and holds no key; unset it, or give it a key")
            keys += _checked(found, name)
    return list(dict.fromkeys(keys))


def _from_file(path: str) -> list[str]:
    try:
        text = Path(path).expanduser().read_text("utf-8")
        mode = os.stat(Path(path).expanduser()).st_mode
    except UnicodeDecodeError:
        raise FenError(f"--api-key-file {path} is not a text file; it needs one key a line") from None
    except OSError as error:
        raise FenError(f"--api-key-file {path} cannot be read: {error.strerror}") from None
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        log.warning("the key file %s can be read by every user of this machine; chmod 600 is safer", path)
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise FenError(f"--api-key-file {path} holds no key; write one a line, or leave the option out to serve anyone")
    return _checked(keys, f"--api-key-file {path}")


def _checked(keys: list[str], where: str) -> list[str]:
    for place, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_CHARACTERS or not all("!" <= character <= "~" for character in key):
            raise FenError(
                f"{where}: key {place} cannot be used; a key has at least {MIN_KEY_CHARACTERS} characters, all of them "
                "printable ASCII without spaces"
            )
    return keys


class ApiKeys:
    """The keys of a server; without any, everybody may call and shares one prefix cache."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._secret = secrets.token_bytes(32)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def place(self, key: bytes) -> int | None:
        """Which key it is, counted from 1. Takes the same time whichever it is, and if it is none."""
        digest = hashlib.sha256(key).digest()
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        return same.index(True) + 1 if any(same) else None

    def cache_salt(self, scope: Scope, asked: str) -> str:
        """What a request's blocks are salted with: its own `cache_salt`, and its key where there are keys."""
        place = scope.get(KEY)
        if place is None:
            return asked
        digest = hashlib.blake2b(self._digests[place - 1] + asked.encode(), key=self._secret, digest_size=16)
        return digest.hexdigest()


def given_key(scope: Scope) -> bytes | None:
    """Of `Authorization: Bearer KEY` or `X-Api-Key: KEY`."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return bytes(key.strip())
        elif name == b"x-api-key":
            return bytes(value.strip())
    return None


class KeyCheck:
    """Answers 401 before a request's body is read, unless it brings a key or asks for what is public."""

    def __init__(self, app: ASGIApp, keys: ApiKeys):
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.keys or scope["type"] != "http" or _is_public(scope):
            await self.app(scope, receive, send)
            return
        key = given_key(scope)
        place = None if key is None else self.keys.place(key)
        if place is None:
            wrong = "there is no API key" if key is None else "this server does not know that API key"
            message = f"{wrong}; send one as Authorization: Bearer KEY or X-Api-Key: KEY"
            reply = error_response(ApiError(401, message, code="invalid_api_key"))
            reply.headers["www-authenticate"] = "Bearer"
            await reply(scope, receive, send)
            return
        scope[KEY] = place
        await self.app(scope, receive, send)


def _is_public(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in PUBLIC or path.startswith("/page/"))
