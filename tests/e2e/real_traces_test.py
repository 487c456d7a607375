"""Real multi-agent traces replayed: every request reuses exactly what an independent script says it can, answers are
the same bit for bit with reuse off and exact, one at a time and 32 at once. Skipped where ../shared/traces is absent;
KVSHARE_SHARED says where it is otherwise, KVSHARE_TRACE_REQUESTS how many requests of each trace are sent."""

import bisect
import json
import os
import unittest

from programs import MODEL, SOURCE, ProgramTest

SHARED = os.environ.get("KVSHARE_SHARED", os.path.join(SOURCE, "..", "shared"))
LIMIT = int(os.environ.get("KVSHARE_TRACE_REQUESTS", "0"))


def common_prefix(a, b):
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class Ceiling:
    """Longest common prefix with anything stored before, found among the neighbours in sorted order."""

    def __init__(self):
        self.stored = []

    def of(self, ids):
        at = bisect.bisect(self.stored, ids)
        near = [self.stored[i] for i in (at - 1, at) if 0 <= i < len(self.stored)]
        return min(max((common_prefix(ids, other) for other in near), default=0), len(ids) - 1)

    def store(self, ids):
        bisect.insort(self.stored, ids)


class RealTracesTest(ProgramTest):
    def replay(self, trace, limit, slots, tokens):
        path = os.path.join(SHARED, "traces", trace)
        if not os.path.exists(path):
            self.skipTest(f"{path} is absent")
        dump = self.path("dump.jsonl")
        argv = ["--model", MODEL, "--compare", "off,exact", "--limit", LIMIT or limit, "--max-output", tokens]
        argv += ["--as-fast-as-possible", "--slots", slots, "--kv-pool-size", "8GiB", "--dump", dump]
        report = self.json("trace", "replay", path, *argv, "--format", "json")
        rows = [json.loads(line) for line in self.read(dump).splitlines()]
        off, exact = ([x for x in rows if x["mode"] == m] for m in ("off", "exact"))
        self.assertEqual(len(off), report["requests"])
        self.assertEqual(len(exact), report["requests"])
        for a, b in zip(off, exact):
            name = (trace, a["request_id"])
            self.assertEqual((a["request_id"], a["ids"]), (b["request_id"], b["ids"]), name)
            self.assertEqual(a["output_ids"], b["output_ids"], name)
            self.assertTrue(1 <= len(a["output_ids"]) <= tokens, name)
            for x in (a, b):
                counts = [x[k + "_tokens"] for k in ("prefix", "moved", "recomputed", "fresh")]
                self.assertEqual(sum(counts), len(x["ids"]), name)
                self.assertEqual(sum(m["tokens"] for m in x["miss_reasons"]), counts[2] + counts[3], name)
        modes = report["modes"]
        self.assertEqual(modes["off"]["outputs_sha256"], modes["exact"]["outputs_sha256"])
        self.assertEqual(modes["off"]["prefix_tokens"], 0)
        return report, exact

    def check_one_at_a_time(self, trace, limit):
        report, exact = self.replay(trace, limit, slots=1, tokens=1)
        ceiling, total = Ceiling(), 0
        for x in exact:
            best = ceiling.of(x["ids"])
            self.assertEqual(x["prefix_tokens"], best, (trace, x["request_id"]))
            total += best
            ceiling.store(x["ids"])
        self.assertGreater(total, 0)
        self.assertEqual(report["modes"]["exact"]["prefix_tokens"], total)
        for row in ("unlimited", "lru", "belady"):  # the pool holds everything
            self.assertEqual(report["ceilings"][row]["prefix_tokens"], total, row)

    def check_many_at_once(self, trace, limit):
        _, exact = self.replay(trace, limit, slots=32, tokens=3)
        self.assertGreater(sum(x["prefix_tokens"] for x in exact), 0)

    def test_ag2_group_chats(self):
        self.check_one_at_a_time("who-and-when/ag2_groupchat.ktr.jsonl.gz", 16)

    def test_crewai_crews(self):
        self.check_one_at_a_time("crewai-cassettes/crewai_multi.ktr.jsonl.gz", 40)

    def test_tau_bench(self):
        self.check_one_at_a_time("tau-bench/tau_airline.ktr.jsonl.gz", 24)

    def test_ag2_group_chats_32_at_once(self):
        self.check_many_at_once("who-and-when/ag2_groupchat.ktr.jsonl.gz", 12)

    def test_crewai_crews_32_at_once(self):
        self.check_many_at_once("crewai-cassettes/crewai_multi.ktr.jsonl.gz", 40)

    def test_tau_bench_32_at_once(self):
        self.check_many_at_once("tau-bench/tau_airline.ktr.jsonl.gz", 20)


if __name__ == "__main__":
    unittest.main(verbosity=2)
