"""How weights are cut: which region goes from where to where, and what is packed together; pure functions.

It may import `model`, and what `model` may.
"""
