"""A sound plugin under a name that ``weight-transfer-ipc`` has, too."""

from weight_transfer.authoring import API_VERSION, Backend, hookimpl


@hookimpl
def weight_transfer_backend() -> Backend:
    return Backend(
        name="ipc",
        api_version=API_VERSION,
        summary="the other ipc",
        worker_engine="sample_clash.engine:WorkerEngine",
        trainer_engine="sample_clash.engine:TrainerEngine",
    )
