# SPDX-License-Identifier: Apache-2.0
"""Search for inputs guided by coverage: `python -m torture --only hostile --guided`.

atheris (libFuzzer) gives bytes, which decide what is damaged and how (`damage.Decisions`). It keeps
those that reach new code of this package and varies them. Inputs that are read wrongly are told and
counted, and the search goes on.

Source: the documentation of atheris and libFuzzer
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

MISSING = (
    "`--guided` needs atheris, which is not installed: `pip install atheris` (Linux, CPython 3.11 "
    "to 3.13). Without it, `python -m torture --only hostile` draws inputs at random."
)


def main(arguments: list[str]) -> int:
    """Search for so many minutes; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m torture --guided", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many")
    parser.add_argument("--only", nargs="*", default=[], help="words of targets' names")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--output", type=Path, default=Path("torture_output"))
    options = parser.parse_args(arguments)
    words, output = [word for word in options.only if word != "hostile"], options.output
    try:
        import atheris
    except ImportError:
        print(MISSING)
        return 2
    with atheris.instrument_imports(include=["peft"]):
        import peft  # noqa: F401  (what is imported first is followed)

        from . import hostile
        from .damage import Decisions

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = [t for t in hostile.targets() if not words or any(word in t.name for word in words)]
    folder = tempfile.mkdtemp()
    attacks = [hostile.Attack(t, Path(folder) / str(i)) for i, t in enumerate(chosen)]
    record, found, counts = output / "guided.json", Counter[str](), Counter[str]()

    def one_input(data: bytes) -> None:
        chance = Decisions(data)
        attack = attacks[chance.randrange(len(attacks))]
        what, wrong = attack.input(chance)
        counts[attack.target.name] += 1
        if wrong is not None:
            finding = f"{attack.target.name}: {wrong}"
            if finding not in found:
                print(f"{finding}\n    {what}\n    bytes {data.hex()[:400]}", flush=True)
            found[finding] += 1
        if wrong is not None or sum(counts.values()) % 200 == 0:
            record.write_text(json.dumps({"tried": counts, "found": found}, indent=1) + "\n")

    corpus = output / "guided_corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    settings = [
        f"-max_total_time={int(60 * options.minutes)}",
        f"-seed={options.seed + 1}",
        "-max_len=300",
        "-len_control=0",
        "-timeout=600",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
    ]
    child = os.fork()  # libFuzzer ends the process
    if child == 0:
        atheris.Setup([sys.argv[0], str(corpus), *settings], one_input)
        atheris.Fuzz()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    told = json.loads(record.read_text()) if record.exists() else {"tried": {}, "found": {}}
    tried, lost = sum(told["tried"].values()), sum(told["found"].values())
    print(f"hostile, guided: {tried:,} tried, {lost} lost, {len(list(corpus.iterdir()))} kept.")
    return 1 if lost or os.waitstatus_to_exitcode(status) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
