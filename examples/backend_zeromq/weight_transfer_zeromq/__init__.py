"""The ``zeromq`` backend of weight-transfer."""

__version__ = "0.1.0"
