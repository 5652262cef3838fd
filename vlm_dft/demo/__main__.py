"""Write the demo's data, and with --base its model: ``python -m vlm_dft.demo OUT --train N --held-out M --seed S``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm_dft.demo.write import write_demo


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm_dft.demo", description=__doc__)
    parser.add_argument("out", type=Path, help="directory to write into")
    parser.add_argument("--train", type=int, default=4000, help="records of start.tar.gz")
    parser.add_argument("--tune", type=int, default=3000, help="records of tune.tar.gz")
    parser.add_argument("--validation", type=int, default=200, help="records of validation.tar.gz")
    parser.add_argument("--held-out", type=int, default=180, help="items of each benchmark, a multiple of 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", action="store_true", help="build the random base model under OUT_DIR/models too")
    arguments = parser.parse_args()
    try:
        summary = write_demo(
            arguments.out,
            start=arguments.train,
            tune=arguments.tune,
            validation=arguments.validation,
            held_out=arguments.held_out,
            seed=arguments.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    for name, benchmark in summary["benchmarks"].items():
        print(f"{name}: {benchmark['n']} items, chance {benchmark['chance']:.3f}")
    if arguments.base:
        from vlm_dft.demo.base import NAME, build_base  # torch

        print(build_base(arguments.out / "models" / NAME, seed=arguments.seed))


if __name__ == "__main__":
    main()
