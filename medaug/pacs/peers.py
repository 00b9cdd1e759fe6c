"""Who is at the other end, and how long to be patient with it."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from medaug import draws
from medaug.errors import ConfigError

MAX_DELAY = 60.0
_AE = re.compile(r"[ -\[\]-~]{1,16}")  # VR AE (PS3.5 6.2): printable ASCII without backslash
_URL_VARIABLES = ("MEDAUG_DICOMWEB_USER", "MEDAUG_DICOMWEB_PASSWORD", "MEDAUG_DICOMWEB_TOKEN")


@dataclass(frozen=True)
class DicomPeer:
    """A PACS spoken to over DICOM's own protocol: its address, its AE title and ours."""

    host: str
    port: int
    called: str
    calling: str = "MEDAUG"

    @classmethod
    def parse(cls, address: str, called: str, calling: str) -> DicomPeer:
        """From HOST:PORT or [IPv6]:PORT and two AE titles.

        Raises:
            ConfigError: `option-malformed`.
        """
        host, colon, port = address.rpartition(":")
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not colon or not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError("option-malformed", "--pacs takes HOST:PORT, for example 127.0.0.1:4242.")
        return cls(host, int(port), ae_title(called, "--called"), ae_title(calling, "--calling"))


@dataclass(frozen=True, repr=False)
class WebPeer:
    """A DICOMweb service (PS3.18): its base URL and the credentials of the environment.

    `MEDAUG_DICOMWEB_TOKEN` is sent as a bearer token, else `MEDAUG_DICOMWEB_USER` and `MEDAUG_DICOMWEB_PASSWORD` as
    basic authentication. They are never part of the command line, of a message or of a representation.
    """

    url: str
    user: str = ""
    password: str = ""
    token: str = ""

    @classmethod
    def parse(cls, url: str, environment: Mapping[str, str], insecure: bool = False) -> WebPeer:
        """From a base URL such as https://pacs.example/dicom-web and the environment.

        Raises:
            ConfigError: `option-malformed`, or `credentials-unprotected`: http to another machine with credentials.
        """
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError("option-malformed", "--dicomweb takes a base URL, for example https://pacs.example/dicom-web.")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "credentials-on-command-line",
                f"--dicomweb must not hold a user or password; set {_URL_VARIABLES[0]} and {_URL_VARIABLES[1]} instead.",
            )
        user, password, token = (environment.get(name, "") for name in _URL_VARIABLES)
        if (user or token) and parts.scheme == "http" and not is_loopback(parts.hostname) and not insecure:
            raise ConfigError(
                "credentials-unprotected",
                "Credentials would travel unencrypted to another machine; use an https URL, or --insecure on a closed network.",
            )
        return cls(url.rstrip("/"), user, password, token)

    def __repr__(self) -> str:
        return f"WebPeer({self.url!r})"


def ae_title(text: str, option: str) -> str:
    """An AE title without the spaces around it.

    Raises:
        ConfigError: `option-malformed`.
    """
    title = text.strip()
    if not _AE.fullmatch(title):
        raise ConfigError("option-malformed", f"{option} takes an AE title: 1 to 16 printable ASCII characters, no backslash.")
    return title


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses, which no other machine can reach."""
    if host.casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Patience:
    """How long to wait and how often to try.

    Attributes:
        timeout: seconds without an answer after which a connection counts as lost.
        retries: further tries after one that brought nothing new.
        delay: seconds before the first of them; doubles each time up to a minute, with up to a quarter more at random
            so that several clients do not return together.
    """

    timeout: float = 60.0
    retries: int = 5
    delay: float = 1.0

    def wait(self, failures: int) -> None:
        """Sleep before the next try, after `failures` in a row (at least 1)."""
        jitter = float(draws.numpy_generator("back-off", failures).uniform(1.0, 1.25))
        time.sleep(min(self.delay * 2 ** (failures - 1), MAX_DELAY) * jitter)

    def tries(self) -> Iterator[int]:
        """0, 1, ... `retries`, with the pauses between them."""
        for attempt in range(self.retries + 1):
            if attempt:
                self.wait(attempt)
            yield attempt
