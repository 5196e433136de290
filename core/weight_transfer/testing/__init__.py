"""For authors of backends: the in-memory reference backend ``loopback``."""
