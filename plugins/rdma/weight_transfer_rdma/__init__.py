"""The ``rdma`` backend: one-sided reads with NVIDIA NIXL."""

__version__ = "0.1.0"
