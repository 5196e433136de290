"""The weights: what a module or a file holds, how it is described, read, cast and loaded; the same for both sides.

It may import `config`, `copying` and `values`.
"""
