"""The conformance kit: what every backend promises, tested on real processes and real bytes.

A complete test file:

    from weight_transfer.testing import BackendConformance

    class TestAcme(BackendConformance):
        backend = "acme"
"""

from __future__ import annotations

from weight_transfer.testing.conformance.bits import BitsTests
from weight_transfer.testing.conformance.blame import BlameTests
from weight_transfer.testing.conformance.contract import ContractTests
from weight_transfer.testing.conformance.faults import FaultsTests
from weight_transfer.testing.conformance.lifecycle import LifecycleTests
from weight_transfer.testing.conformance.memory import MemoryTests
from weight_transfer.testing.conformance.outages import OutagesTests
from weight_transfer.testing.conformance.region_faults import RegionFaultsTests
from weight_transfer.testing.conformance.regions import RegionsTests
from weight_transfer.testing.conformance.resources import ResourcesTests
from weight_transfer.testing.conformance.scale import ScaleTests
from weight_transfer.testing.conformance.sessions import SessionsTests
from weight_transfer.testing.conformance.sources import SourcesTests
from weight_transfer.testing.conformance.strangers import StrangersTests
from weight_transfer.testing.conformance.targets import TargetsTests
from weight_transfer.testing.conformance.versions import VersionsTests


# pytest runs the tests of the last base first
class BackendConformance(
    ScaleTests,
    ResourcesTests,
    MemoryTests,
    BlameTests,
    RegionFaultsTests,
    RegionsTests,
    OutagesTests,
    FaultsTests,
    SessionsTests,
    TargetsTests,
    VersionsTests,
    SourcesTests,
    BitsTests,
    StrangersTests,
    LifecycleTests,
    ContractTests,
):
    """Derive a class whose name begins with ``Test``, name the backend, and run pytest.

    The tests follow the capabilities of the backend's descriptor, and say why they skip what it does not promise.
    Without `Capability.CROSS_PROCESS` workers are threads, and none is killed. With `Capability.CUDA`, on a machine
    that has a GPU, tensors are CUDA tensors. Without `Capability.REJOIN` nobody is asked to come back alone.
    Trainers of several ranks, and workers that keep parts of weights, are for backends with `Capability.REGIONS`.

    A test that a subclass overrides must carry ``pytest.mark.xfail`` or ``pytest.mark.skip`` with a reason, so that a
    report shows what is left out; a silent override is refused when the class is made.

    Attributes:
        backend: its name.
        worker_counts: numbers of workers that the tests of bits use.
        deadline: the ``timeout`` in seconds of updates that are meant to miss it.
        grace: seconds after the deadline in which the error must have come.
    """
