"""Tokens there and back, templates, logits to the bit however the prompt is cut, sampling by seed."""

import json
import random
import struct
import unittest

from programs import MODEL, ProgramTest


class TextTest(ProgramTest):
    def logits(self, ids, *options):
        out = self.path("l.npy")
        shape = self.json(
            "logits", "--model", MODEL, "--ids", self.path("l.json", dict(ids=ids)), "--out", out, *options
        )
        with open(out, "rb") as f:
            return shape, f.read()

    def test_chunks_and_threads_do_not_change_a_bit(self):
        rng = random.Random(3)
        ids = [rng.randrange(2000) for _ in range(331)]
        for dtype in ("float32", "bfloat16"):
            shape, whole = self.logits(ids, "--dtype", dtype)
            self.assertEqual(shape, dict(tokens=331, vocab=2048, dtype=dtype))
            for options in (["--chunks", "64"], ["--chunks", "7,1,63,65,100"], ["--chunks", "1"], ["--threads", "1"]):
                self.assertTrue(
                    self.logits(ids, "--dtype", dtype, *options)[1] == whole, f"{dtype} {options} differs"
                )

    def test_npy_is_what_numpy_reads(self):
        _, data = self.logits([1, 2, 3])
        self.assertEqual(data[:8], b"\x93NUMPY\x01\x00")
        (length,) = struct.unpack("<H", data[8:10])
        header = eval(data[10 : 10 + length], {"__builtins__": {}})  # a literal dict, as the format says
        self.assertEqual(header, dict(descr="<f4", fortran_order=False, shape=(3, 2048)))
        self.assertEqual(len(data), 10 + length + 3 * 2048 * 4)

    def test_text_comes_back(self):
        texts = [
            "The lamp is in the tower.",
            "  two  spaces\n\ttab",
            "déjà vu — 你好 🦉",
            "<|im_start|>user\nx<|im_end|>",
            "a\u0000b",
            "no\u0085line\u2028ends\u2029here",
            "",
        ]
        lines = self.path("t.jsonl", "\n".join(json.dumps(dict(text=t)) for t in texts))
        ids = self.kvctl("tokenize", "--model", MODEL, "--jsonl", lines)[0]
        self.assertEqual(len(ids.splitlines()), len(texts))
        back = self.kvctl("detokenize", "--model", MODEL, "--jsonl", self.path("i.jsonl", ids))[0]
        self.assertEqual([json.loads(line)["text"] for line in back.splitlines()], texts)

    def test_render_follows_the_template(self):
        messages = [dict(role="system", content="S"), dict(role="user", content="U")]
        with_turn = self.json("render", "--model", MODEL, "--messages", self.path("m.json", messages))
        self.assertEqual(
            with_turn["prompt"],
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
        )
        without = self.json("render", "--model", MODEL, "--messages", self.path("m.json"), "--no-generation-prompt")
        self.assertTrue(with_turn["prompt"].startswith(without["prompt"]))
        self.assertEqual(with_turn["ids"][: len(without["ids"])], without["ids"])

    def test_same_seed_same_reply(self):
        def sample(seed):
            return self.json(
                "generate",
                "--model",
                MODEL,
                "--prompt",
                "The key is",
                "--max-tokens",
                12,
                "--temperature",
                1.5,
                "--seed",
                seed,
                "--format",
                "json",
            )["ids"]

        self.assertEqual(sample(7), sample(7))
        self.assertGreater(len({tuple(sample(s)) for s in range(4)}), 1)

    def test_a_stop_string_ends_the_reply_before_itself(self):
        argv = [
            "generate",
            "--model",
            MODEL,
            "--prompt",
            "Note 1: the key is kept in the",
            "--max-tokens",
            24,
            "--format",
            "json",
        ]
        free = self.json(*argv)["text"]
        stop = free[len(free) // 2 : len(free) // 2 + 3]
        cut = self.json(*argv, "--stop", stop)
        self.assertEqual(cut["text"], free[: free.index(stop)])
        self.assertEqual(cut["finish_reason"], "stop")

    def test_text_format_streams_the_same_text(self):
        argv = ["generate", "--model", MODEL, "--prompt", "Where is the map?", "--max-tokens", 10]
        out, err = self.kvctl(*argv)
        self.assertEqual(out, self.json(*argv, "--format", "json")["text"] + "\n")
        self.assertIn("prompt tokens", err)

    def test_model_and_doctor_tell_facts(self):
        facts = self.json("model", "--model", MODEL, "--format", "json")
        self.assertEqual((facts["layers"], facts["vocab_size"], facts["max_context_tokens"]), (6, 2048, 4096))
        doctor = self.json("doctor", "--model", MODEL, "--format", "json")
        self.assertGreater(doctor["matmul_gflops"], 0)
        self.assertTrue(next(c for c in doctor["checks"] if c["check"].startswith("the model loads"))["ok"])

    def test_bench_model_runs_on_a_config_alone(self):
        out = self.json(
            "bench",
            "model",
            "--model",
            MODEL,
            "--random-weights",
            "--prompt",
            "64",
            "--gen",
            "4",
            "--threads",
            "1",
            "--repeat",
            "2",
            "--format",
            "json",
        )
        self.assertEqual([r["test"] for r in out["results"]], ["pp64", "tg4"])
        for r in out["results"]:
            self.assertLessEqual(r["min"], r["tokens_per_second"])
            self.assertLessEqual(r["tokens_per_second"], r["max"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
