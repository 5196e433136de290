"""Backends that are wrong on purpose, each in one way; they derive from the one that ``weight-transfer new`` writes."""
