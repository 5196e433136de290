"""A plugin that was written for a later core."""

from weight_transfer.plugins.backend import Backend
from weight_transfer.plugins.hookspecs import hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="newer",
        api_version=(2, 0),
        summary="needs a later core",
        worker_engine="sample_broken.engine:WorkerEngine",
        trainer_engine="sample_broken.engine:TrainerEngine",
    )
