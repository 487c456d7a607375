"""agentd over HTTP: health and readiness through its life, and metrics that Prometheus would take."""

import json
import re
import socket
import unittest
import urllib.error
import urllib.request

from programs import MODEL, ProgramTest, talk

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")


def get(port, path):
    """(status, body) of a GET."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def parse_metrics(test, text):
    """{series: value}; every rule of the text format that a scrape depends on is checked."""
    test.assertTrue(text.endswith("\n"))
    kinds, values, family = {}, {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            test.assertNotIn(family, kinds, "a family twice")
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            test.assertEqual(name, family, "TYPE follows its HELP")
            test.assertIn(kind, ("counter", "gauge", "histogram"))
            kinds[name] = kind
            continue
        match = SAMPLE.fullmatch(line)
        test.assertTrue(match, line)
        name, series = match[1], line.rsplit(" ", 1)[0]
        test.assertNotIn(series, values, "a series twice")
        values[series] = float(match[3])
        base = re.sub(r"_(bucket|sum|count)$", "", name) if kinds.get(family) == "histogram" else name
        test.assertEqual(base, family, "a sample outside its family")
        if kinds[family] == "counter":
            test.assertTrue(name.endswith("_total"), name)
    for name, kind in kinds.items():
        if kind != "histogram":
            continue
        buckets = [(s, v) for s, v in values.items() if s.startswith(name + "_bucket")]
        counts = [v for _, v in buckets]
        test.assertEqual(counts, sorted(counts), f"{name}: buckets are cumulative")
        bounds = [float(re.search(r'le="([^"]+)"', s)[1]) for s, _ in buckets]
        test.assertEqual(bounds, sorted(set(bounds)))
        test.assertEqual(bounds[-1], float("inf"))
        test.assertEqual(counts[-1], values[name + "_count"])
    return values


class HttpTest(ProgramTest):
    def port_of(self, log):
        return int(re.search(r"http at 127\.0\.0\.1:(\d+)", self.read(log))[1])

    def test_the_daemons_life_and_numbers(self):
        with self.daemon("--http", "127.0.0.1:0", name="http") as (endpoint, process):
            port = self.port_of(self.path("http.log"))
            self.assertEqual(get(port, "/health"), (200, '{"status":"ok"}\n'))
            self.assertEqual(get(port, "/ready"), (200, '{"status":"ready"}\n'))
            version = json.loads(get(port, "/version")[1])
            self.assertEqual(version["model"], self.json("ping", "--endpoint", endpoint, "--format", "json")["model"])
            status, body = get(port, "/nonsense")
            self.assertEqual(status, 404)
            self.assertIn("/metrics", json.loads(body)["error"]["message"])

            before = parse_metrics(self, get(port, "/metrics")[1])
            history = talk("planner", "Where is the lamp? " * 20)
            for _ in range(3):
                self.ask(endpoint, history, agent="planner")
            after = parse_metrics(self, get(port, "/metrics")[1])
            self.assertEqual(set(before), set(after), "series come and go")
            stat = self.json("stat", "--endpoint", endpoint, "--format", "json")
            for series, value in (
                ('kvshare_requests_total{code="ok"}', stat["requests"]),
                ("kvshare_prompt_tokens_total", stat["prompt_tokens"]),
                ('kvshare_reused_tokens_total{method="prefix"}', stat["prefix_tokens"]),
                ("kvshare_generation_tokens_total", stat["generated_tokens"]),
                ("kvshare_time_to_first_token_seconds_count", 3),
                ('kvshare_pool_capacity_bytes{tier="host"}', stat["pool"]["capacity_bytes"]),
                ('kvshare_pool_bytes{tier="host"}', stat["pool"]["used_bytes"]),
                ("kvshare_ready", 1),
            ):
                self.assertEqual(after[series], value, series)
            self.assertGreater(stat["prefix_tokens"], 0)
            missed = sum(v for s, v in after.items() if s.startswith("kvshare_miss_total"))
            self.assertEqual(missed, stat["fresh_tokens"] + stat["recomputed_tokens"])
            self.assertGreater(after["kvshare_zmq_messages_total"], before["kvshare_zmq_messages_total"])

            # Strangers: none of them costs the honest client anything.
            idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(700)]
            for s in idle[::2]:
                try:
                    s.sendall(b"GET /metrics HTTP/1.1\r\nHost")
                except OSError:
                    pass
            self.assertEqual(get(port, "/ready")[0], 200)
            self.assertTrue(self.ask(endpoint, history)["ids"])
            for s in idle:
                s.close()

    def test_a_port_that_is_taken_is_named(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            args = ("--model", MODEL, "--listen", "ipc://" + self.path("x.sock"), "--http", port)
            self.agentd_refuses(3, "--http", str(port), args=args)


if __name__ == "__main__":
    unittest.main(verbosity=2)
