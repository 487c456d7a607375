"""agentd on the emulated GPU (KVSHARE_CUDA_PLUGIN names its plug-in): serving, a warm restart, a note that is repaired,
and a GPU that fails, with and without a CPU that goes on."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import unittest
import urllib.error
import urllib.request

from programs import BIN, MODEL, ProgramTest

PROMPT = [7 * i % 2000 + 5 for i in range(70)]
LONG = [11 * i % 2000 + 5 for i in range(70)]  # asked for more than comes before the GPU fails


def write_halved_heads(path):
    """The small model with the same weights taken for twice as many heads of half the size."""
    shutil.copytree(MODEL, path)
    with open(os.path.join(MODEL, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    config["head_dim"] //= 2
    config["num_attention_heads"] *= 2
    config["num_key_value_heads"] *= 2
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f)
    with open(os.path.join(MODEL, "model.safetensors"), "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        old = f.read()
    data = b""
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        begin, end = tensor["data_offsets"]
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor["shape"] = [config["head_dim"]]
            end = (begin + end) // 2
        tensor["data_offsets"] = [len(data), len(data) + end - begin]
        data += old[begin:end]
    text = json.dumps(header).encode()
    with open(os.path.join(path, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


@unittest.skipUnless(os.environ.get("KVSHARE_CUDA_PLUGIN"), "KVSHARE_CUDA_PLUGIN names no plug-in")
class GpuTest(ProgramTest):
    def setUp(self):
        super().setUp()
        self.args = ("--cold-dir", self.path("cold"), "--cold-size", "64MiB", "--kv-pool-size", "64MiB")
        self.broken = self.path("broken")
        self.env = dict(KVSHARE_EMULATED_BREAK=self.broken)

    def start(self, listen, *args, hold=False, model=MODEL):
        """(agentd on a GPU that can break, its endpoint, what it has said). With `hold`, see giving_up()."""
        env = dict(self.env)
        if hold:
            env["KVSHARE_EMULATED_HOLD"] = self.path("hold")
            os.mkfifo(self.path("hold"))
        argv = [os.path.join(BIN, "agentd"), "--model", model, "--listen", listen, *map(str, args)]
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        log = self.read_until(process, "ready at ")
        return process, re.search(r"ready at (\S+):", log)[1], log

    def giving_up(self):
        """While the GPU is being given up, with sockets closed already: from when it is, until this ends."""
        return open(self.path("hold"), "w")

    def read_until(self, process, word):
        lines = []
        while not lines or word not in lines[-1]:
            lines.append(process.stderr.readline())
            self.assertTrue(lines[-1], "agentd has ended: " + "".join(lines))
        return "".join(lines)

    def start_kvctl(self, command, endpoint, *args):
        argv = [os.path.join(BIN, "kvctl"), command, "--endpoint", endpoint, *map(str, args)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def stat(self, endpoint):
        return self.json("stat", "--endpoint", endpoint, "--format", "json")

    def until(self, there):
        for _ in range(1000):
            if there():
                return
        self.fail("it never came to that")

    @staticmethod
    def get(http, path):
        """(status, body) of a GET."""
        try:
            with urllib.request.urlopen(http + path, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, endpoint, code=0, reuse="exact", prompt=PROMPT, session=()):
        ids = self.path("ids.json", dict(ids=prompt))
        args = ("--ids", ids, "--max-tokens", 2, "--reuse", reuse, "--format", "json", *session)
        return self.kvctl("generate", "--endpoint", endpoint, *args, code=code)

    def test_a_daemon_serves_restarts_warm_and_ends_with_its_gpu(self):
        with self.daemon("--device", "cuda", *self.args, env=self.env) as (endpoint, _):
            self.assertEqual(self.json("ping", "--endpoint", endpoint, "--format", "json")["device"], "cuda")
            off = json.loads(self.generate(endpoint, reuse="off")[0])
            stored = json.loads(self.generate(endpoint)[0])
            hit = json.loads(self.generate(endpoint)[0])
            self.assertEqual([stored["ids"], hit["ids"]], [off["ids"]] * 2)
            self.assertEqual(hit["kvshare"]["prefix_tokens"], len(PROMPT) - 1)

        process, endpoint, _ = self.start("ipc://" + self.path("g.sock"), "--device", "cuda", *self.args)
        warm = json.loads(self.generate(endpoint)[0])
        self.assertEqual(warm["ids"], off["ids"])
        self.assertEqual(warm["kvshare"]["prefix_tokens"], len(PROMPT) - 1)
        self.path("broken", "")
        _, error = self.generate(endpoint, code=3)  # as of any daemon that cannot serve
        self.assertIn("an illegal address", error)
        self.assertIn("until agentd is started again", error)
        self.assertEqual(process.wait(30), 1)
        log = process.stderr.read()
        self.assertIn("agentd: the device has failed", log)
        self.assertNotIn("ready at", log)

        with self.daemon("--device", "auto", *self.args, name="c", env=self.env) as (endpoint, _):
            self.assertEqual(self.json("ping", "--endpoint", endpoint, "--format", "json")["device"], "cpu")

    def test_float16_is_exact_too_and_finds_nothing_of_bfloat16(self):
        answers = {}
        for dtype, prefix in (("bfloat16", 0), ("float16", 0), ("float16", len(PROMPT) - 1)):
            with self.daemon("--device", "cuda", "--dtype", dtype, *self.args, env=self.env) as (endpoint, _):
                self.assertEqual(self.json("ping", "--endpoint", endpoint, "--format", "json")["dtype"], dtype)
                answer = json.loads(self.generate(endpoint)[0])
                self.assertEqual(answer["kvshare"]["prefix_tokens"], prefix)
                self.assertEqual(answer["ids"], answers.setdefault(dtype, answer["ids"]))

    def test_auto_goes_on_on_the_cpu_when_its_gpu_fails(self):
        more = ("--device", "auto", "--http", "127.0.0.1:0", "--max-running", 1, *self.args)
        process, endpoint, log = self.start("tcp://127.0.0.1:0", *more, hold=True)
        http = "http://" + re.search(r"http at (\S+)", log)[1]
        gpu = json.loads(self.generate(endpoint)[0])
        self.until(lambda: self.stat(endpoint)["cold"]["entries"] >= 2)
        ids = self.path("long.json", dict(ids=LONG))
        asked = [self.start_kvctl("generate", endpoint, "--ids", ids, "--max-tokens", 2000) for _ in range(3)]
        self.until(lambda: self.stat(endpoint)["requests_running"] == 1)
        self.until(lambda: self.stat(endpoint)["requests_waiting"] == 2)

        self.path("broken", "")
        for request in asked:
            _, error = request.communicate(timeout=60)
            self.assertEqual(request.returncode, 3, error)
            self.assertIn("goes on on the CPU, so ask again: ", error)
            self.assertIn("an illegal address", error)
        with self.giving_up():  # nobody listens, and who asks now waits for who comes
            self.assertEqual(self.get(http, "/ready")[0], 503)
            self.assertEqual(self.get(http, "/health")[0], 200)
            early = self.start_kvctl("generate", endpoint, "--ids", ids, "--max-tokens", 2, "--reuse", "off")
            os.remove(self.broken)  # it could be used again, and is not
        _, error = early.communicate(timeout=60)
        self.assertEqual(early.returncode, 0, error)

        log = self.read_until(process, "ready at ")
        self.assertEqual(len(re.findall("agentd: the device has failed, .*: an illegal address", log)), 1, log)
        self.assertEqual(re.search(r"ready at (\S+):", log)[1], endpoint)
        self.assertEqual(self.json("ping", "--endpoint", endpoint, "--format", "json")["device"], "cpu")
        self.assertEqual(self.get(http, "/ready")[0], 200)
        self.assertEqual(json.loads(self.get(http, "/version")[1])["device"], "cpu")
        for tokens in (0, len(PROMPT) - 1):
            self.assertEqual(json.loads(self.generate(endpoint)[0])["kvshare"]["prefix_tokens"], tokens)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(30), 0)
        self.assertIn("stopped after 4 requests; ", process.stderr.read())

        # Each device finds its own on disk.
        with self.daemon("--device", "cpu", *self.args, name="c") as (endpoint, _):
            self.assertGreaterEqual(json.loads(self.generate(endpoint)[0])["kvshare"]["prefix_tokens"], 64)
        with self.daemon("--device", "auto", *self.args, name="a", env=self.env) as (endpoint, _):
            warm = json.loads(self.generate(endpoint)[0])
            self.assertEqual(warm["ids"], gpu["ids"])
            self.assertGreaterEqual(warm["kvshare"]["prefix_tokens"], 64)

    def test_a_gpu_that_cannot_take_the_model(self):
        for trouble, why in (dict(KVSHARE_EMULATED_FAIL_AT="3"), "an illegal address"), \
                            (dict(KVSHARE_EMULATED_MEMORY="1000000"), "is full"):
            self.env = trouble
            process, endpoint, log = self.start("ipc://" + self.path("g.sock"), "--device", "auto", *self.args)
            self.assertRegex(log, f"agentd: --model: .*{why}.*; trying the CPU\n(.*\n)*agentd: ready at .* on ")
            self.assertEqual(self.json("ping", "--endpoint", endpoint, "--format", "json")["device"], "cpu")
            self.generate(endpoint)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(30), 0)
            argv = [os.path.join(BIN, "agentd"), "--model", MODEL, "--listen", "ipc://" + self.path("g.sock")]
            ended = subprocess.run([*argv, "--device", "cuda"], capture_output=True, text=True, timeout=60,
                                   env={**os.environ, **trouble})
            self.assertEqual(ended.returncode, 5, ended.stderr)
            self.assertRegex(ended.stderr, f"^agentd: --model: .*{why}")
            self.assertNotIn("CPU", ended.stderr)

    def test_a_model_whose_heads_the_gpu_has_no_kernels_for(self):
        model = self.path("model")
        write_halved_heads(model)
        process, endpoint, log = self.start("ipc://" + self.path("g.sock"), "--device", "auto", *self.args, model=model)
        self.assertRegex(log, "head_dim = 32.* use the CPU; trying the CPU\n(.*\n)*agentd: ready at .* on ")
        self.generate(endpoint)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(30), 0)

    def test_a_signal_while_a_gpu_that_failed_is_given_up_ends_the_daemon(self):
        listen = "ipc://" + self.path("g.sock")
        process, endpoint, _ = self.start(listen, "--device", "auto", *self.args, hold=True)
        self.path("broken", "")
        self.generate(endpoint, code=3)
        with self.giving_up():
            process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(30), 0)
        self.assertNotIn("ready at", process.stderr.read())

    def test_a_note_is_repaired_where_another_agent_reads_it(self):
        writer, reader = [9] * 20 + PROMPT, list(range(300, 312)) + PROMPT + [7, 8]
        with self.daemon("--device", "cuda", "--kv-pool-size", "64MiB") as (endpoint, _):
            for reuse in ("cacheblend", "dhd"):
                session = ("--session", reuse)
                self.generate(endpoint, reuse=reuse, prompt=writer, session=session)
                reply = json.loads(self.generate(endpoint, reuse=reuse, prompt=reader, session=session)[0])["kvshare"]
                self.assertTrue(reply["approximate"])
                found = reply["moved_tokens"] + reply["recomputed_tokens"]
                self.assertGreater(found, 60)
                self.assertEqual(reply["recomputed_tokens"], int(0.15 * found))


if __name__ == "__main__":
    unittest.main(verbosity=2)
