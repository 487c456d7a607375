"""Every command of kvctl that talks to a daemon, once and as documented, against a real one."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import unittest

from programs import BIN, MODEL, SOURCE, ProgramTest, talk

SECTIONS = ("server", "model", "pool", "cold", "reuse", "agents")


class CommandsTest(ProgramTest):
    def refuse(self, code, word, *argv):
        _, err = self.kvctl(*argv, code=code)
        self.assertIn(word, err)
        self.assertEqual(len(err.strip().splitlines()), 1, err)

    def test_all_of_them(self):
        with self.daemon("--kv-pool-size", "256MiB") as (endpoint, _):
            to = ("--endpoint", endpoint)
            as_json = (*to, "--format", "json")
            long = talk("planner", "Where is the lamp? " * 40)
            messages = self.path("m.json", long)
            reply = self.ask(endpoint, long, agent="planner", session="s")
            self.ask(endpoint, talk("coder", "Where is the key?"), agent="coder")

            # info, stat, top
            info = self.json("info", *as_json)
            self.assertEqual(tuple(info), SECTIONS)
            for section in SECTIONS:
                one = self.json("info", section, *as_json)
                self.assertEqual(set(one[section]), set(info[section]))
                self.assertIn("# " + section, self.kvctl("info", section, *to)[0])
            self.assertEqual(info["agents"]["planner"]["requests"], 1)
            self.assertEqual(info["reuse"]["requests"], 2)
            self.refuse(2, "SECTION", "info", "weather", *to)
            stat = self.json("stat", *as_json)
            self.assertEqual(stat["requests"], 2)
            self.assertEqual(stat["ttft_ms"]["count"], 2)
            self.assertGreater(stat["uptime_s"], 0)
            lines = self.kvctl("stat", *to, "-i", "0.05", "-n", "3")[0].splitlines()
            self.assertEqual(len(lines), 4, "a header and three lines")
            self.assertEqual(len(self.kvctl("stat", *as_json, "-i", "0.05", "-n", "2")[0].splitlines()), 2)
            self.assertIn("agent      planner", self.kvctl("stat", *to)[0])
            top = self.json("top", *as_json, "-i", "0.05")
            self.assertEqual({a["agent"] for a in top["agents"]}, {"planner", "coder"})
            text = self.kvctl("top", *to, "-i", "0.05")[0]
            self.assertEqual((text.count("planner"), text.count("coder")), (1, 1))
            self.assertNotIn("\033", text, "no terminal, no escape codes")

            # explain
            spans = self.json("explain", *as_json, "--messages", messages, "--agent", "a", "--session", "s")["spans"]
            self.assertEqual(spans[0]["kind"], "exact")
            self.assertEqual(spans[0]["source"], "planner")
            off = self.json("explain", *as_json, "--messages", messages, "--reuse", "off")["spans"]
            self.assertEqual({s["kind"] for s in off}, {"fresh"})
            self.assertIn("never_stored", self.kvctl("explain", *to, "--request", reply["kvshare"]["request_id"])[0])

            # ls, inspect, pin, unpin, prefetch, evict, clear
            entries = self.json("ls", *as_json)["entries"]
            self.assertGreater(sum(e["tokens"] for e in entries if e["source"] == "planner"), 64)
            self.assertEqual(len(self.json("ls", *as_json, "--limit", "1")["entries"]), 1)
            self.assertIn(entries[0]["key"][:16], self.kvctl("ls", *to)[0])
            root = next(e for e in entries if e["start"] == 0 and e["source"] == "planner" and e["tokens"] == 64)
            page = self.json("inspect", root["key"][:24], *as_json)
            self.assertEqual(page["key"], root["key"])
            self.assertEqual(len(page["ids"]), 64)
            self.assertIn("planner", page["text"])
            self.assertIn(root["key"], self.kvctl("inspect", root["key"], *to)[0])
            self.refuse(4, "0000", "inspect", "0" * 64, *to)
            self.refuse(1, "key", "inspect", "not-a-key", *to)

            pin = self.json("pin", "--messages", messages, *as_json)
            self.assertGreater(pin["tokens"], 64)
            self.assertTrue(self.json("inspect", pin["key"], *as_json)["pinned"])
            self.assertGreater(self.json("stat", *as_json)["pool"]["pinned_bytes"], 0)
            self.kvctl("clear", "--yes", *to)
            self.assertTrue(self.json("inspect", pin["key"], *as_json)["pinned"], "a pin outlives clear")
            self.assertIn("unpinned", self.kvctl("unpin", pin["key"], *to)[0])
            self.refuse(4, "", "unpin", pin["key"], *to)
            self.refuse(4, "", "pin", "--prompt", "never seen before", *to)
            self.assertEqual(self.json("prefetch", "--messages", messages, *as_json)["tokens"], pin["tokens"])
            self.refuse(2, "KEY", "evict", "", *to)
            self.refuse(2, "from 0.05", "stat", "-i", "nan", *to)
            self.assertIn("dropped", self.kvctl("evict", root["key"], *to)[0])
            self.refuse(4, "", "evict", root["key"], *to)
            self.refuse(2, "--yes", "clear", *to)
            self.refuse(2, "--tier", "clear", "--tier", "moon", "--yes", *to)
            self.kvctl("clear", "--tier", "host", "--yes", *to)
            self.assertEqual(self.json("ls", *as_json)["entries"], [])
            self.assertEqual(self.json("stat", *as_json)["pool"]["used_bytes"], 0)

    def test_drain_ends_the_daemon(self):
        with self.daemon() as (endpoint, process):
            self.assertTrue(self.json("drain", "--endpoint", endpoint, "--format", "json")["draining"])
            self.assertEqual(process.wait(30), 0)

    def test_a_signal_behind_a_drain_stops_nothing_that_runs(self):
        with self.daemon() as (endpoint, process), contextlib.ExitStack() as stack:
            command = [os.path.join(BIN, "kvctl"), "generate", "--endpoint", endpoint, "--prompt", "A note."]
            command += ["--max-tokens", "1500", "--ignore-eos"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            asking = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(8)]
            for one in asking:
                one.stdout.read(1)  # it runs
            self.kvctl("drain", "--endpoint", endpoint)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(60), 0)
            for one in asking:
                _, told = one.communicate(timeout=60)
                self.assertEqual(one.returncode, 0, told)
                self.assertIn("1500 tokens", told)

    def test_connections_may_be_more_than_the_shell_lets_files_be(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 1024:
            self.skipTest(f"this process may open {hard} files at most")
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        try:
            with self.daemon() as (endpoint, process):
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1024), hard))
                with contextlib.ExitStack() as stack:
                    for _ in range(300):
                        client = stack.enter_context(socket.socket(socket.AF_UNIX))
                        client.connect(endpoint[len("ipc://") :])
                    self.kvctl("ping", "--endpoint", endpoint)
                    self.assertGreater(len(os.listdir(f"/proc/{process.pid}/fd")), 300)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_few_files_and_endpoints_for_everybody_are_warned_of(self):
        limited = ["sh", "-c", 'ulimit -n 1000 && exec "$0" "$@"', os.path.join(BIN, "agentd")]
        p = subprocess.Popen(
            [*limited, "--model", MODEL, "--listen", "tcp://0.0.0.0:0"], stderr=subprocess.PIPE, text=True
        )
        with p:
            told = []
            for line in p.stderr:
                told.append(line)
                if "ready at" in line:
                    break
            p.terminate()
            self.assertEqual(p.wait(30), 0)
        told = "".join(told)
        self.assertIn("1000 files at most", told)
        self.assertIn("ulimit -n", told)
        self.assertIn("--listen: 0.0.0.0 can be reached from elsewhere", told)

    def test_a_pool_larger_than_the_machine_is_warned_of(self):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with self.daemon("--kv-pool-size", total + 1, name="large"):
            pass
        self.assertIn("the KV pool may grow to", self.read(self.path("large.log")))
        with self.daemon("--kv-pool-size", "64MiB", name="small"):
            pass
        self.assertNotIn("KV pool may grow", self.read(self.path("small.log")))

    def test_interrupted_stat_says_130(self):
        with self.daemon() as (endpoint, _):
            p = subprocess.Popen(
                [os.path.join(BIN, "kvctl"), "stat", "--endpoint", endpoint, "-i", "0.05"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2):
                self.assertTrue(p.stdout.readline())
            p.send_signal(signal.SIGINT)
            p.communicate(timeout=30)
            self.assertEqual(p.returncode, 130)

    def test_nobody_there_is_3_and_a_misspelt_command_is_2(self):
        nobody = ("--endpoint", "ipc://" + self.path("nobody.sock"), "--timeout", "200ms")
        for command in (("info",), ("stat",), ("top",), ("ls",), ("inspect", "00"), ("evict", "00"), ("unpin", "00"),
                        ("clear", "--yes"), ("pin", "--prompt", "x"), ("prefetch", "--prompt", "x"), ("drain",)):
            self.refuse(3, "ipc://", *command, *nobody)
        for wrong, right in (("inspct", "inspect"), ("prefech", "prefetch"), ("tpo", "top"), ("evcit", "evict")):
            self.refuse(2, f"did you mean '{right}'?", wrong, *nobody)

    def test_doctor_judges_the_disk(self):
        new = self.path("not/there/yet")
        facts = self.json("doctor", "--cold-dir", new, "--format", "json")
        self.assertGreater(facts["cold_dir"]["free_bytes"], 0)
        self.assertTrue(any("memfd" in c["check"] for c in facts["checks"]))
        self.assertFalse(os.path.exists(new), "judging leaves nothing behind")
        facts = self.json("doctor", "--cold-dir", self.path("file", "x"), "--format", "json")
        self.assertTrue(any(not c["ok"] and "not a directory" in c["advice"] for c in facts["checks"]))

    def test_doctor_says_whether_a_gpu_can_be_used_and_why_not(self):
        def cuda(plugin=None):
            if plugin is not None:
                os.environ["KVSHARE_CUDA_PLUGIN"] = plugin
            try:
                return self.json("doctor", "--format", "json")
            finally:
                os.environ.pop("KVSHARE_CUDA_PLUGIN", None)

        facts = cuda()
        check = next(c for c in facts["checks"] if c["check"] == "the CUDA backend can be used")
        self.assertEqual(check["ok"], facts["cuda"]["usable"])
        self.assertEqual(bool(facts["cuda"]["reason"]), not facts["cuda"]["usable"])
        facts = cuda(self.path("nowhere.so"))
        self.assertFalse(facts["cuda"]["usable"])
        self.assertIn("nowhere.so", facts["cuda"]["reason"])

    def test_every_command_is_in_the_reference(self):
        with open(os.path.join(SOURCE, "docs", "reference", "kvctl.md"), encoding="utf-8") as f:
            reference = f.read()
        out = self.kvctl("--help")[0]
        commands = [line.split()[0] for line in out.split("Subcommands:")[1].splitlines() if line.startswith("  ") and
                    line[2] != " "]
        self.assertGreater(len(commands), 15)
        for command in commands:
            self.assertIn("`" + command, reference, command)


if __name__ == "__main__":
    unittest.main(verbosity=2)
