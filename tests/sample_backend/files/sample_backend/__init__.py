"""A stranger's distribution: the backend ``files`` and the observer ``jsonlines``."""
