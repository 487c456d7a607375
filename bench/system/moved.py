#!/usr/bin/env python3
"""What a moved chunk costs: time to first token of a text that another agent of the session has read, by reuse mode.

  bench/system/moved.py --model MODEL [--tokens 1024] [--modes exact,rotate,cacheblend,auto] [--repeat 5] [--from-disk]

Per repetition a fresh random text of --tokens tokens. One agent reads it, exactly; then, in turns, another reads it
under other first words with reuse off, under each mode, and as an exact hit of what was just computed with off's
twin. And: a text that nobody has read, with reuse off and under each mode: what looking costs where there is nothing.
Random ids say nothing about answers, so the guard of mode auto sees the worst: few of its requests are let through.
With --from-disk nothing that was stored is in memory when the second agent asks.

Prints a table, and one JSON object with --format json. Standard library only.
"""

import argparse
import json
import os
import random
import statistics
import tempfile

from line import Daemon, kvctl

HEAD, QUESTION = 40, 24


def ids(count):
    return [random.randrange(100, 2000) for _ in range(count)]


class Bench:
    def __init__(self, daemon, folder, from_disk):
        self.endpoint = daemon.endpoint
        self.path = os.path.join(folder, "ids.json")
        self.from_disk = from_disk

    def ask(self, prompt, mode, agent, session):
        with open(self.path, "w") as f:
            json.dump({"ids": prompt}, f)
        return kvctl("generate", "--endpoint", self.endpoint, "--ids", self.path, "--max-tokens", 1, "--reuse", mode,
                     "--agent", agent, "--session", session)

    def leave_memory(self):
        if self.from_disk:
            kvctl("clear", "--tier", "host", "--yes", "--endpoint", self.endpoint)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--modes", default="rotate,epic,cacheblend,auto")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--from-disk", action="store_true")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    args = parser.parse_args()
    modes = args.modes.split(",")
    shared = {mode: [] for mode in ["off", "exact hit", *modes]}
    nothing = {mode: [] for mode in ["off", "exact", *modes]}
    reused = {mode: [] for mode in modes}
    flags = ("--cold-dir", "cold", "--cold-size", "4GiB") if args.from_disk else ()
    with tempfile.TemporaryDirectory() as folder, Daemon(args.model, folder, *flags) as daemon:
        bench = Bench(daemon, folder, args.from_disk)
        for i in range(args.repeat):
            text = ids(args.tokens)
            bench.ask(ids(HEAD) + text + ids(QUESTION), "exact", "a", f"s{i}")
            head = ids(HEAD)
            for mode in ["off", *modes]:
                bench.leave_memory()
                reply = bench.ask(head + text + ids(QUESTION), mode, "b", f"s{i}")
                shared[mode].append(reply["timings"]["ttft_ms"])
                if mode in reused:
                    reused[mode].append(reply["kvshare"]["moved_tokens"] + reply["kvshare"]["prefix_tokens"])
            bench.ask(head + text + ids(QUESTION), "exact", "b", f"t{i}")
            bench.leave_memory()
            reply = bench.ask(head + text + ids(QUESTION), "exact", "b", f"t{i}")
            shared["exact hit"].append(reply["timings"]["ttft_ms"])
            for mode in nothing:
                reply = bench.ask(ids(HEAD + args.tokens + QUESTION), mode, "c", f"s{i}")
                nothing[mode].append(reply["timings"]["ttft_ms"])
    median = lambda table: {mode: statistics.median(times) for mode, times in table.items()}
    shared, nothing = median(shared), median(nothing)
    reused = {mode: statistics.median(counts) for mode, counts in reused.items()}
    result = {"tokens": HEAD + args.tokens + QUESTION, "shared_ttft_ms": shared, "nothing_ttft_ms": nothing,
              "reused_tokens": reused}
    if args.format == "json":
        print(json.dumps(result))
        return
    print(f"prompt of {result['tokens']} tokens, time to first token (median of {args.repeat})")
    print(f"  {'text read by another agent':28} ms   of off   tokens reused")
    for mode, ms in shared.items():
        print(f"  {mode:22} {ms:8.1f}   {ms / shared['off']:6.3f}   {reused.get(mode, '')}")
    print("  text that nobody has read")
    for mode, ms in nothing.items():
        print(f"  {mode:22} {ms:8.1f}   {ms / nothing['off']:6.3f}")


if __name__ == "__main__":
    main()
