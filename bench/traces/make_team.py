#!/usr/bin/env python3
"""Writes team.ktr.jsonl: an incident-response team of five agents at work on three incidents, as a KTR-1 trace.

Everything is made by this program from its own tables and a fixed seed: no model, no recorded conversation, standard
library only. The same seed gives the same bytes.

    python3 bench/traces/make_team.py bench/traces/team.ktr.jsonl

What it models, because it decides what a cache can reuse:
  - each agent has its own system prompt (role, rules, the team's handbook), so agents share no prefix with each other;
  - each agent sees the incident's whole history, which grows: its own next prompt extends its last one;
  - replies of one agent stand in the prompts of the others (hand-offs, "@request");
  - tools answer with logs, metric tables, diffs and configuration, the bulk of the tokens;
  - the second and third incident reuse system prompts, not histories.
"""

import hashlib
import json
import random
import sys

SEED = 20260

SERVICES = {
    "checkout": ("Go", "payments", ["cart", "pricing", "ledger"]),
    "search": ("Rust", "discovery", ["indexer", "ranker", "suggest"]),
    "mailer": ("Python", "growth", ["templates", "queue", "bounce-handler"]),
}
HOSTS = ["fra1-node-07", "fra1-node-12", "ams2-node-03", "ams2-node-19", "waw1-node-04"]

HANDBOOK = """Handbook of the on-call team, shortened.
1. Say what you know, how you know it, and how sure you are. A guess is marked as a guess.
2. One change at a time. Whoever changes something writes the exact command and how to undo it.
3. Users first: stop the damage, then look for the cause. A rollback needs no permission.
4. Quote log lines and numbers as they are. Times are in UTC.
5. Before you ask for a tool, say what result would change your mind.
6. Keep replies short. The history is read by everyone on the team, again and again.
7. A symptom is what users see, a cause is what a change can remove. Never report one as the other.
8. Look at what changed last: releases, configuration, certificates, schedules, traffic. In this order.
9. When two explanations fit, name the cheapest observation that tells them apart, and ask for that one.
10. Never restart a machine to see whether it helps before its logs and its open connections are written down.
11. A limit that was raised in a hurry is a debt: the scribe notes it, and it is paid back within the week.
12. Whoever is wrong says so in the next message. Nobody is blamed here, neither for the fault nor for the guess.

Severity, for the page and for the report: one, users cannot finish what they came for; two, they can, slowly or on a
second attempt; three, only we notice. Severity is set by what is seen, not by what is feared, and lowered only by the
commander.

Words we use: a service is what has a name and an owner; a part is a process of a service; a host runs parts of several
services; a release is a version with its configuration. "Since" names a minute, "about" admits that it may be another.
"""

AGENTS = {
    "commander": (
        "You are the incident commander. You decide who does what next, keep the list of open questions, and close "
        "the incident when the symptoms are gone and the cause is understood. You never touch a machine yourself."
    ),
    "log-analyst": (
        "You are the log analyst. You read log excerpts and traces, group the errors by cause, and name the first "
        "line where things went wrong. You distrust the loudest message and look for the earliest one."
    ),
    "metrics-analyst": (
        "You are the metrics analyst. You read tables of latency, error rate and saturation, compare them "
        "with the same hour of the day before, and say which numbers moved first and which only followed."
    ),
    "code-reader": (
        "You are the code reader. You read diffs and configuration, explain what changed between two releases, "
        "and judge whether the change can produce the symptoms at hand. You propose the smallest safe fix."
    ),
    "scribe": (
        "You are the scribe. You keep the timeline, write updates for the people outside the team in plain words, "
        "and collect the follow-up tasks. You leave out what is not yet certain."
    ),
}


class Incident:
    """One incident: its facts, from which every text is drawn, so that the conversation hangs together."""

    def __init__(self, rng, number, service):
        self.rng, self.number, self.service = rng, number, service
        self.language, self.team, self.parts = SERVICES[service]
        self.part = rng.choice(self.parts)
        self.host = rng.choice(HOSTS)
        self.release = f"{rng.randint(3, 9)}.{rng.randint(10, 40)}.{rng.randint(0, 9)}"
        self.before = f"{self.release.rsplit('.', 1)[0]}.{int(self.release.rsplit('.', 1)[1]) + 10}-rc1"
        self.hour = rng.randint(1, 21)
        self.limit = rng.choice([32, 48, 64, 96])
        self.old_limit = self.limit * 4
        self.cause = rng.choice(
            [
                ("connection pool", "max_connections", "requests wait for a connection until they time out"),
                ("worker queue", "queue_depth", "jobs are refused while the workers sit idle"),
                ("response cache", "cache_entries", "hot entries are evicted before they are used again"),
            ]
        )

    def clock(self, minute):
        return f"{self.hour + minute // 60:02d}:{minute % 60:02d}:{self.rng.randint(0, 59):02d}"

    # --- tool outputs -----------------------------------------------------------------------------------------------

    def log_excerpt(self, minute, lines):
        rng, out = self.rng, [
            f"$ logs --service {self.service} --host {self.host} --since {self.clock(minute)} --limit {lines}"
        ]
        for i in range(lines):
            level = rng.choice(["INFO", "INFO", "WARN", "ERROR"])
            rid = "%08x" % rng.getrandbits(32)
            text = {
                "INFO": [
                    f"request {rid} served by {rng.choice(self.parts)} in {rng.randint(8, 90)} ms",
                    f"{self.part}: {self.cause[1]} in use {rng.randint(self.limit - 9, self.limit)} of {self.limit}",
                ],
                "WARN": [
                    f"request {rid} waited {rng.randint(400, 2900)} ms for the {self.cause[0]}",
                    f"{rng.choice(self.parts)}: retry {rng.randint(1, 3)} of 3 after {rng.randint(100, 900)} ms",
                ],
                "ERROR": [
                    f"request {rid} failed: deadline of 3000 ms passed in {self.part}",
                    f"{self.part}: {self.cause[0]} exhausted ({self.cause[1]}={self.limit})",
                ],
            }[level]
            out.append(
                f"{self.clock(minute + i * 5 // lines)}.{rng.randint(0, 999):03d} {level:<5} {rng.choice(text)}"
            )
        return "\n".join(out)

    def metric_table(self, minute, rows):
        rng, out = self.rng, [
            f"$ metrics --service {self.service} --window {rows * 5}m --step 5m",
            "time      rps   p50ms  p95ms  errors%  busy%",
        ]
        for i in range(rows):
            bad = i >= rows // 3
            out.append(
                f"{self.clock(minute - (rows - i) * 5 + 60)}  {rng.randint(410, 640):>4} "
                f" {rng.randint(310, 900) if bad else rng.randint(18, 40):>5} "
                f" {rng.randint(2100, 3000) if bad else rng.randint(60, 140):>5} "
                f" {rng.uniform(4, 19) if bad else rng.uniform(0, .3):>7.2f} "
                f" {rng.randint(12, 31) if bad else rng.randint(40, 65):>5}"
            )
        return "\n".join(out)

    def diff(self):
        rng = self.rng
        keys = ["read_timeout_ms", "retry_budget", "idle_seconds", "batch_size", "keepalive_s", "warmup_requests"]
        lines = [
            f"$ diff --release {self.before} {self.release} --path deploy/{self.service}.yaml",
            f"@@ {self.service}/{self.part} @@",
        ]
        for key in rng.sample(keys, 4):
            lines.append(f"   {key}: {rng.randint(2, 900)}")
        lines += [f"-  {self.cause[1]}: {self.old_limit}", f"+  {self.cause[1]}: {self.limit}"]
        for key in rng.sample(keys, 2):
            lines.append(f"   {key}: {rng.randint(2, 900)}")
        lines.append(f"   comment: sizes follow the new {self.language} client, see change {rng.randint(4000, 9000)}")
        return "\n".join(lines)

    def host_table(self):
        rng, out = self.rng, [
            "$ hosts --service " + self.service,
            "host            cpu%   mem%   conns  restarts  release",
        ]
        for host in HOSTS:
            out.append(
                f"{host:<14}  {rng.randint(9, 60):>4}  {rng.randint(30, 85):>5}  {rng.randint(20, 300):>6} "
                f" {rng.randint(0, 2):>8}  {self.release}"
            )
        return "\n".join(out)

    # --- what agents say --------------------------------------------------------------------------------------------

    def say(self, agent, step, minute):
        rng, c = self.rng, self.cause
        sure = rng.choice(["fairly sure", "not yet sure", "about eighty percent sure"])
        lines = {
            "commander": [
                (
                    f"Status at {self.clock(minute)}: {self.service} is slow for users of {self.team}. Open"
                    f" questions: does it touch every host, and did release {self.release} bring it? Log analyst,"
                    f" find the first error on {self.host}. Metrics analyst, tell us which number moved first."
                ),
                (
                    f"Thank you. Two findings point at the {c[0]}. Code reader, please compare {self.before} with"
                    f" {self.release} and look at {c[1]}. Scribe, tell the {self.team} team that we know the symptom"
                    " and not yet the cause."
                ),
                (
                    f"Decision: we put {c[1]} back to {self.old_limit} on {self.host} first and watch for ten"
                    f" minutes. Undo is the same command with {self.limit}. Nobody changes anything else meanwhile."
                ),
                (
                    f"The numbers on {self.host} are back to normal, so the change goes to all hosts. I keep the"
                    f" incident open until the queue of {self.part} is empty."
                ),
                (
                    f"Closing: cause understood, symptoms gone since {self.clock(minute)}. Follow-up: a limit that is"
                    " lowered must pass a load test. Scribe, please write the last update."
                ),
            ],
            "log-analyst": [
                (
                    f"The earliest sign is not the timeout but a warning of {self.part} that a request waited for the"
                    f" {c[0]}, about two minutes before the first failure. I am {sure} that the timeouts only follow"
                    " from it."
                ),
                (
                    f"I grouped the errors: most name {self.part} and the {c[0]}, a few are retries of the same"
                    " requests. Nothing points at the network. What would change my mind: the same warning on a host"
                    " with the old release."
                ),
                (
                    f"After the change the waiting warnings stop within a minute; the last error on {self.host}"
                    " carries a request that began before the change."
                ),
            ],
            "metrics-analyst": [
                (
                    "Latency at p95 rose first, then errors; busy time of the workers FELL from about 50 to about 20"
                    f" percent. The service is not overloaded, it is waiting: {c[2]}. I am {sure}."
                ),
                (
                    "Against the same hour yesterday the request rate is the same within five percent, so load is"
                    f" not the cause. All five hosts show the same picture since the rollout of {self.release}."
                ),
                (
                    f"Since the change p95 is below 140 ms again and errors are under 0.3 percent. Busy time is back"
                    f" at its usual level. I would wait for two more samples before we call it over."
                ),
            ],
            "code-reader": [
                (
                    f"The diff between {self.before} and {self.release} lowers {c[1]} from {self.old_limit} to"
                    f" {self.limit}. With several hundred requests per second that is enough for what we see: {c[2]}."
                    f" The comment blames the new {self.language} client, but that client opens no fewer connections."
                ),
                (
                    f"Smallest safe fix: set {c[1]} back to {self.old_limit} in deploy/{self.service}.yaml, nothing"
                    f" else. Command: config set {self.service}.{c[1]} {self.old_limit} --host {self.host}. Undo: the"
                    f" same with {self.limit}."
                ),
                (
                    f"For later: the reader of this file accepts any positive number. A lower bound and a test with"
                    f" the real request rate would have caught it. I can write both today."
                ),
            ],
            "scribe": [
                (
                    f"Update for {self.team}: since {self.clock(minute)} some requests to {self.service} take several"
                    " seconds or fail. The team is on it; no data is lost. Next update in fifteen minutes."
                ),
                (
                    f"Timeline so far: rollout of {self.release}; first waiting warning in {self.part}; p95 above two"
                    f" seconds; incident opened. Tasks collected: lower bound for {c[1]}, load test in the release"
                    " pipeline."
                ),
                (
                    f"Final update: {self.service} works normally again. A limit ({c[1]}) was set too low in release"
                    f" {self.release}; it is back at {self.old_limit}. A full report follows within two days."
                ),
            ],
        }[agent]
        return lines[min(step, len(lines) - 1)]


# The order of turns in an incident: who speaks, and which tool answers before (None: no tool).
TURNS = [
    ("commander", None),
    ("log-analyst", "logs"),
    ("metrics-analyst", "metrics"),
    ("commander", None),
    ("code-reader", "diff"),
    ("scribe", None),
    ("log-analyst", "hosts"),
    ("code-reader", None),
    ("commander", None),
    ("metrics-analyst", "metrics"),
    ("log-analyst", "logs"),
    ("scribe", None),
    ("commander", None),
]


class Writer:
    """KTR-1 lines; a text is written once, however many prompts hold it."""

    def __init__(self, path):
        self.out = open(path, "w", encoding="utf-8", newline="\n")
        self.seen = set()
        self.put(
            dict(
                schema="ktr",
                version=1,
                name="team",
                time_base="session",
                license="Apache-2.0",
                origin=f"made by bench/traces/make_team.py, seed {SEED}",
            )
        )

    def put(self, line):
        self.out.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")

    def segment(self, text):
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        if name not in self.seen:
            self.seen.add(name)
            self.put(dict(seg=name, text=text))
        return name


def tool_output(incident, tool, minute):
    return {
        "logs": lambda: incident.log_excerpt(minute, 5),
        "metrics": lambda: incident.metric_table(minute, 5),
        "diff": incident.diff,
        "hosts": incident.host_table,
    }[tool]()


def write_incident(writer, incident):
    name = f"incident-{incident.number}"
    opening = (
        f"Page at {incident.clock(2)}: {incident.service} answers slowly or not at all. Customers of the"
        f" {incident.team} team report errors since the rollout of {incident.release}. Runbook:"
        f" services/{incident.service}. Please work through it together; every agent answers in turn."
    )
    history = [("user", writer.segment(opening))]  # [role, reference] shared by all agents
    steps, waited = dict.fromkeys(AGENTS, 0), None
    for turn, (agent, tool) in enumerate(TURNS):
        minute = 4 + turn * 3
        if tool:
            history.append(("tool", writer.segment(tool_output(incident, tool, minute))))
        system = (
            f"{AGENTS[agent]}\n\n{HANDBOOK}\nThe team: "
            + ", ".join(a for a in AGENTS if a != agent)
            + ". Messages of the others carry their name in front. You answer as the "
            + agent
            + "."
        )
        reply = f"[{agent}] " + incident.say(agent, steps[agent], minute)
        steps[agent] += 1
        request = dict(
            request_id=f"{name}/{turn}",
            session_id=name,
            agent_id=agent,
            timestamp=turn * 4000,
            output_length=len(reply) // 5,
        )
        if waited:
            request.update(wait_for=[waited], delay=1500)
        system_name, reply_name = writer.segment(system), writer.segment(reply)
        # An agent's own earlier replies are its assistant turns; those of others reach it as user messages.
        segments = [["system", system_name]]
        for entry in history:
            role, ref = entry[0], entry[1]
            if role == "reply":
                role = "assistant" if entry[2] == agent else "user"
            segments.append([role, ref])
        segments.append(["user", writer.segment(f"{agent}, it is your turn.")])
        request.update(segments=segments, output=reply_name)
        writer.put(request)
        waited = request["request_id"]
        history.append(("reply", "@" + waited, agent))


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: make_team.py OUTPUT.ktr.jsonl")
    rng = random.Random(SEED)
    writer = Writer(sys.argv[1])
    for number, service in enumerate(SERVICES, 1):
        write_incident(writer, Incident(rng, number, service))
    writer.out.close()


if __name__ == "__main__":
    main()
