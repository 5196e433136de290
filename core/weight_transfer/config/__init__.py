"""What can be configured, and the strict conversion of plain dicts.

It imports `weight_transfer.errors` alone.
"""
