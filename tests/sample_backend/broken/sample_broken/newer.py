"""A plugin that was written for a later core."""

from weight_transfer.authoring import Backend, hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="newer",
        api_version=(3, 0),
        summary="needs a later core",
        worker_engine="sample_broken.engine:WorkerEngine",
        trainer_engine="sample_broken.engine:TrainerEngine",
    )
