"""What the server process of `weight_transfer.testing.actors` does once, for all actors that it forks.

Import it last: it also takes all that was imported before out of the reach of the garbage collector, which would
otherwise visit, and thereby copy, most of it again in every actor.
"""

from __future__ import annotations

import gc

from weight_transfer.plugins.discovery import backends

backends()
gc.collect()
gc.freeze()
