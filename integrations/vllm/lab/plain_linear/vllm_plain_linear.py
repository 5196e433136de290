"""With ``PLAIN_LINEAR=1``, vLLM's linear layers on the CPU multiply by the weight that the module shows.

By default they pack it for oneDNN and drop it, as GPUs do not; then there is nothing to compare, and nothing that could
be written in place. What is switched is vLLM's own fallback. Also offers ``Peek``, which lets a test see a worker's
weights.
"""

from __future__ import annotations

import hashlib
import os


def register() -> None:
    """Called by vLLM in each of its processes."""
    if os.environ.get("PLAIN_LINEAR") == "1":
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers import utils

        ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda *_: False


class Peek:
    """vLLM's ``worker_extension_cls``: methods of a worker for `collective_rpc`."""

    def weight_digests(self, draft: bool = False) -> dict[str, str]:
        """Return a digest of each parameter's bytes: of the model, or of its draft."""
        runner = self.model_runner  # type: ignore[attr-defined]
        model = runner.get_draft_model() if draft else runner.get_model()
        return {
            name: hashlib.sha256(parameter.detach().contiguous().view(-1).numpy().tobytes()).hexdigest()
            for name, parameter in model.named_parameters()
        }

    def fail_once(self, rank: int, call: str) -> None:
        """Have the loader's ``begin`` or ``finish`` raise on one rank, in the next update."""
        if self.rank != rank:  # type: ignore[attr-defined]
            return
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        loader = engine._receiver._targets["model"].loaders[True]
        true = getattr(loader, call)

        def fail(*arguments: object) -> None:
            delattr(loader, call)
            if call == "finish":
                true(*arguments)
            raise RuntimeError(f"this rank was told to fail in {call}")

        setattr(loader, call, fail)

    def received(self) -> dict[str, object]:
        """Return what the receiver says of itself."""
        found: dict[str, object] = self.weight_transfer_engine._receiver.status()  # type: ignore[attr-defined]
        return found
