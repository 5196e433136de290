"""The plugin module: all that is imported when a configuration names the backend."""

from __future__ import annotations

from weight_transfer.authoring import API_VERSION, Backend, Capability, Probe, hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    """Describe the backend; its classes are imported when an engine is created."""
    return Backend(
        name="zeromq",
        api_version=API_VERSION,
        summary="ZeroMQ messages over TCP, encrypted",
        worker_engine="weight_transfer_zeromq.engine:ZeroMqWorkerEngine",
        trainer_engine="weight_transfer_zeromq.engine:ZeroMqTrainerEngine",
        options="weight_transfer_zeromq.config:ZeroMqOptions",
        probe="weight_transfer_zeromq.plugin:probe",
        capabilities=frozenset({Capability.CPU, Capability.CROSS_PROCESS, Capability.CROSS_HOST}),
    )


def probe() -> Probe:
    """Say whether pyzmq can be imported and whether its libzmq can encrypt."""
    try:
        import zmq
    except ImportError as error:
        return Probe(available=False, reason=f"pyzmq cannot be imported: {error}", fix="pip install pyzmq")
    if not zmq.has("curve"):
        return Probe(available=False, reason="libzmq was built without CURVE", fix="Install pyzmq from its wheel.")
    return Probe(available=True, reason=f"found pyzmq {zmq.__version__} with libzmq {zmq.zmq_version()} and CURVE")
