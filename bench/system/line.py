#!/usr/bin/env python3
"""What the daemon adds and what an exact hit saves, measured from outside on the release build.

  bench/system/line.py --model MODEL [--repeat 5] [--tokens 1500] [--limit 12]

1. exact hit: fresh random prompts of --tokens tokens, each sent twice to one daemon; time to first token of both.
2. daemon against in-process engine: the first --limit requests of the shipped trace with reuse off, replayed through
   a daemon over ipc and through the engine inside kvctl, in turns; time to first token as the client sees it, and
   wall time.

Prints a table, and one JSON object with --format json. Standard library only.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.path.abspath(os.environ.get("KVSHARE_BIN", os.path.join(ROOT, "build", "release", "bin")))
TRACE = os.path.join(ROOT, "bench", "traces", "team.ktr.jsonl")


def kvctl(*argv):
    """Runs kvctl and returns the JSON it prints."""
    command = [os.path.join(BIN, "kvctl"), *map(str, argv), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"line.py: kvctl {argv[0]} failed ({done.returncode}): {done.stderr.strip()}")
    return json.loads(done.stdout)


class Daemon:
    def __init__(self, model, folder, *flags):
        self.endpoint = "ipc://" + os.path.join(folder, "agentd.sock")
        command = [os.path.join(BIN, "agentd"), "--model", os.path.abspath(model), "--listen", self.endpoint,
                   "--reuse", "exact", *flags]
        # In its folder, so that flags may name files of it.
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        kvctl("ping", "--endpoint", self.endpoint, "--timeout", "60s")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGCONT)  # a stopped process does not end
        self.process.terminate()
        self.process.wait()

    def wait_for_its_turn(self):
        """Where several take turns: it runs in `with daemon.its_turn()` alone."""
        self.process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def its_turn(self):
        self.process.send_signal(signal.SIGCONT)
        # It finds that nobody has asked for long. A word of somebody else's, and it is as busy as between two requests.
        kvctl("generate", "--endpoint", self.endpoint, "--prompt", "Hello", "--max-tokens", 1, "--reuse", "off")
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)


def exact_hit(daemon, folder, tokens, repeat):
    """Median time to first token of fresh prompts and of the same prompts again, in milliseconds."""
    fresh, again = [], []
    for i in range(repeat):
        path = os.path.join(folder, "ids.json")
        with open(path, "w") as f:
            json.dump({"ids": [random.randrange(100, 2000) for _ in range(tokens)]}, f)
        for times, expected in ((fresh, 0), (again, tokens - 1)):
            reply = kvctl("generate", "--endpoint", daemon.endpoint, "--ids", path, "--max-tokens", 1)
            reused = reply["kvshare"]["prefix_tokens"]
            if reused < expected or (expected == 0 and reused > 2):
                sys.exit(f"line.py: {reused} tokens were reused, {expected} expected")
            times.append(reply["timings"]["ttft_ms"])
    return statistics.median(fresh), statistics.median(again)


def replay(where, limit):
    report = kvctl("trace", "replay", TRACE, *where, "--compare", "off", "--as-fast-as-possible", "--slots", 1,
                   "--limit", limit, "--max-output", 8)
    mode = report["modes"]["off"]
    return mode["ttft_ms"]["mean"], mode["wall_s"] * 1000


def daemon_cost(daemon, model, limit, repeat):
    """Least mean TTFT and wall time through the daemon and in-process, in milliseconds."""
    over, inside = [], []
    for _ in range(repeat):
        over.append(replay(("--endpoint", daemon.endpoint), limit))
        inside.append(replay(("--model", model), limit))
    least = lambda rows: tuple(min(column) for column in zip(*rows))
    return least(over), least(inside)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--format", choices=("text", "json"), default="text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Daemon(args.model, folder) as daemon:
        full, hit = exact_hit(daemon, folder, args.tokens, args.repeat)
        over, inside = daemon_cost(daemon, args.model, args.limit, args.repeat)
    result = {"prefill_ttft_ms": full, "hit_ttft_ms": hit, "hit_share": hit / full,
              "daemon": {"ttft_ms": over[0], "wall_ms": over[1]},
              "in_process": {"ttft_ms": inside[0], "wall_ms": inside[1]},
              "daemon_ttft_ratio": over[0] / inside[0], "daemon_wall_ratio": over[1] / inside[1]}
    if args.format == "json":
        print(json.dumps(result))
        return
    print(f"prompt of {args.tokens} tokens, time to first token (median of {args.repeat})")
    print(f"  computed  {full:9.1f} ms")
    print(f"  exact hit {hit:9.1f} ms   {100 * hit / full:.1f} % of computing")
    print(f"{args.limit} requests of the shipped trace, reuse off (least of {args.repeat})")
    print("               mean TTFT         wall")
    print(f"  in-process {inside[0]:9.1f} ms {inside[1]:9.0f} ms")
    print(f"  daemon     {over[0]:9.1f} ms {over[1]:9.0f} ms   {100 * (over[0] / inside[0] - 1):+.1f} % and "
          f"{100 * (over[1] / inside[1] - 1):+.1f} %")


if __name__ == "__main__":
    main()
