"""Train the demo's base and adapters again: `python -m server.demo.train all --out DIR`.

Needs the extra `train`. Uses one thread and about half an hour, shows its progress, and
writes DIR/base and DIR/adapters/NAME. The same seed gives the same corpus, tokenizer and
order of documents; the weights agree as far as the machine's arithmetic does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from server.demo import ADAPTER_NAMES
from server.demo.adapters import train_adapter
from server.demo.base import train_base
from server.demo.tokenizer import load_tokenizer
from server.demo.trainings import trainings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("base", "adapters", "all"), help="what to train")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where to write; base must be there for adapters"
    )
    parser.add_argument("--only", nargs="+", choices=sorted(ADAPTER_NAMES), help="only these adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what in ("base", "all"):
        _tell("base", train_base(args.out / "base", args.seed), args.out / "base")
    if args.what in ("adapters", "all"):
        for name, training in trainings(load_tokenizer(args.out / "base")).items():
            if args.only and name not in args.only:
                continue
            directory = args.out / "adapters" / name
            _tell(name, train_adapter(name, training, args.out / "base", directory, args.seed), directory)


def _tell(name: str, score: float, directory: Path) -> None:
    size_bytes = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{name}: {score:.1%} of held-out answers are right, as stored in {size_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
