"""The ``ipc`` backend: trainer and workers on one host share memory."""

__version__ = "0.1.0"
