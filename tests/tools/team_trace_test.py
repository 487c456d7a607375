"""The shipped traces are, byte for byte, what their generators write: team_trace_test.py SOURCE_DIR"""

import os
import subprocess
import sys
import tempfile

folder = os.path.join(sys.argv[1], "bench", "traces")
for name in ("team", "world"):
    with tempfile.TemporaryDirectory() as work:
        made = os.path.join(work, f"{name}.ktr.jsonl")
        subprocess.run([sys.executable, os.path.join(folder, f"make_{name}.py"), made], check=True)
        with open(made, "rb") as new, open(os.path.join(folder, f"{name}.ktr.jsonl"), "rb") as shipped:
            if new.read() != shipped.read():
                sys.exit(f"bench/traces/{name}.ktr.jsonl is not what bench/traces/make_{name}.py writes: make it again")
