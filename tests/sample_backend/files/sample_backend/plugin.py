"""The plugin module: all that is imported when a configuration names the backend."""

from __future__ import annotations

import shutil
import tempfile

from weight_transfer.authoring import API_VERSION, Backend, Capability, Probe, hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    """Describe the backend; its classes are imported when an engine is created."""
    return Backend(
        name="files",
        api_version=API_VERSION,
        summary="files in a shared directory",
        worker_engine="sample_backend.engine:FilesWorkerEngine",
        trainer_engine="sample_backend.engine:FilesTrainerEngine",
        options="sample_backend.config:FilesOptions",
        probe="sample_backend.plugin:probe",
        capabilities=frozenset({Capability.CPU, Capability.CROSS_PROCESS, Capability.REJOIN}),
    )


def probe() -> Probe:
    """Say whether there is a directory for temporary files; engines check the configured one."""
    try:
        return Probe(available=True, reason=f"can write to {tempfile.gettempdir()}")
    except FileNotFoundError as error:
        return Probe(available=False, reason=str(error), fix="Set TMPDIR to a directory that can be written to.")


@hookimpl
def weight_transfer_diagnostics() -> dict[str, str]:
    """Tell how much room there is; shown by ``weight-transfer backends --check``."""
    return {"room for weights": f"{shutil.disk_usage(tempfile.gettempdir()).free / 1e9:.1f} GB"}
