#!/usr/bin/env python3
"""Writes world.ktr.jsonl: five agents who keep notes about a small made-up world and quote one another, as KTR-1.

Everything is made by this program from its own tables and a fixed seed: no model, no recorded conversation, standard
library only. The same seed gives the same bytes.

    python3 bench/traces/make_world.py bench/traces/world.ktr.jsonl

In each session four agents write notes, one after the other: who keeps what where, which code opens which place, who
owns which animal, and corrections of earlier notes. Each of them reads what was noted so far ("author: note", a
hand-off of that author's very words). Then the solver and two of the others answer questions that need one note, two
notes, or the correction of one. So agents share no prefix (each has its own system prompt) and nearly all content,
which stands at another position in every prompt; an agent's own next prompt extends its last one. The small model in
models/ was trained on notes of this kind.
"""

import hashlib
import json
import random
import sys

SEED = 71
SESSIONS = 6
ROUNDS = 3  # of notes and questions in a session

AGENTS = {
    "planner": "You break the task into steps.",
    "researcher": "You collect the facts.",
    "critic": "You are careful with names and codes.",
    "writer": "You keep track of who owns what.",
    "solver": "You read the notes of the other agents and answer the question.",
}
TASKS = [
    "We are looking for a lost object.",
    "The team must open a locked room.",
    "The inventory has to be complete.",
    "Help the detective with the case.",
]
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivan Jade Kai Lena Max Nina Omar Pia Quinn Rosa Sam Tess Uma Vera".split()
JOBS = "pilot baker nurse judge farmer singer tailor miner clerk painter sailor guard".split()
CITIES = "Paris Rome Oslo Cairo Lima Delhi Tokyo Berlin Madrid Dublin Prague Vienna".split()
OBJECTS = "key map lamp ring book coin drum flute knife mirror rope scarf sword violin watch compass".split()
COLORS = "red blue green black white yellow brown silver golden purple".split()
PLACES = "kitchen cellar attic garage library garden tower chapel stable bakery harbor studio".split()
ANIMALS = "dog cat horse goat parrot rabbit turtle snake owl fox pony duck".split()


class World:
    """The facts of one session; every note is drawn from them, every answer is looked up in them."""

    def __init__(self, rng):
        self.rng = rng
        self.people = rng.sample(NAMES, 9)
        self.objects = rng.sample(OBJECTS, len(OBJECTS))
        self.animals = rng.sample(ANIMALS, len(ANIMALS))
        self.facts = {}  # (kind, name) -> value
        self.known = []  # people in notes so far
        self.places = rng.sample(PLACES, 8)
        self.opened = []

    def code(self):
        return "".join(self.rng.choice("0123456789") for _ in range(3))

    def person(self):
        rng, name = self.rng, self.people.pop()
        job, city, color, place = rng.choice(JOBS), rng.choice(CITIES), rng.choice(COLORS), rng.choice(self.places)
        thing = self.objects.pop()
        self.known.append(name)
        self.facts.update({("job", name): job, ("city", name): city, ("thing", name): thing, ("color", name): color})
        self.facts["place", name] = place
        return f"{name} is a {job} from {city}. {name} keeps the {color} {thing} in the {place}."

    def place(self):
        place = next((p for p in self.places if p not in self.opened), None)
        if place is None:
            return self.correction()
        self.opened.append(place)
        self.facts["code", place] = self.code()
        return f"The code of the {place} is {self.facts['code', place]}."

    def animal(self):
        name = self.rng.choice(self.known)
        if ("animal", name) in self.facts or not self.animals:
            return self.place()
        self.facts["animal", name] = self.animals.pop()
        return f"{name} owns a {self.facts['animal', name]}."

    def correction(self):
        if self.opened and self.rng.random() < 0.6:
            place = self.opened[-1]
            self.facts["code", place] = self.code()
            return f"Correction: the code of the {place} is not what was noted. It is {self.facts['code', place]}."
        name = self.rng.choice(self.known)
        self.facts["city", name] = self.rng.choice(CITIES)
        return f"Correction: {name} is from {self.facts['city', name]}."

    def note(self):
        """Several sentences of one agent, long enough to be worth quoting."""
        sentences = [self.person() if self.people and self.rng.random() < 0.6 or not self.known else self.place()]
        for _ in range(self.rng.randint(3, 5)):
            choice = self.rng.choice([self.place, self.animal, self.correction, self.place])
            sentences.append(choice() if self.known else self.person())
        return " ".join(sentences)

    def question(self):
        rng, name = self.rng, self.rng.choice(self.known)
        asks = [
            (f"What is the job of {name}?", self.facts["job", name]),
            (f"Where is {name} from?", self.facts["city", name]),
            (f"Where does {name} keep the {self.facts['thing', name]}?", self.facts["place", name]),
        ]
        if ("animal", name) in self.facts:
            asks.append((f"Which animal does {name} own?", self.facts["animal", name]))
        place = self.facts["place", name]
        if ("code", place) in self.facts:
            thing = self.facts["thing", name]
            ask = f"What is the code of the place where {name} keeps the {thing}?"
            asks += [(ask, self.facts["code", place])] * 2
        return rng.choice(asks)


class Writer:
    """KTR-1: segments once, before their first use; a hand-off names the request whose output it is."""

    def __init__(self, out):
        self.out, self.seen = out, set()
        self.put(
            dict(
                schema="ktr",
                version=1,
                name="world",
                time_base="session",
                license="Apache-2.0",
                origin="kvshare bench/traces/make_world.py",
            )
        )

    def put(self, row):
        self.out.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")

    def segment(self, text):
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        if name not in self.seen:
            self.seen.add(name)
            self.put(dict(seg=name, text=text))
        return name

    def request(self, row, segments, output):
        refs = [[role, text if text.startswith("@") else self.segment(text)] for role, text in segments]
        self.put(dict(row, segments=refs, output=self.segment(output)))


class Session:
    def __init__(self, number, writer):
        self.id, self.writer = f"w{number}", writer
        self.rng = random.Random(SEED * 1000 + number)
        self.world = World(self.rng)
        self.task = TASKS[number % len(TASKS)]
        self.notes = []  # (author, request)
        self.own = {agent: [] for agent in AGENTS}  # what an agent said, as (after how many notes, question, request)
        self.count, self.clock = 0, 0

    def history(self, agent):
        """The notes in their order, each a message with its author's words; the agent's own as its own."""
        told, said = 0, []
        for after, question, request in self.own[agent] + [(len(self.notes), None, None)]:
            for author, note in self.notes[told:after]:
                said += [["assistant", "@" + note]] if author == agent else [["user", author + ": "], ["+", "@" + note]]
            told = max(told, after)
            if question:
                said += [["user", question], ["assistant", "@" + request]]
        return said

    def say(self, agent, ask, output):
        request, before = f"{self.id}/{self.count}", f"{self.id}/{self.count - 1}"
        segments = [["system", f"You are the {agent}. {AGENTS[agent]}"], ["user", self.task]]
        row = dict(request_id=request, session_id=self.id, agent_id=agent, timestamp=self.clock)
        if self.count:
            row.update(wait_for=[before], delay=self.rng.randrange(200, 900))
        self.writer.request(row, segments + self.history(agent) + [["user", ask]], output)
        self.count += 1
        self.clock += self.rng.randrange(1500, 4000)
        return request

    def run(self):
        for _ in range(ROUNDS):
            for agent in list(AGENTS)[:4]:
                request = self.say(agent, "Write down what you know.", self.world.note())
                self.notes.append((agent, request))
            for agent in ["solver"] + self.rng.sample(list(AGENTS)[:4], 2):
                question, answer = self.world.question()
                self.own[agent].append((len(self.notes), question, self.say(agent, question, answer)))


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: make_world.py FILE")
    with open(sys.argv[1], "w", encoding="utf-8", newline="\n") as out:
        writer = Writer(out)
        for number in range(SESSIONS):
            Session(number, writer).run()


if __name__ == "__main__":
    main()
