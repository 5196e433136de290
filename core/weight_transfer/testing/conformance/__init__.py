"""The conformance kit: what every backend promises, tested on real processes and real bytes.

A complete test file:

    from weight_transfer.testing import BackendConformance

    class TestAcme(BackendConformance):
        backend = "acme"
"""

from __future__ import annotations

from weight_transfer.testing.conformance.bits import BitsTests
from weight_transfer.testing.conformance.contract import ContractTests
from weight_transfer.testing.conformance.faults import FaultsTests
from weight_transfer.testing.conformance.lifecycle import LifecycleTests
from weight_transfer.testing.conformance.resources import ResourcesTests
from weight_transfer.testing.conformance.scale import ScaleTests
from weight_transfer.testing.conformance.versions import VersionsTests


class BackendConformance(
    ScaleTests,
    ResourcesTests,
    FaultsTests,
    VersionsTests,
    BitsTests,
    LifecycleTests,
    ContractTests,  # run backwards
):
    """Derive a class whose name begins with ``Test``, name the backend, and run pytest.

    The tests skip, and say why, what the backend's descriptor does not promise: with neither `Capability.CROSS_PROCESS`
    nor processes to kill, workers are threads; `Capability.CUDA` and a GPU give CUDA tensors; without
    `Capability.REJOIN` nobody is asked to come back alone. A test that a subclass overrides must carry
    ``pytest.mark.xfail`` or ``pytest.mark.skip`` with a reason, so that a report shows what is left out.

    Attributes:
        backend: its name.
        worker_counts: numbers of workers that the tests of bits use.
        one_device_each: whether every process needs a CUDA device of its own.
        deadline: the ``timeout`` in seconds of updates that are meant to miss it.
        grace: seconds after the deadline in which the error must have come.
    """
