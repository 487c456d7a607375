#!/usr/bin/env python3
"""What mode auto gains on a recorded multi-agent log after it has learnt from another part of it.

  bench/system/real_log.py TRACE --model MODEL [--learn 150] [--measure 150] [--max-output 16]
                           [--modes exact,auto]

TRACE is KTR-1 with texts. A daemon with a cold directory is asked the first --learn requests in mode auto, and after
each is left alone until it has nothing more to do: it heals answers and audits what it does not trust yet. Then a
daemon for each of --modes, with what was learnt and nothing that was stored, is asked the sessions after those, about
--measure requests, without pauses. They take turns, request by request, and whose turn it is not is stopped, because
a machine that others use too has fast and slow minutes. Prints time to first token by what became of the requests in
mode auto, beside the first of the other modes. --learn 0: what a daemon gains that knows nothing.

Prints a table, or one JSON object with --format json. Standard library only.
"""

import argparse
import contextlib
import glob
import json
import os
import shutil
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "quality"))
from cases_from_trace import messages_of, read  # noqa: E402
from line import Daemon, kvctl  # noqa: E402


def ask(daemon, folder, request, mode, max_output):
    path = os.path.join(folder, "messages.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(request["messages"], f)
    return kvctl("generate", "--endpoint", daemon.endpoint, "--messages", path, "--max-tokens", max_output,
                 "--reuse", mode, "--agent", request["agent"], "--session", request["session"])


def approximate(daemon):
    return kvctl("stat", "--endpoint", daemon.endpoint)["approximate"]


def wait_until_idle(daemon, most_seconds=60):
    """Until nothing has been learnt for a while: half a second, which is longer than one step of anything takes."""
    before, since = None, time.monotonic()
    begin = since
    while time.monotonic() - since < 0.5 and time.monotonic() - begin < most_seconds:
        stats = approximate(daemon)
        now = (stats["healed"], stats["shadow_audits"]["audits"], stats["sent_back"])
        healing = stats["healed"] < stats["answers"]
        if now != before or healing:
            before, since = now, time.monotonic()
        time.sleep(0.05)


def fate(reply):
    if reply["kvshare"]["approximate"]:
        return "over chunks"
    reasons = {miss["reason"] for miss in reply["kvshare"]["miss_reasons"]}
    if "quality_guard" in reasons:
        return "sent back"
    return "declined" if reasons & {"not_trusted", "move_slower_than_recompute"} else "nothing found"


def requests_of(path, fits):
    segments, recorded = read(path)
    outputs, requests = {}, []
    for row in recorded:
        messages = messages_of(row, segments, outputs)
        if row.get("output"):
            outputs[row["request_id"]] = row["output"]
        if sum(len(m["content"]) for m in messages) <= fits:
            requests.append({"messages": messages, "agent": row.get("agent_id", ""),
                             "session": row.get("session_id", "")})
    return requests


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--model", required=True)
    parser.add_argument("--learn", type=int, default=150)
    parser.add_argument("--measure", type=int, default=150)
    parser.add_argument("--max-output", type=int, default=16)
    parser.add_argument("--max-chars", type=int, default=20000, help="longer prompts are left out")
    parser.add_argument("--modes", default="exact,auto")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    args = parser.parse_args()
    requests = requests_of(args.trace, args.max_chars)
    end = args.learn
    while 0 < end < len(requests) and requests[end]["session"] == requests[end - 1]["session"]:
        end += 1  # a session is learnt from or measured, not both
    measured = requests[end:end + args.measure]
    if not measured:
        sys.exit(f"real_log.py: {args.trace} has {len(requests)} requests, nothing is left to measure after {end}")
    result = {"learnt_from": end, "measured": len(measured), "passes": []}
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--cold-dir", "cold", "--cold-size", "1GiB")  # in its folder
        with Daemon(args.model, folder, *flags) as daemon:
            for request in requests[:end]:
                ask(daemon, folder, request, "auto", args.max_output)
                wait_until_idle(daemon)
            result["learning"] = approximate(daemon)
        guards = glob.glob(os.path.join(folder, "cold", "**", "*.guard"), recursive=True)
        with contextlib.ExitStack() as stack:
            runs = []
            for mode in args.modes.split(","):
                own = stack.enter_context(tempfile.TemporaryDirectory())
                for guard in guards:
                    copy = os.path.join(own, os.path.relpath(guard, folder))
                    os.makedirs(os.path.dirname(copy), exist_ok=True)
                    shutil.copy(guard, copy)
                runs.append((mode, stack.enter_context(Daemon(args.model, own, *flags)), []))
                runs[-1][1].wait_for_its_turn()
            for request in measured:
                for mode, daemon, replies in runs:
                    with daemon.its_turn():
                        begin = time.monotonic()
                        reply = ask(daemon, folder, request, mode, args.max_output)
                        replies.append({**reply, "wall_s": time.monotonic() - begin})
            for mode, daemon, replies in runs:
                with daemon.its_turn():
                    counters = approximate(daemon)
                result["passes"].append({
                    "mode": mode, "wall_s": sum(r["wall_s"] for r in replies), "approximate": counters,
                    "ttft_ms": [r["timings"]["ttft_ms"] for r in replies], "fate": [fate(r) for r in replies],
                    "text": [r["text"] for r in replies],
                    "moved": sum(r["kvshare"]["moved_tokens"] for r in replies),
                    "prefix": sum(r["kvshare"]["prefix_tokens"] for r in replies),
                    "prompt": sum(r["usage"]["prompt_tokens"] for r in replies)})
    passes = result["passes"]
    base = next((p for p in passes if p["mode"] != "auto"), passes[0])
    for p in passes:
        p["identical"] = sum(a == b for a, b in zip(p["text"], base["text"]))
    if args.format == "json":
        print(json.dumps(result))
        return
    learnt = result["learning"]
    print(f"learnt from {end} requests: {learnt['shadow_audits']['audits']} shadow audits, "
          f"{learnt['shadow_audits']['failures']} above 0.05; margins asked: {learnt['guard_margin']:.2f} nats in one "
          f"thread, {learnt['guard_margin_elsewhere']:.2f} elsewhere")
    print(f"then {len(measured)} requests; time to first token in s")
    print(f"  {'mode':6} {'prompt':>8} {'prefix':>8} {'moved':>8} {'first tokens':>13} {'faster':>8} {'whole':>8} "
          f"{'same text':>10}")
    for p in passes:
        print(f"  {p['mode']:6} {p['prompt']:8} {p['prefix']:8} {p['moved']:8} {sum(p['ttft_ms']) / 1000:13.1f} "
              f"{sum(base['ttft_ms']) / sum(p['ttft_ms']):7.2f}x {p['wall_s']:8.1f} {p['identical']:10}")
    for p in passes:
        if p["mode"] != "auto":
            continue
        for what in ("over chunks", "sent back", "declined", "nothing found"):
            rows = [i for i, f in enumerate(p["fate"]) if f == what]
            mine, theirs = (sum(q["ttft_ms"][i] for i in rows) for q in (p, base))
            if rows:
                print(f"  auto, {what}: {len(rows)} requests, {theirs / mine:.2f}x")
        a = p["approximate"]
        for token, depths in (("first", a["audits"]), ("later", a["later_audits"])):
            print(f"  auto: {sum(d['audits'] for d in depths)} {token} tokens compared with exact, "
                  f"{sum(d['failures'] for d in depths)} above 0.05 nats")


if __name__ == "__main__":
    main()
