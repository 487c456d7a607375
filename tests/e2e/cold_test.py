"""The cold tier through the programs: a warm restart, one daemon for each directory, what is said when it is wrong."""

import os
import re
import unittest

from programs import MODEL, ProgramTest, talk

PLACES = [("key", "attic"), ("map", "cellar")] * 12
NOTE = " ".join(f"Note {i}: the {thing} is in the {place}." for i, (thing, place) in enumerate(PLACES))


class ColdTest(ProgramTest):
    def questions(self, endpoint):
        return [
            self.ask(endpoint, talk(agent, f"{NOTE} Where is the {thing}?"), agent=agent)
            for agent in ("planner", "coder")
            for thing in ("key", "map")
        ]

    def test_a_restart_is_warm(self):
        cold = ("--cold-dir", self.path("cold"), "--cold-size", "1GiB")
        with self.daemon("--reuse", "off", name="off") as (endpoint, _):
            want = [r["ids"] for r in self.questions(endpoint)]
        with self.daemon(*cold, name="first") as (endpoint, _):
            self.assertEqual([r["ids"] for r in self.questions(endpoint)], want)
        with self.daemon(*cold, name="second") as (endpoint, _):
            answers = self.questions(endpoint)
            self.assertEqual([r["ids"] for r in answers], want)
            self.assertGreater(answers[0]["kvshare"]["prefix_tokens"], 64, "the first request after a restart is cold")
            stat = self.json("stat", "--endpoint", endpoint, "--format", "json")["cold"]
            self.assertGreater(stat["hits"], 0)
            self.assertEqual(stat["integrity_errors"], 0)
            self.assertEqual(stat["state"], "ok")
            # Another daemon on the same directory is refused, and this one goes on.
            self.agentd_refuses(
                1, self.path("cold"), args=("--model", MODEL, "--listen", "ipc://" + self.path("o.sock"), *cold)
            )
            self.assertTrue(self.questions(endpoint))

    def test_entries_move_between_tiers(self):
        with self.daemon("--cold-dir", self.path("cold"), "--cold-size", "1GiB", name="first") as (endpoint, _):
            self.questions(endpoint)
        with self.daemon("--cold-dir", self.path("cold"), "--cold-size", "1GiB") as (endpoint, _):
            to = ("--endpoint", endpoint, "--format", "json")
            entries = self.json("ls", *to)["entries"]
            self.assertTrue(entries)
            self.assertEqual({e["tier"] for e in entries}, {"cold"})
            prompt = self.path("p.json", talk("planner", f"{NOTE} Where is the key?"))
            tokens = self.json("prefetch", "--messages", prompt, *to)["tokens"]
            self.assertGreater(tokens, 64)
            self.assertIn("host", "".join(e["tier"] for e in self.json("ls", *to)["entries"]))
            self.assertGreater(self.json("clear", "--tier", "host", "--yes", *to)["dropped_pages"], 0)
            self.assertEqual({e["tier"] for e in self.json("ls", *to)["entries"]}, {"cold"})
            self.assertGreater(self.json("clear", "--yes", *to)["dropped_pages"], 0)
            self.assertEqual(self.json("ls", *to)["entries"], [])

    def test_a_disk_that_fails_keeps_nobody_from_being_served(self):
        cold = ("--cold-dir", self.path("cold"), "--cold-size", "1GiB")
        with self.daemon(*cold, name="first") as (endpoint, _):
            want = [r["ids"] for r in self.questions(endpoint)]
        space = next(name for name in os.listdir(self.path("cold")) if name.startswith("space-"))
        os.rename(self.path("cold/" + space), self.path("aside"))
        self.path("cold/" + space, "no directory can be made here")
        with self.daemon(*cold, name="without") as (endpoint, _):
            self.assertEqual([r["ids"] for r in self.questions(endpoint)], want)
            stat = self.json("stat", "--endpoint", endpoint, "--format", "json")["cold"]
            self.assertIn(space, stat["state"])
            self.assertEqual(stat["entries"], 0)
        said = self.read(self.path("without.log"))
        self.assertIn("nothing is kept on disk or found there until the next start: ", said)
        os.remove(self.path("cold/" + space))
        os.rename(self.path("aside"), self.path("cold/" + space))
        with self.daemon(*cold, name="again") as (endpoint, _):
            self.assertGreater(self.questions(endpoint)[0]["kvshare"]["prefix_tokens"], 64)

    def test_directories_that_cannot_be_used_are_named(self):
        args = ("--model", MODEL, "--listen", "ipc://" + self.path("x.sock"))
        file = self.path("file", "x")
        self.agentd_refuses(2, file, args=(*args, "--cold-dir", file))

    def test_the_least_that_is_named_will_do(self):
        args = ("--model", MODEL, "--listen", "ipc://" + self.path("x.sock"), "--cold-dir", self.path("c"))
        told = self.agentd_refuses(2, "--cold-size: 1 bytes", "at least", args=(*args, "--cold-size", "1"))
        least = int(re.search(r"at least (\d+)", told)[1])
        self.agentd_refuses(2, f"at least {least}", args=(*args, "--cold-size", least - 1))
        with self.daemon("--cold-dir", self.path("c"), "--cold-size", least, name="least"):
            pass


if __name__ == "__main__":
    unittest.main(verbosity=2)
