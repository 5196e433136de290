"""The example passes the conformance kit."""

from weight_transfer.testing import BackendConformance


class TestZeroMq(BackendConformance):
    backend = "zeromq"
