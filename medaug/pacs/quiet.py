"""The optional libraries, loaded on demand and kept silent: their log lines quote identifiers, names and query URLs."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from medaug.errors import MissingDependencyError

LOGGERS = ("pynetdicom", "dicomweb_client", "pydicom", "urllib3", "requests")


def load(name: str) -> ModuleType:
    """Import a module of the extra `pacs`.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"pynetdicom": "pynetdicom", "dicomweb_client": "dicomweb-client"}.get(name.split(".")[0], name)
        raise MissingDependencyError(
            "pacs-not-installed",
            f"This command needs the package {package}; run `pip install -e '.[pacs]'` where medaug was checked out.",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' log lines, warnings and the tracebacks of pynetdicom's threads away while the block runs.

    Levels, handlers and propagation are put back at the end, and so are pynetdicom's own switches.
    """
    before = []
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.level, logger.propagate, logger.handlers))
        logger.setLevel(logging.CRITICAL + 1)
        logger.propagate = False
        logger.handlers = [logging.NullHandler()]
    config = importlib.import_module("pynetdicom._config") if importlib.util.find_spec("pynetdicom") else None
    switches = {"LOG_HANDLER_LEVEL": "none", "LOG_REQUEST_IDENTIFIERS": False, "LOG_RESPONSE_IDENTIFIERS": False}
    values = {name: getattr(config, name) for name in switches} if config else {}
    show = threading.excepthook

    def hook(end: Any) -> None:
        """A thread of a connection may end by an exception: the connection ends with it, and nobody can act on the text."""
        if not type(end.thread).__module__.startswith("pynetdicom"):
            show(end)

    threading.excepthook = hook
    try:
        for name, value in switches.items() if config else ():
            setattr(config, name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        threading.excepthook = show
        for name, value in values.items():
            setattr(config, name, value)
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = handlers
