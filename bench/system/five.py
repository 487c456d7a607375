#!/usr/bin/env python3
"""Five agents in a chain (KVCOMM's setting, arXiv 2510.12872): each reads its role, a task, and all answers so far.

  bench/system/five.py --model MODEL [--modes off,exact,cacheblend:0.12,auto] [--tasks 3] [--warm-up 1] [--first 0]
                       [--answer 512] [--anchor-memory 512MiB] [--svg FILE]

Per mode a daemon, one session and --tasks tasks of some 700 new tokens; roles have about 500 tokens, answers --answer.
A mode may name its wished budget (--blend-recompute). Agents talk as agents do: chat messages in, text out, one after
the other without a pause. The modes take turns, agent by agent, and whose turn it is not is stopped (SIGSTOP): a
machine that others use too has fast and slow minutes, and modes are compared within one. The first --warm-up tasks
(roles are stored, anchors are learnt) do not count. Prints per agent what of the prompt was computed, the median time
to first token and the daemon's processor time until then, and their ratios to --modes' first: where others use the
machine too, processor time is what can be compared. --svg draws quality over speed: the mean KL of the first tokens
that were compared with exact ones (answers are, when the daemon has time), and how many times as fast agents 2 to 5
are, in sums over all tasks.

The texts are made by bench/traces/make_team.py. Prints a table, or one JSON object with --format json. Standard library
only.
"""

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "traces"))
import make_team  # noqa: E402
from line import Daemon, kvctl  # noqa: E402


def task(number):
    rng = random.Random(number)
    incident = make_team.Incident(rng, number, rng.choice(list(make_team.SERVICES)))
    parts = [incident.log_excerpt(5, 6), incident.metric_table(40, 5), incident.diff(), incident.host_table()]
    return "Work through this incident together.\n\n" + "\n\n".join(parts)


class ProcessorTime:
    """A process' processor time, read every few milliseconds, so that it can be asked for afterwards."""

    def __init__(self, pid):
        self.clock = (~pid << 3) | 2  # Linux: the processor-time clock of another process
        self.samples = []  # (time, processor time), seconds
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.sample)

    def sample(self):
        while not self.stop.wait(0.003):
            self.samples.append((time.monotonic(), time.clock_gettime(self.clock)))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def at(self, moment):
        return min(self.samples, key=lambda sample: abs(sample[0] - moment))[1]


def ask(daemon, *args):
    """A reply, with the daemon's processor time until its first token."""
    with ProcessorTime(daemon.process.pid) as used:
        asked = time.monotonic()
        reply = kvctl("generate", "--endpoint", daemon.endpoint, *args)
        first_token = time.monotonic() - reply["timings"]["predicted_ms"] / 1e3
    reply["ttft_cpu_ms"] = 1e3 * (used.at(first_token) - used.at(asked))
    return reply


def ask_agent(daemon, folder, mode, number, agent, replies, answer):
    """The reply of one agent to task `number`, over the replies of those before it."""
    messages = [{"role": "system", "content": make_team.AGENTS[agent] + "\n\n" + make_team.HANDBOOK},
                {"role": "user", "content": task(number)}]
    messages += [{"role": "user", "content": f"{name} wrote: {reply['text']}"}
                 for name, reply in zip(make_team.AGENTS, replies)]
    path = os.path.join(folder, "messages.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(messages, f)
    with daemon.its_turn():
        return ask(daemon, "--messages", path, "--max-tokens", answer, "--reuse", mode, "--agent", agent, "--session",
                   "team")


def audits(daemon):
    """Approximate answers against exact ones, by depth; of those that are computed exactly within two minutes."""
    stats = None
    with daemon.its_turn():
        for _ in range(120):
            stats = kvctl("stat", "--endpoint", daemon.endpoint)["approximate"]
            if stats["healed"] >= stats["answers"]:
                break
            time.sleep(1)
    return {"the first token": stats["audits"], "a later token": stats["later_audits"]}


def run(names, args):
    """Of each mode the replies, [task][agent], and the audits."""
    replies = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        daemons = {}
        for name in names:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            _, _, budget = name.partition(":")
            flags = ("--anchor-memory", args.anchor_memory, *(("--blend-recompute", budget) if budget else ()))
            daemon = stack.enter_context(Daemon(args.model, folder, *flags))
            daemon.wait_for_its_turn()
            daemons[name] = (daemon, folder)
        for number in range(args.first, args.first + args.warm_up + args.tasks):
            for name in names:
                replies[name].append([])
            for agent in make_team.AGENTS:
                for name, (daemon, folder) in daemons.items():
                    before = replies[name][-1]
                    before.append(ask_agent(daemon, folder, name.partition(":")[0], number, agent, before, args.answer))
            print(f"five.py: task {number} done", file=sys.stderr)
        return {name: (replies[name][args.warm_up:], audits(daemon)) for name, (daemon, _) in daemons.items()}


def speed(result, mode, base, times="each_ttft_ms"):
    """How many times as fast as in mode `base` agents 2 to 5 have their first tokens."""
    seconds = lambda name: sum(sum(task[1:]) for task in result[name][times])
    return seconds(base) / seconds(mode)


def mean_kl(rows):
    """Of the first tokens that were compared with exact ones; None where none was."""
    depths = rows["audits"]["the first token"]
    count = sum(a["audits"] for a in depths)
    return sum(a["kl_sum"] for a in depths) / count if count > 0 else None


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 70, 690, 24, 350


def frontier(result):
    """One point for each mode and budget, to the right the faster, further down the nearer to exact; as SVG."""
    base = next(iter(result))
    points = {mode: (speed(result, mode, base), mean_kl(rows)) for mode, rows in result.items() if mode != base}
    kls = [kl for _, kl in points.values() if kl] or [1e-2]
    decades = range(math.floor(math.log10(min(kls))) - 1, math.ceil(math.log10(max(kls))) + 1)
    fastest = max(1, math.ceil(max((x for x, _ in points.values()), default=1)))
    at_x = lambda x: LEFT + (RIGHT - LEFT) * x / fastest
    at_y = lambda kl: BOTTOM - (BOTTOM - TOP) * (math.log10(kl) - decades[0]) / (len(decades) - 1)
    text = lambda x, y, anchor, words: f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'
    line = lambda x1, y1, x2, y2: f'<path d="M{x1:.0f} {y1:.0f}L{x2:.0f} {y2:.0f}" stroke="#dde3e9"/>'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
           'font-size="12" fill="#333">', '<rect width="100%" height="100%" fill="#fff"/>']
    for decade in decades:
        y = at_y(10.0 ** decade)
        out += [line(LEFT, y, RIGHT, y), text(LEFT - 8, y + 4, "end", f"1e{decade}")]
    for x in range(0, fastest + 1, max(1, fastest // 10)):
        out += [line(at_x(x), TOP, at_x(x), BOTTOM), text(at_x(x), BOTTOM + 18, "middle", f"{x}x")]
    for mode, (x, kl) in points.items():
        y = at_y(kl) if kl else BOTTOM
        out.append(f'<circle cx="{at_x(x):.0f}" cy="{y:.0f}" r="5" stroke="#2f6fdb" '
                   f'fill="{"#2f6fdb" if kl else "none"}"/>')
        out.append(text(at_x(x), y - 10, "middle", mode))
    out.append(text((LEFT + RIGHT) / 2, HEIGHT - 8, "middle", f"time to first token, agents 2 to 5: as fast as {base}"))
    out.append(text(LEFT, TOP - 8, "start", "mean KL of first tokens, nats; hollow: exact, or not compared"))
    return "\n".join(out) + "\n</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--modes", default="off,exact,rotate,cacheblend,auto")
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--answer", type=int, default=512)
    parser.add_argument("--first", type=int, default=0, help="number of the first task: other numbers, other texts")
    parser.add_argument("--anchor-memory", default="512MiB", help="the daemons', for mode kvcomm")
    parser.add_argument("--svg", help="draw quality over speed into this file")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    args = parser.parse_args()
    result = {}
    for name, (tasks, compared) in run(args.modes.split(","), args).items():
        computed = lambda r: r["kvshare"]["recomputed_tokens"] + r["kvshare"]["fresh_tokens"]
        median = lambda value: [statistics.median(value(t[a]) for t in tasks) for a in range(5)]
        result[name] = {
            "prompt_tokens": median(lambda r: r["usage"]["prompt_tokens"]),
            "ttft_ms": median(lambda r: r["timings"]["ttft_ms"]),
            "ttft_cpu_ms": median(lambda r: r["ttft_cpu_ms"]),
            "prefix": median(lambda r: r["kvshare"]["prefix_tokens"]),
            "moved": median(lambda r: r["kvshare"]["moved_tokens"]),
            "computed": median(computed),
            "audits": compared,
            "each_ttft_ms": [[r["timings"]["ttft_ms"] for r in t] for t in tasks],
            "each_ttft_cpu_ms": [[r["ttft_cpu_ms"] for r in t] for t in tasks],
            "each_computed": [[computed(r) for r in t] for t in tasks],
            "approximate": [sum(t[a]["kvshare"]["approximate"] for t in tasks) for a in range(5)],
        }
    if args.svg:
        with open(args.svg, "w", encoding="utf-8") as f:
            f.write(frontier(result))
    if args.format == "json":
        print(json.dumps(result))
        return
    print(f"medians of {args.tasks} tasks; answers of {args.answer} tokens at most")
    print(f"  {'mode':16} agent   prompt   prefix    moved  computed   approximate    ttft ms     faster"
          "     cpu ms      less")
    base = next(iter(result.values()))
    for mode, rows in result.items():
        for a in range(5):
            prompt, prefix, moved, computed, approximate, ttft, cpu = (rows[column][a] for column in (
                "prompt_tokens", "prefix", "moved", "computed", "approximate", "ttft_ms", "ttft_cpu_ms"))
            print(f"  {mode:16} {a + 1:5} {prompt:8.0f} {prefix:8.0f} {moved:8.0f} {computed:9.0f} "
                  f"{approximate:10} of {args.tasks} {ttft:10.1f} {base['ttft_ms'][a] / ttft:9.2f}x "
                  f"{cpu:9.0f} {base['ttft_cpu_ms'][a] / cpu:8.2f}x")
    first = next(iter(result))
    for mode in result:
        print(f"  {mode}: agents 2 to 5 {speed(result, mode, first):.1f}x as fast as {first}, in sums over all tasks; "
              f"processor time {speed(result, mode, first, 'each_ttft_cpu_ms'):.1f}x less")
    for mode, rows in result.items():
        for times, tokens in zip(rows["each_ttft_ms"], rows["each_computed"]):
            print(f"  {mode}, ttft ms (tokens computed) of one task's agents: "
                  + ", ".join(f"{ms:.0f} ({n})" for ms, n in zip(times, tokens)))
        for token, depths in rows["audits"].items():
            for depth, a in enumerate(depths, 1):
                if a["audits"] > 0:
                    print(f"  {mode}, {depth} deep: {a['audits']} answers compared with exact, mean KL of {token} "
                          f"{a['kl_sum'] / a['audits']:.2g}, {a['failures']} above 0.05")


if __name__ == "__main__":
    main()
