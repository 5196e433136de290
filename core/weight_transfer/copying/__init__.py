"""Thousands of copies between addresses: on a GPU as a few launches, in host memory as a few calls.

It may import nothing but `errors`.
"""
