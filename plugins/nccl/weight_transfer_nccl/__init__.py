"""The ``nccl`` backend: broadcast over a communicator of its own, NCCL on GPUs and gloo on CPU tensors."""

__version__ = "0.1.0"
