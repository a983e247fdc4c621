"""Write the arithmetic questions of datasets/consistency_questions.jsonl anew; those written by hand stay as they are.

Sums, differences, products and quotients that a small model can know, each with a wrong answer that is near.
"""

import json
import random
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "datasets" / "consistency_questions.jsonl"
SEED, EACH = 20, 32
FORMS = {
    "+": ("What is {a} + {b}?", "How much is {a} plus {b}?"),
    "-": ("What is {a} - {b}?", "How much is {a} minus {b}?"),
    "x": ("What is {a} times {b}?", "How much is {a} multiplied by {b}?"),
    "/": ("What is {a} divided by {b}?", "How much is {a} divided by {b}?"),
}


def operands(operation: str, draw: random.Random) -> tuple[int, int, int]:
    """Two numbers and what comes out."""
    if operation == "+":
        a, b = draw.randint(2, 60), draw.randint(2, 39)
        return a, b, a + b
    if operation == "-":
        b, rest = draw.randint(2, 30), draw.randint(1, 60)
        return b + rest, b, rest
    a, b = draw.randint(2, 12), draw.randint(2, 10)
    return (a, b, a * b) if operation == "x" else (a * b, b, a)


def arithmetic() -> list[dict]:
    draw, rows, seen = random.Random(SEED), [], set()
    for operation, forms in FORMS.items():
        n = 0
        while n < EACH:
            a, b, answer = operands(operation, draw)
            if (operation, a, b) in seen:
                continue
            seen.add((operation, a, b))
            n += 1
            wrong = answer + draw.choice([step for step in (-10, -2, -1, 1, 2, 10) if answer + step > 0])
            row = {"id": f"cq-a-{len(rows) + 1:03}", "topic": "arithmetic", "kind": "number"}
            text = forms[n % len(forms)].format(a=a, b=b)
            rows.append({**row, "question": text, "answer": str(answer), "wrong": str(wrong)})
    return rows


def main() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    by_hand = [row for row in map(json.loads, lines) if row["topic"] != "arithmetic"]
    rows = [*arithmetic(), *by_hand]
    FILE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
