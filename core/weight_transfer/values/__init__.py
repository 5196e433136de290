"""What everything else speaks of: events, versions, reports and deadlines.

It imports `weight_transfer.errors` alone.
"""
