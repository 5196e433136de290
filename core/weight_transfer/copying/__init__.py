"""Thousands of strided copies between addresses as a few launches on a GPU.

It may import nothing but `errors`.
"""
