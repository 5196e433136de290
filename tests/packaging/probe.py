"""Load one backend and print, as JSON, what came of it and which modules are imported by then.

Run by a clean environment's own interpreter, so it uses nothing but what is installed there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import weight_transfer


def main(name: str) -> None:
    answer: dict[str, Any] = {"core": weight_transfer.__file__, "at_import": sorted(sys.modules)}
    try:
        loaded = weight_transfer.load_backend(name)
        answer |= {"name": loaded.name, "provider": str(loaded.provider)}
    except weight_transfer.PluginError as error:
        answer |= {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer | {"modules": sorted(sys.modules)}))


main(sys.argv[1])
