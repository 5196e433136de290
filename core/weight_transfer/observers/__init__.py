"""Observers that come with the core. Name them in a config: ``observers = ["progress"]``."""
