"""An exact hit is token-granular and changes nothing; company changes nothing; SIGTERM drains."""

import concurrent.futures
import json
import os
import signal
import subprocess
import time
import unittest

from programs import BIN, MODEL, ProgramTest, talk

FACTS = " ".join(
    f"The {o} is in the {p}."
    for o, p in zip("key map lamp ring book".split(), "cellar attic tower chapel stable".split())
)


class ReuseTest(ProgramTest):
    def test_exact_hits_are_counted_to_the_token_and_harmless(self):
        with self.daemon("--reuse", "off", name="off") as (off, _), self.daemon("--reuse", "exact", name="on") as (
            on,
            _,
        ):
            first = talk("planner", FACTS + " Where is the lamp?")
            alone, cold, warm = self.ask(off, first, 16), self.ask(on, first, 16), self.ask(on, first, 16)
            n = alone["usage"]["prompt_tokens"]
            self.assertEqual(alone["ids"], cold["ids"])
            self.assertEqual(alone["ids"], warm["ids"])
            self.assertEqual(cold["kvshare"]["prefix_tokens"], 0)
            self.assertEqual(warm["kvshare"]["prefix_tokens"], n - 1)
            other = talk("planner", FACTS + " Where is the ring?")
            a, b = self.render(first), self.render(other)
            common = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
            partial = self.ask(on, other, 16)
            self.assertEqual(partial["kvshare"]["prefix_tokens"], common)
            self.assertEqual(partial["ids"], self.ask(off, other, 16)["ids"])
            for reply in (alone, cold, warm, partial):
                k = reply["kvshare"]
                total = reply["usage"]["prompt_tokens"]
                self.assertEqual(
                    k["prefix_tokens"] + k["moved_tokens"] + k["recomputed_tokens"] + k["fresh_tokens"], total
                )
                self.assertEqual(sum(m["tokens"] for m in k["miss_reasons"]), total - k["prefix_tokens"])
                self.assertFalse(k["approximate"])
            stat = self.json("stat", "--endpoint", on, "--format", "json")
            self.assertEqual(stat["requests"], 3)
            self.assertEqual(stat["prefix_tokens"], warm["kvshare"]["prefix_tokens"] + common)
            self.assertEqual(stat["pool"]["leases"], 0)

    def test_explanations_cover_the_prompt(self):
        with self.daemon() as (endpoint, _):
            messages = talk("planner", FACTS)
            reply = self.ask(endpoint, messages, 4, agent="planner")
            n = reply["usage"]["prompt_tokens"]
            for source in (
                ["--messages", self.path("e.json", messages)],
                ["--request", reply["kvshare"]["request_id"]],
            ):
                spans = self.json("explain", "--endpoint", endpoint, *source, "--format", "json")["spans"]
                at = 0
                for span in spans:
                    self.assertEqual(span["start"], at)
                    self.assertGreater(span["length"], 0)
                    at += span["length"]
                self.assertEqual(at, n)
            now = self.json("explain", "--endpoint", endpoint, "--messages", self.path("e.json"), "--format", "json")[
                "spans"
            ]
            self.assertEqual((now[0]["kind"], now[0]["length"], now[0]["source"]), ("exact", n - 1, "planner"))

    def test_eight_agents_in_company_answer_as_alone(self):
        asks = [talk(f"agent {i}", FACTS + f" Question {i}?") for i in range(8)]
        with self.daemon("--reuse", "off", name="alone") as (endpoint, _):
            alone = [self.ask(endpoint, a)["ids"] for a in asks]
        with self.daemon("--reuse", "exact", name="many") as (endpoint, _), concurrent.futures.ThreadPoolExecutor(
            8
        ) as pool:
            for _ in range(2):
                replies = pool.map(lambda i: self.ask(endpoint, asks[i], agent=f"a{i}")["ids"], range(8))
                self.assertEqual(list(replies), alone)
            self.assertEqual(len(self.json("stat", "--endpoint", endpoint, "--format", "json")["agents"]), 8)

    def test_sigterm_lets_a_running_reply_finish(self):
        with self.daemon() as (endpoint, process):
            client = subprocess.Popen(
                [
                    os.path.join(BIN, "kvctl"),
                    "generate",
                    "--endpoint",
                    endpoint,
                    "--prompt",
                    FACTS,
                    "--max-tokens",
                    "600",
                    "--ignore-eos",
                    "--format",
                    "json",
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            deadline = time.monotonic() + 30
            while self.json("stat", "--endpoint", endpoint, "--format", "json")["requests_running"] == 0:
                if client.poll() is not None or time.monotonic() > deadline:
                    break  # it was done before it was seen: draining has then nothing to wait for
            process.send_signal(signal.SIGTERM)
            out, _ = client.communicate(timeout=60)
            self.assertEqual(client.returncode, 0)
            self.assertEqual(len(json.loads(out)["ids"]), 600)
            self.assertEqual(process.wait(30), 0)

    def test_the_model_in_this_process_answers_as_the_daemon(self):
        messages = self.path("m.json", talk("planner", FACTS))
        here = self.json("generate", "--model", MODEL, "--messages", messages, "--max-tokens", 8, "--format", "json")
        with self.daemon() as (endpoint, _):
            there = self.json(
                "generate", "--endpoint", endpoint, "--messages", messages, "--max-tokens", 8, "--format", "json"
            )
        self.assertEqual(here["ids"], there["ids"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
