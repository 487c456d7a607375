#!/usr/bin/env python3
"""Writes tests/golden/notes_tokenizer.jsonl: strings of our own making and what the tokenizers package makes of them
with models/notes-3m/tokenizer.json.

Needs tokenizers (made with 0.23). Run from the repository root:

    python3 tools/make_tokenizer_golden.py > tests/golden/notes_tokenizer.jsonl
"""

import json
import random
import sys

from tokenizers import Tokenizer

FIXED = [
    "", " ", "\n", "Hello world", " leading", "trailing ", "tabs\tand\nnewlines\r\n\r\n  x", "don't they'RE we'll I'd",
    "DON'T it'ſ 'S 's", "1234567890 3.14159 1e-9 0x1F ½ Ⅳ ٣٤", "naïve cafe\u0301 e\u0301\u0323 \u0323\u0301 ﬁ Å Å",
    "日本語のテキスト。", "한국어 텍스트", "العربية مثال", "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|><|im_start|>", "<|im_start", "|im_end|>", "a<|pad|>b <|endoftext|> c", "<<|im_end|>>",
    "\u00a0no\u00a0break\u2003space\u180esep\u3000wide\u0085next\u2028line", "\x00\x01\x7f\x1b[0m", "a" * 300,
    " " * 50 + "x", "\n" * 9 + "\t" * 9, "\u0301 starts with a mark", "q\u0307\u0323 \u1e69 s\u0323\u0307", "\ufeffbom",
    "𝔘𝔫𝔦 \U0001F600\U0010FFFF \u0378", "각 \u1100\u1161\u11a8", "ΑΣ ς ß İı", "x\u200dy\u200cz", "\ufffd\ufffe",
]

# Where characters come from: plain text mostly, and the corners of Unicode.
POOLS = [
    "abcdefghijklmnopqrstuvwxyz     eeettaaoinshr",
    "ABCDEFG'’\"!?.,;:()[]{}<>|@#$%^&*-_=+/\\~`",
    "0123456789²³½٠१",
    " \t\n\r\u00a0\u2003\u3000\u2028\u0085\x0b\x1c",
    "àéîöüñçßøåæœžšđłÀÉÎ" + "αβγδΩ" + "абвгдЖ" + "אבגד" + "ابتث" + "कखगि" + "กขค",
    "日本語中文字漢カタひらがな한국어",
    "\u0300\u0301\u0302\u0308\u0323\u0327\u0328\u0338\u05b0\u05bc\u0651\u3099",
    "👍🏽👩‍💻🏳️🌈✨©®™€£\u200d\u200c\u200b\ufeff",
]


def random_text(rng):
    out = []
    for _ in range(rng.randrange(1, 25)):
        choice = rng.random()
        if choice < 0.03:
            out.append(rng.choice(["<|im_start|>", "<|im_end|>", "<|pad|>", "<|endoftext|>"]))
        elif choice < 0.08:
            code = rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)])
            if not 0xD800 <= code < 0xE000:
                out.append(chr(code))
        else:
            pool = POOLS[0] if rng.random() < 0.5 else rng.choice(POOLS)
            out.append("".join(rng.choice(pool) for _ in range(rng.randrange(1, 8))))
    return "".join(out)


def main():
    tokenizer = Tokenizer.from_file("models/notes-3m/tokenizer.json")
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 400
    for text in FIXED + [random_text(rng) for _ in range(count)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        print(json.dumps({"text": text, "ids": ids, "decoded": decoded}))


if __name__ == "__main__":
    main()
