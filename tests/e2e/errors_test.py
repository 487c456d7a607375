"""Every wrong input gets one clear line and the right exit code, and the daemon lives on."""

import json
import os
import shutil
import subprocess
import unittest

from programs import BIN, MODEL, ProgramTest, talk


class ErrorsTest(ProgramTest):
    def refuse(self, code, word, *argv):
        out, err = self.kvctl(*argv, code=code)
        self.assertIn(word.lower(), err.lower())
        self.assertNotIn("terminate called", err)
        self.assertEqual(len(err.strip().splitlines()), 1, err)

    def test_usage_names_the_flag_and_the_nearest_one(self):
        self.refuse(2, "--modle", "logits", "--modle", MODEL)
        self.refuse(2, "did you mean '--model'", "logits", "--modle", MODEL)
        self.refuse(2, "did you mean 'generate'", "generat", "--model", MODEL)
        self.refuse(2, "--max-tokens", "generate", "--model", MODEL, "--prompt", "x", "--max-tokens", "many")
        self.refuse(2, "--max-tokens", "generate", "--model", MODEL, "--prompt", "x", "--max-tokens", "0")
        self.refuse(2, "--timeout", "ping", "--endpoint", "ipc:///x", "--timeout", "soon")
        self.refuse(2, "--chunks", "logits", "--model", MODEL, "--ids", "x", "--out", "y", "--chunks", "7,0")
        self.refuse(2, "--reuse", "generate", "--model", MODEL, "--prompt", "x", "--reuse", "kvcom")
        self.refuse(2, "--dtype", "logits", "--model", MODEL, "--ids", "x", "--out", "y", "--dtype", "int4")
        self.refuse(2, "--endpoint", "ping", "--endpoint", "nonsense")
        self.refuse(2, "exactly one", "generate", "--prompt", "x")
        self.refuse(2, "--model", "model")
        self.refuse(2, "subcommand", "bench")

    def test_models_that_cannot_be_loaded(self):
        ids = self.path("ids.json", dict(ids=[5]))
        logits = ["--ids", ids, "--out", self.path("o.npy")]
        self.refuse(5, "no-such", "logits", "--model", self.path("no-such"), *logits)
        copy = self.path("copy")
        shutil.copytree(MODEL, copy)
        for name, size in (("model.safetensors", 1000), ("tokenizer.json", 500), ("config.json", 10)):
            whole = self.read(os.path.join(copy, name), "rb")
            with open(os.path.join(copy, name), "wb") as f:
                f.write(whole[:size])
            self.refuse(5, name, "logits", "--model", copy, *logits)
            with open(os.path.join(copy, name), "wb") as f:
                f.write(whole)
        os.remove(os.path.join(copy, "model.safetensors"))
        self.refuse(5, "copy", "logits", "--model", copy, *logits)

    def test_a_gpu_that_cannot_be_used_says_why(self):
        argv = ["logits", "--model", MODEL, "--ids", self.path("ids.json", dict(ids=[5, 6, 7]))]
        self.refuse(2, "cpu, cuda or auto", *argv, "--out", self.path("o.npy"), "--device", "gpu")
        for dtype, device, why in (("float32", "cuda", "not in float32"), ("float16", "cpu", "add --device cuda")):
            self.refuse(2, why, *argv, "--out", self.path("o.npy"), "--device", device, "--dtype", dtype)
        self.refuse(2, "on the CPU", "generate", "--model", MODEL, "--prompt", "x", "--dtype", "float16")
        os.environ["KVSHARE_CUDA_PLUGIN"] = self.path("nowhere.so")
        try:
            self.refuse(5, "nowhere.so", *argv, "--out", self.path("o.npy"), "--device", "cuda")
            self.kvctl(*argv, "--out", self.path("auto.npy"), "--device", "auto")
        finally:
            del os.environ["KVSHARE_CUDA_PLUGIN"]
        self.kvctl(*argv, "--out", self.path("cpu.npy"))
        self.assertEqual(self.read(self.path("auto.npy"), "rb"), self.read(self.path("cpu.npy"), "rb"))

    def test_wrong_ids_and_messages(self):
        for bad in (
            dict(ids=[]),
            dict(ids=[-1]),
            dict(ids=[10**9]),
            dict(ids="x"),
            dict(),
            [1],
            "{",
            dict(ids=[2048]),
            dict(ids=[5] * 4097),
        ):
            self.refuse(
                1,
                "bad.json",
                "logits",
                "--model",
                MODEL,
                "--ids",
                self.path("bad.json", bad),
                "--out",
                self.path("o.npy"),
            )
        for bad in (
            [],
            [dict(content="x")],
            [dict(role=1, content="x")],
            "{",
            dict(messages=[]),
            [dict(role="user")],
        ):
            self.refuse(1, "bad.json", "render", "--model", MODEL, "--messages", self.path("bad.json", bad))
        self.refuse(4, "none.json", "render", "--model", MODEL, "--messages", self.path("none.json"))

    def test_numbers_that_are_none_are_usage(self):
        generate = ("generate", "--model", MODEL, "--prompt", "x", "--max-tokens", 1)
        for flag, value, why in (
            ("--temperature", "nan", "'nan' is not a number from 0 to 100"),
            ("--seed", "-1", "'-1' is not a whole number from 0"),
            ("--seed", "18446744073709551616", "'18446744073709551616' is not a whole number from 0"),
            ("--temperature", "-1", "'-1' is not a number from 0 to 100"),
            ("--top-p", "0", "'0' is not a number above 0 and at most 1"),
            ("--top-p", "1.5x", "'1.5x' is not a number above 0 and at most 1"),
            ("--stop", "", "--stop: it is empty"),
        ):
            self.refuse(2, why, *generate, flag, value)
        self.kvctl(*generate, "--temperature", "0.5", "--top-p", "1", "--top-k", 3)
        for request in ("0", "-1", "nan", ""):
            self.refuse(2, "is no request's id", "explain", "--endpoint", "ipc:///x", "--request", request)

    def test_nobody_there(self):
        self.refuse(3, "ipc://", "ping", "--endpoint", "ipc://" + self.path("nobody.sock"), "--timeout", "300ms")
        self.refuse(3, "ipc://", "stat", "--endpoint", "ipc://" + self.path("nobody.sock"), "--timeout", "300ms")

    def test_a_daemon_survives_bad_requests(self):
        with self.daemon() as (endpoint, _):
            for bad in ([], [dict(role="user")], [dict(role=1, content="x")], "{", dict(messages=[])):
                self.kvctl(
                    "generate",
                    "--endpoint",
                    endpoint,
                    "--messages",
                    self.path("bad.json", bad),
                    "--max-tokens",
                    4,
                    code=1,
                )
            long = self.path("long.json", dict(ids=[5] * 5000))
            self.refuse(1, "4096", "generate", "--endpoint", endpoint, "--ids", long, "--max-tokens", 4)
            self.refuse(
                1,
                "vocabulary",
                "generate",
                "--endpoint",
                endpoint,
                "--ids",
                self.path("far.json", dict(ids=[2048])),
                "--max-tokens",
                4,
            )
            self.refuse(4, "request", "explain", "--endpoint", endpoint, "--request", 999999)
            self.assertTrue(self.ask(endpoint, talk("planner", "Hi"))["ids"])

    def test_agentd_refuses_what_it_cannot_listen_on(self):
        p = subprocess.run(
            [os.path.join(BIN, "agentd"), "--model", MODEL, "--listen", "nonsense"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual(p.returncode, 2)
        self.assertIn("nonsense", p.stderr)

    def test_agentd_says_why_it_cannot_use_a_gpu(self):
        agentd = ("--model", MODEL, "--listen", "ipc://" + self.path("g.sock"), "--device", "cuda")
        self.agentd_refuses(2, "bfloat16 or float16", args=(*agentd, "--dtype", "float32"))
        self.agentd_refuses(2, "add --device cuda", args=(*agentd[:-2], "--dtype", "float16"))
        if self.json("doctor", "--format", "json")["cuda"]["usable"]:
            self.skipTest("a GPU can be used here")
        self.agentd_refuses(2, "--device cuda: ", args=agentd)
        with self.daemon("--device", "auto") as (endpoint, _):
            self.assertEqual(self.json("ping", "--endpoint", endpoint, "--format", "json")["device"], "cpu")

    def test_damaged_traces_name_the_line(self):
        trace = self.path(
            "t.jsonl",
            '{"schema":"ktr","version":1}\n{"seg":"a","text":"x"}\n{"request_id":"r","segments":[["user","b"]]}\n',
        )
        self.refuse(1, "line 3", "trace", "replay", trace, "--model", MODEL)
        self.refuse(4, "none.jsonl", "trace", "info", self.path("none.jsonl"))

    def test_a_full_disk_is_noticed(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        ids = self.path("ids.json", dict(ids=[5]))
        self.refuse(1, "disk full", "logits", "--model", MODEL, "--ids", ids, "--out", "/dev/full")


if __name__ == "__main__":
    unittest.main(verbosity=2)
