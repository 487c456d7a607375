"""The shipped trace is, byte for byte, what its generator writes: team_trace_test.py SOURCE_DIR"""

import os
import subprocess
import sys
import tempfile

folder = os.path.join(sys.argv[1], "bench", "traces")
with tempfile.TemporaryDirectory() as work:
    made = os.path.join(work, "team.ktr.jsonl")
    subprocess.run([sys.executable, os.path.join(folder, "make_team.py"), made], check=True)
    with open(made, "rb") as new, open(os.path.join(folder, "team.ktr.jsonl"), "rb") as shipped:
        if new.read() != shipped.read():
            sys.exit("bench/traces/team.ktr.jsonl is not what bench/traces/make_team.py writes: make it again")
