"""Waits that tell what they wait for, if they take long."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weight_transfer.values.deadline import LONG

logger = logging.getLogger(__name__)


@contextmanager
def logged_wait(what: Callable[[], str]) -> Iterator[None]:
    """Log ``what`` is waited for if that takes long."""
    timer = threading.Timer(LONG, lambda: logger.warning("%s", what()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
