"""A plugin whose driver is missing."""

raise ImportError("libsample.so.1: cannot open shared object file")
