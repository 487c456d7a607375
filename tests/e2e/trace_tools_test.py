"""Hash traces become the tokens that the reference says; traces are converted, recorded and replayed again."""

import json
import os
import re
import unittest

from programs import MODEL, SOURCE, TRACE, ProgramTest

MASK = (1 << 64) - 1


def hash_text(text):
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def mix(a, b):
    z = (a + (b + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


class TraceToolsTest(ProgramTest):
    def vocabulary(self):
        """Words of the list in synthesis.cc that are one token each."""
        with open(os.path.join(SOURCE, "tools", "trace", "synthesis.cc"), encoding="utf-8") as f:
            listing = f.read().split("kWords =")[1].split(";")[0]
        words = " ".join(re.findall(r'"([^"]*)"', listing)).split()
        lines = self.path("words.jsonl", jsonl(dict(text=" " + w) for w in words))
        out = self.kvctl("tokenize", "--model", MODEL, "--jsonl", lines)[0]
        ids = []
        for line in out.splitlines():
            one = json.loads(line)["ids"]
            if len(one) == 1 and one[0] not in ids:
                ids += one
        self.assertGreater(len(ids), 16)
        return ids

    def dumped(self, trace, *options):
        dump = self.path("dump.jsonl")
        argv = ["--model", MODEL, "--compare", "exact", "--as-fast-as-possible", "--dump", dump, "--format", "json"]
        report = self.json("trace", "replay", trace, *argv, *options)
        return report, [json.loads(line) for line in self.read(dump).splitlines()]

    def test_blocks_become_the_tokens_that_the_reference_says(self):
        rows = [
            dict(timestamp=0, input_length=1100, output_length=2, hash_ids=[5, 6, 7]),
            dict(timestamp=1, input_length=1400, output_length=2, hash_ids=[5, 6, 9]),
            dict(timestamp=2, input_length=5000, output_length=2, hash_ids=list(range(20, 30))),
        ]
        report, got = self.dumped(self.path("m.jsonl", jsonl(rows)))
        vocabulary = self.vocabulary()
        space = mix(hash_text(""), 0)

        def token(row, at):
            return vocabulary[mix(mix(space, row["hash_ids"][at // 512]), at % 512) % len(vocabulary)]

        begins = [0, 0, 1024]  # 5,000 tokens lose two blocks to fit a window of 4,096 with two tokens of reply
        for row, begin, x in zip(rows, begins, got):
            self.assertEqual(x["ids"], [token(row, at) for at in range(begin, row["input_length"])])
            self.assertEqual(len(x["output_ids"]), 2)
        self.assertEqual([x["prefix_tokens"] for x in got], [0, 1024, 0])
        self.assertEqual(report["modes"]["exact"]["truncated_requests"], 1)

    def test_scopes_keep_equal_ids_apart(self):
        def rows(scope):
            yield dict(schema="ktr", version=1, block_size=64, hash_id_scope=scope)
            for i, (session, model) in enumerate([("x", "m"), ("y", "m"), ("x", "n"), ("x", "m")]):
                row = dict(request_id=str(i), session_id=session, model=model, output_length=1, input_length=150)
                yield dict(row, hash_ids=[1, 2])  # and 22 tokens that are nobody else's

        hits = {}
        for scope in ("global", "session"):
            hits[scope] = [x["prefix_tokens"] for x in self.dumped(self.path(scope, jsonl(rows(scope))))[1]]
        near = [hits["global"][1] - 128, hits["global"][3] - 128, hits["session"][3] - 128]
        self.assertTrue(all(0 <= n < 8 for n in near), hits)  # chance may add a token or two of the tails
        self.assertTrue(hits["global"][2] < 8 and hits["session"][1] < 8 and hits["session"][2] < 8, hits)

    def test_withheld_and_token_segments_are_prompts_too(self):
        ids = self.vocabulary()[:9]
        rows = [
            dict(schema="ktr", version=1),
            dict(seg="w", n_tokens=40),
            dict(seg="t", tokens=ids),
            dict(request_id="a", segments=[["user", "w"]], output="t"),
            dict(request_id="b", segments=[["raw", "t"]], output_length=1),
        ]
        _, got = self.dumped(self.path("s.jsonl", jsonl(rows)))
        self.assertGreaterEqual(len(got[0]["ids"]), 40)
        self.assertEqual(len(got[0]["output_ids"]), 9)
        self.assertEqual(got[1]["ids"], ids)

    def test_a_text_trace_as_mooncake_has_the_same_prefixes(self):
        out = self.path("m.jsonl.gz")
        self.kvctl("trace", "convert", TRACE, out, "--to", "mooncake", "--block", 16, "--model", MODEL)
        info = self.json("trace", "info", out, "--format", "json")
        self.assertEqual((info["format"], info["requests"], info["block_tokens"]), ("mooncake", 39, 16))
        again = self.path("again.jsonl")
        self.kvctl("trace", "convert", out, again, "--to", "mooncake", "--block", 16)
        _, rows = self.dumped(TRACE, "--limit", 12, "--max-output", 1)
        blocks = [json.loads(line)["hash_ids"] for line in self.read(again).splitlines()][:12]
        for i, (x, mine) in enumerate(zip(rows, blocks)):
            for y, other in zip(rows[:i], blocks):
                same = next((k for k in range(min(len(mine), len(other))) if mine[k] != other[k]), None)
                if same is None:
                    continue
                self.assertEqual(x["ids"][: same * 16], y["ids"][: same * 16])
                self.assertNotEqual(x["ids"][: same * 16 + 16], y["ids"][: same * 16 + 16])
        error = self.kvctl("trace", "convert", TRACE, out, "--to", "mooncake", code=2)[1]
        self.assertIn("--model", error)

    def test_what_a_daemon_was_asked_is_recorded_and_replays(self):
        say = "Please repeat after me, slowly and in full: the lamp is in the cellar, the key is in the attic."

        def user(text):
            return dict(role="user", content=text)

        asks = [
            dict(session="s", messages=[dict(role="system", content="You are the cook."), user(say)]),
            dict(agent="teller", prompt="Once upon a time", max_tokens=90, ignored=1),
            dict(session="s", agent="judge", messages=[user("Judge.")], max_tokens=3),
            dict(session="t", instructions="You are the cook.", input=say),
            dict(session="u", instructions="You are the cook.", input=[user(say)]),
        ]
        trace = self.path("r.ktr.jsonl.gz")
        with self.daemon() as (endpoint, _):
            lines = self.path("asks.jsonl", jsonl(asks))
            out = self.kvctl("trace", "record", lines, "--endpoint", endpoint, "--out", trace, "--max-tokens", 5)[0]
            bad = self.path("bad", "{\n")
            bad = self.kvctl("trace", "record", bad, "--endpoint", endpoint, "--out", trace + "2", code=1)
        replies = [json.loads(line) for line in out.splitlines()]
        self.assertEqual([r["request_id"] for r in replies], ["s/0", "0/0", "s/1", "t/0", "u/0"])
        self.assertLessEqual(replies[2]["completion_tokens"], 3)
        self.assertIn("line 1: not JSON", bad[1])
        info = self.json("trace", "info", trace, "--format", "json")
        self.assertEqual(info["agents"], {"cook": 3, "judge": 1, "teller": 1})
        self.assertEqual(info["prompt_tokens"], sum(r["prompt_tokens"] for r in replies))
        _, got = self.dumped(trace)
        self.assertEqual([len(x["ids"]) for x in got], [r["prompt_tokens"] for r in replies])
        self.assertEqual(got[3]["ids"], got[0]["ids"])
        self.assertEqual(got[4]["ids"], got[0]["ids"])
        self.assertEqual([len(x["output_ids"]) for x in got], [max(1, r["completion_tokens"]) for r in replies])

    def test_a_report_is_rendered_again(self):
        out = self.path("out")
        self.kvctl("trace", "replay", TRACE, "--model", MODEL, "--limit", 6, "--max-output", 1, "--out", out,
                   "--as-fast-as-possible")  # fmt: skip
        page, table = self.path("page.html"), self.path("modes.csv")
        report = os.path.join(out, "report.json")
        text = self.kvctl("trace", "report", report, "--out", page, "--csv", table)[0]
        self.assertIn("least recently used", text)
        self.assertEqual(self.read(page), self.read(os.path.join(out, "report.html")))
        self.assertEqual(len(self.read(table).splitlines()), 3)
        self.assertEqual(len(self.read(os.path.join(out, "requests.csv")).splitlines()), 13)
        self.assertIn("not a replay's report", self.kvctl("trace", "report", TRACE, code=1)[1])


if __name__ == "__main__":
    unittest.main(verbosity=2)
