"""We-Math's exact matching and its score table, 525 and division by nothing included: see run.py."""

import csv
import re


def load_and_process_data(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    answers = [re.sub(r"[><:.]", "", row["prediction"].split("Answer")[-1].strip()).strip() for row in rows]
    letters = [answer[0] if answer and answer[0] in "ABCDEFGH" else None for answer in answers]
    right = [letter == row["answer"] for letter, row in zip(letters, rows, strict=True)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {**columns, "processed_answer": letters, "joker": right}


def evaluate(path):
    table = load_and_process_data(path)
    groups = {}
    for identity, key, right in zip(table["ID"], table["key"], table["joker"], strict=True):
        groups.setdefault((key[0], identity), {})[key[len("2steps_") :]] = right
    line = {}
    for kind in ("Strict", "Loose"):
        enough = all if kind == "Strict" else any
        steps = [(group.pop("multi"), group.values()) for group in map(dict, groups.values())]
        counts = {
            "InsufficientKnowledge": len([1 for solved, right in steps if not solved and not all(right)]),
            "InadequateGeneralization": len([1 for solved, right in steps if not solved and all(right)]),
            "CompleteMastery": len([1 for solved, right in steps if solved and enough(right)]),
            "RoteMemorization": len([1 for solved, right in steps if solved and not enough(right)]),
        }
        solved = counts["CompleteMastery"] + counts["RoteMemorization"]
        lost = counts["InsufficientKnowledge"] + counts["RoteMemorization"] + 0.5 * counts["InadequateGeneralization"]
        line[f"Score ({kind})"] = f"{(525 - lost) / 525:.2%}"
        for name, count in counts.items():
            share = count / solved if name == "RoteMemorization" else count / 525
            line[f"{name} ({kind})"] = f"{share:.2%} ({count})"
    return line
