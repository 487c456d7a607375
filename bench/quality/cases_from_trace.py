#!/usr/bin/env python3
"""Cases for `kvctl bench quality --cases` from a recorded multi-agent trace (KTR-1 with texts, plain or .gz).

    bench/quality/cases_from_trace.py TRACE [--cases 40] [--max-chars 8000] [--every 3] > cases.jsonl

A case is one recorded request: its messages, its agent and session. `shared` are the messages whose text an earlier
request of the session had in its prompt or gave as its answer: what reuse would take from there. Requests without such
a message, of a session's first agent only, or longer than --max-chars are left out; of the others every N-th is taken,
so that short files see many sessions. Nothing of the trace is kept anywhere else.
"""

import argparse
import gzip
import json
import sys

ROLES = {"system", "user", "assistant"}


def read(path):
    """Segments by name, and requests in order."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8")
    segments, requests = {}, []
    with opened as lines:
        for line in lines:
            row = json.loads(line)
            if "seg" in row:
                segments[row["seg"]] = row.get("text", "")
            elif "request_id" in row:
                requests.append(row)
    return segments, requests


def messages_of(request, segments, outputs):
    messages = []
    for role, ref in request.get("segments", []):
        text = segments[outputs[ref[1:]]] if ref.startswith("@") else segments[ref]
        if role == "+" and messages:
            messages[-1]["content"] += text
        else:
            messages.append({"role": role if role in ROLES else "user", "content": text})
    return messages


def candidates(segments, requests, max_chars):
    outputs, seen = {}, {}
    for request in requests:
        session, agent = request.get("session_id", ""), request.get("agent_id", "")
        messages = messages_of(request, segments, outputs)
        texts = [message["content"].strip() for message in messages]
        by = seen.setdefault(session, {})  # text -> the agent that had it first
        shared = [i for i, text in enumerate(texts) if len(text) >= 150 and text in by]
        others = [i for i in shared if by[texts[i]] != agent]
        if others and sum(len(text) for text in texts) <= max_chars:
            yield {"id": request["request_id"], "kind": f"{len(messages)}_messages" if len(messages) < 6 else "longer",
                   "agent": agent, "session": session, "messages": messages, "shared": shared}
        for text in texts:
            by.setdefault(text, agent)
        if request.get("output"):
            outputs[request["request_id"]] = request["output"]
            by.setdefault(segments[request["output"]].strip(), agent)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--max-chars", type=int, default=8000)
    parser.add_argument("--every", type=int, default=3)
    args = parser.parse_args()
    try:
        found = list(candidates(*read(args.trace), args.max_chars))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"cases_from_trace: {args.trace}: not a KTR-1 trace with texts: {error!r}")
    chosen = found[:: args.every][: args.cases]
    if not chosen:
        sys.exit(f"cases_from_trace: {args.trace}: no request shares a text with an earlier one and is short enough")
    for case in chosen:
        print(json.dumps(case, ensure_ascii=False))
    print(f"cases_from_trace: {len(chosen)} of {len(found)} possible cases", file=sys.stderr)


if __name__ == "__main__":
    main()
