"""How weights are cut into parts and packed.

It may import `model`, and what `model` may.
"""
