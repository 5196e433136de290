"""Memory that other processes map, the tensors in it, and digests of their bytes; for backends.

It may import `plan`, and what `plan` may.
"""
