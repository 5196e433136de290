"""Runs the conformance kit; see ``weight_transfer.testing.conformance`` for what it promises."""

from weight_transfer.testing import BackendConformance


class TestAcme(BackendConformance):
    backend = "acme"
