"""The plugin module: all that is imported when a configuration names the backend. Keep it light."""

from __future__ import annotations

from weight_transfer.authoring import API_VERSION, Backend, Capability, Probe, hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    """Describe the backend; its classes are imported when an engine is created."""
    return Backend(
        name="acme",
        api_version=API_VERSION,
        summary="plain TCP sockets",
        worker_engine="weight_transfer_acme.engine:AcmeWorkerEngine",
        trainer_engine="weight_transfer_acme.engine:AcmeTrainerEngine",
        options="weight_transfer_acme.config:AcmeOptions",
        probe="weight_transfer_acme.plugin:probe",
        capabilities=frozenset({Capability.CPU, Capability.CROSS_PROCESS, Capability.CROSS_HOST}),
    )


def probe() -> Probe:
    """Say whether the backend works on this machine: import or look for its library here, and say what is missing."""
    return Probe(available=True, reason="needs TCP, which every machine has")
