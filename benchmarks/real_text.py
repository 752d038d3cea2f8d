"""Overoptimization on real text (arXiv:2402.09345, section 4.1).

    python benchmarks/real_text.py --data DIR --model DIR --output runs/real-text --stages sample --processes 2
"""

import argparse
import multiprocessing
import os
from pathlib import Path

from real_text_samples import PARTS, SMALL, Sizes, sample

STAGES = ("sample",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with hh-rlhf/, prompt-swap/ and pandalm-human/")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("runs/real-text"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--worker", type=int, nargs=2, default=(0, 1))
    a = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    sample(a.output, a.data, a.model, SMALL if a.small else Sizes(), tuple(a.parts), tuple(a.worker))


if __name__ == "__main__":
    main()
