"""Shows that every file of the installed vLLM is the one of its wheel, and names what was added."""

from __future__ import annotations

import base64
import csv
import hashlib
import sys
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
(record,) = site.glob("vllm-0.33.*.dist-info/RECORD")
known, changed = set(), []
with record.open(newline="") as rows:
    for name, digest, _ in csv.reader(rows):
        known.add(name)
        if digest and not name.endswith(".pyc"):
            found = base64.urlsafe_b64encode(hashlib.sha256((site / name).read_bytes()).digest()).rstrip(b"=").decode()
            if digest != f"sha256={found}":
                changed.append(name)
files = (path.relative_to(site).as_posix() for path in (site / "vllm").rglob("*") if path.is_file())
added = sorted(name for name in files if name not in known and not name.endswith(".pyc"))
print(f"vLLM: {len(known)} files, {len(changed)} differ from the wheel's {changed[:5]}, added: {added}")
sys.exit(bool(changed) or any(not name.startswith("vllm/_C") for name in added))
