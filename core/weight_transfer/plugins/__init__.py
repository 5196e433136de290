"""From a configuration to its loaded plugin: what a backend is, how it is found, and the hooks.

It may import `weight_transfer.engine`, and `model`, `config` and `values`.
"""
