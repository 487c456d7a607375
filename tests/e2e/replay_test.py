"""Replaying a trace: off and exact agree, prefix tokens equal an independent ceiling, reports hold together."""

import gzip
import json
import os
import unittest

from programs import MODEL, TRACE, ProgramTest


def common_prefix(a, b):
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class ReplayTest(ProgramTest):
    def replay(self, trace, *options):
        return self.json("trace", "replay", trace, "--compare", "off,exact", "--format", "json", *options)

    def test_the_shipped_trace_reuses_exactly_what_its_prompts_share(self):
        dump, out = self.path("dump.jsonl"), self.path("out")
        r = self.replay(
            TRACE,
            "--model",
            MODEL,
            "--limit",
            16,
            "--max-output",
            1,
            "--as-fast-as-possible",
            "--dump",
            dump,
            "--out",
            out,
        )
        rows = [json.loads(line) for line in self.read(dump).splitlines()]
        off, exact = ([x for x in rows if x["mode"] == m] for m in ("off", "exact"))
        self.assertEqual((len(off), len(exact), r["requests"]), (16, 16, 16))
        self.assertEqual(r["modes"]["off"]["outputs_sha256"], r["modes"]["exact"]["outputs_sha256"])
        self.assertEqual(r["modes"]["off"]["prefix_tokens"], 0)
        seen = []
        for x in exact:
            best = min(max((common_prefix(x["ids"], p) for p in seen), default=0), len(x["ids"]) - 1)
            self.assertEqual(x["prefix_tokens"], best, x["request_id"])
            seen.append(x["ids"])
        self.assertEqual(json.loads(self.read(os.path.join(out, "report.json"))), r)
        html = self.read(os.path.join(out, "report.html"))
        self.assertIn("<svg", html)
        self.assertNotIn("http", html.replace("http-equiv", ""))  # self-contained

    def test_a_daemon_replays_too_and_off_goes_first(self):
        with self.daemon("--reuse", "exact") as (endpoint, _):
            r = self.json(
                "trace",
                "replay",
                TRACE,
                "--endpoint",
                endpoint,
                "--compare",
                "exact,off",
                "--limit",
                6,
                "--max-output",
                2,
                "--as-fast-as-possible",
                "--slots",
                3,
                "--format",
                "json",
            )
        self.assertEqual(list(r["modes"]), ["off", "exact"])
        self.assertEqual(r["modes"]["off"]["outputs_sha256"], r["modes"]["exact"]["outputs_sha256"])
        self.assertGreater(r["modes"]["exact"]["prefix_tokens"], 0)

    def test_long_prompts_lose_whole_messages_and_keep_the_system_message(self):
        lines = [
            dict(schema="ktr", version=1),
            dict(seg="s", text="SYSTEM-RULES stay."),
            dict(seg="q", text="LAST question?"),
        ]
        lines += [dict(seg=f"m{i}", text=f"Message {i}. " + "The lamp is in the tower. " * 60) for i in range(12)]
        history = [["tool" if i % 2 else "narrator", f"m{i}"] for i in range(12)]
        lines.append(
            dict(
                request_id="r",
                session_id="w",
                agent_id="A",
                output_length=3,
                segments=[["system", "s"], *history, ["user", "q"]],
            )
        )
        lines.append(dict(seg="huge", text="The key is in the attic. " * 3000))
        lines.append(
            dict(
                request_id="h",
                session_id="w",
                agent_id="B",
                output_length=3,
                segments=[["system", "s"], ["user", "huge"]],
            )
        )
        path = self.path("long.ktr.jsonl.gz")
        with gzip.open(path, "wt") as f:
            f.write("\n".join(map(json.dumps, lines)))
        dump = self.path("dump.jsonl")
        r = self.replay(path, "--model", MODEL, "--as-fast-as-possible", "--dump", dump)
        self.assertEqual(r["modes"]["off"]["truncated_requests"], 2)
        ids = [json.loads(line)["ids"] for line in self.read(dump).splitlines()][:2]
        text = self.kvctl(
            "detokenize",
            "--model",
            MODEL,
            "--jsonl",
            self.path("i.jsonl", "\n".join(json.dumps(dict(ids=i)) for i in ids)),
        )[0]
        cut, huge = (json.loads(line)["text"] for line in text.splitlines())
        for prompt, n in ((cut, len(ids[0])), (huge, len(ids[1]))):
            self.assertIn("SYSTEM-RULES stay.", prompt)
            self.assertLessEqual(n, 4096 - 3)
        self.assertIn("LAST question?", cut)
        self.assertIn("Message 11.", cut)
        self.assertNotIn("Message 0.", cut)
        self.assertGreater(len(ids[1]), 4000)


if __name__ == "__main__":
    unittest.main(verbosity=2)
