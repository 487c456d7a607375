#!/usr/bin/env python3
"""Many agents on one daemon: requests per second and time to first token, 1 to 64 of them at once, reuse off and exact.

  bench/system/many.py --model MODEL [--agents 64] [--turns 4] [--at-once 1,8,32,64]

Every agent reads the same instructions (some 400 words), its own role, and a conversation that grows by two messages a
turn. The same requests are sent at every level of concurrency, to a daemon whose store is emptied before each run; the
next turn of an agent waits for its last one. Beside each row: the share of prompt tokens that was reused.

Prints a table, and one JSON object with --format json. Standard library only.
"""

import argparse
import json
import os
import random
import tempfile

from line import Daemon, kvctl

WORDS = ("agent note plan tool result check write read table list river stone light paper green seven market answer "
         "report order").split()


def text(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def trace(path, agents, turns):
    """KTR-1 (docs/reference/traces.md): a session an agent, its turns one after another."""
    rng = random.Random(1)
    instructions = text(rng, 400)
    with open(path, "w") as f:
        print(json.dumps({"schema": "ktr", "version": 1, "name": "many", "time_base": "none"}), file=f)

        def segment(name, content):
            print(json.dumps({"seg": name, "text": content}), file=f)
            return name

        common = segment("instructions", instructions)
        history = {a: [["system", common], ["+", segment(f"role{a}", text(rng, 40))]] for a in range(agents)}
        for turn in range(turns):
            for a in range(agents):
                name = f"a{a}/{turn}"
                history[a].append(["user", segment(f"question {name}", text(rng, 60))])
                row = {"request_id": name, "session_id": f"s{a}", "agent_id": f"agent {a}", "segments": history[a],
                       "wait_for": [f"a{a}/{turn - 1}"] if turn else []}
                answer = segment(f"answer {name}", text(rng, 30))
                print(json.dumps({**row, "output": answer, "output_length": 16}), file=f)
                history[a].append(["assistant", answer])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--agents", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--at-once", default="1,8,32,64")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, Daemon(args.model, folder) as daemon:
        path = os.path.join(folder, "many.ktr.jsonl")
        trace(path, args.agents, args.turns)
        for at_once in map(int, args.at_once.split(",")):
            for mode in ("off", "exact"):
                kvctl("clear", "--yes", "--endpoint", daemon.endpoint)
                report = kvctl("trace", "replay", path, "--endpoint", daemon.endpoint, "--compare", mode, "--slots",
                               at_once, "--as-fast-as-possible", "--max-output", 16, "--timeout", "600s")
                run = report["modes"][mode]
                rows.append({"at_once": at_once, "mode": mode, "requests_per_s": report["requests"] / run["wall_s"],
                             "ttft_ms": run["ttft_ms"], "reused": run["prefix_tokens"] / run["prompt_tokens"],
                             "outputs_sha256": run["outputs_sha256"]})
    same = len({row["outputs_sha256"] for row in rows}) == 1
    if args.format == "json":
        print(json.dumps({"agents": args.agents, "turns": args.turns, "answers_identical": same, "rows": rows}))
        return
    print(f"{args.agents} agents of {args.turns} turns, {args.agents * args.turns} requests; answers of all runs "
          f"{'identical' if same else 'DIFFER'}")
    print(f"  {'at once':>8} {'mode':6} {'requests/s':>11} {'first token p50':>16} {'p95, ms':>9} {'reused':>8}")
    for row in rows:
        print(f"  {row['at_once']:8} {row['mode']:6} {row['requests_per_s']:11.1f} {row['ttft_ms']['p50']:16.1f} "
              f"{row['ttft_ms']['p95']:9.1f} {100 * row['reused']:7.1f} %")


if __name__ == "__main__":
    main()
