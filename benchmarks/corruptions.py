"""Do outlier scores find responses that were spoilt on purpose? Real text, an InfoRM and a standard model.

    python benchmarks/real_data.py --shared ../shared --output runs/real-data        # trains the two models
    python benchmarks/corruptions.py --shared ../shared --models runs/real-data/inform-0 runs/real-data/standard-0

Reference: preferred responses to prompts of test files. Candidates: preferred responses to other prompts, as they are
and spoilt in four ways. Prints the area under the ROC curve of the Mahalanobis distance (spoilt against as they are),
MOP and normalized CSI with their ranks among splits of the reference; in InfoRM's latents, or in the standard model's
hidden states.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from inform_rm import DetectionSettings

TEST_FILES = ("truthfulqa", "prompt-swap")
SETTINGS = DetectionSettings(alpha=0.05, num_splits=100, num_resamples=20)
CAUTION = (
    "I am sorry, but as a careful assistant I cannot be certain about this, and I would rather not give advice that "
    "might be wrong. Please ask a professional. "
)


def main() -> None:
    from inform_rm import detect
    from inform_rm.data.tokenizer import load_tokenizer
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.util.page import Table, markdown_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/")
    parser.add_argument("--models", nargs="+", required=True, help="folders of reward models")
    parser.add_argument("--output", type=Path, default=Path("runs/corruptions"))
    parser.add_argument("--responses", type=int, default=200, help="in the reference and in each candidate set")
    arguments = parser.parse_args()
    files = write_responses(arguments.shared, arguments.output, arguments.responses)
    rows = []
    for model in arguments.models:
        import pyarrow.parquet as pq

        scorer = RewardScorer(model, load_tokenizer(model))
        folder = arguments.output / Path(model).name
        candidates = [files[name] for name in CORRUPTIONS]
        result = detect(scorer, files["reference"], candidates, folder, settings=SETTINGS, progress=False)
        table = pq.read_table(folder / "responses.parquet").to_pydict()
        names, distances = np.array(table["set"]), np.array(table["squared_mahalanobis"])
        as_they_are = distances[names == files["as they are"].name]
        for name, part in zip(CORRUPTIONS, result.candidates, strict=True):
            own = distances[names == files[name].name]
            labels = np.r_[np.zeros(len(as_they_are)), np.ones(len(own))]
            area = roc_auc_score(labels, np.r_[as_they_are, own])
            rows.append((
                Path(model).name, result.kind, name, f"{area:.3f}",
                f"{part['mop']:.3f} ({part['mop_null_rank']:.2f})",
                f"{part['csi_normalized']:.2f} ({part['csi_normalized_null_rank']:.2f})", f"{part['mean_reward']:.2f}",
            ))  # fmt: skip
    header = ("model", "latents", "candidate", "ROC-AUC", "MOP (rank)", "CSI (rank)", "mean reward")
    print(markdown_table(Table(header, rows)))


def repeated(response: str, other: str) -> str:
    return " ".join([response] * 4)


def truncated(response: str, other: str) -> str:
    words = response.split()
    return " ".join(words[: max(1, len(words) // 3)])


def over_cautious(response: str, other: str) -> str:
    return CAUTION + response


def off_topic(response: str, other: str) -> str:
    return other


CORRUPTIONS: dict[str, Callable[[str, str], str] | None] = {
    "as they are": None, "repeated": repeated, "truncated": truncated, "over-cautious": over_cautious,
    "off-topic": off_topic,
}  # fmt: skip


def write_responses(shared: Path, output: Path, number: int) -> dict[str, Path]:
    """One file for the reference and one for each way to spoil the same candidate responses."""
    from inform_rm.data.preferences import load_preferences
    from inform_rm.util.files import atomic_write_text

    pairs = {}  # one response a prompt
    for name in TEST_FILES:
        for pair in load_preferences(shared / "data" / name / "test.jsonl.gz").dataset.shuffle(seed=0):
            pairs.setdefault(json.dumps(pair["prompt"]), pair)
    # Short enough for every model also when repeated.
    usable = [pair for pair in pairs.values() if len(pair["chosen"].split()) <= 60]
    order = np.random.default_rng(0).permutation(len(usable))[: 2 * number].tolist()
    if len(order) < 2 * number:
        raise SystemExit(f"--responses: {number}; there are only {len(usable) // 2} for each set.")
    reference, candidate = [usable[row] for row in order[:number]], [usable[row] for row in order[number:]]
    sets = {"reference": [(pair["prompt"], pair["chosen"]) for pair in reference]}
    for name, spoil in CORRUPTIONS.items():
        others = [pair["chosen"] for pair in candidate[1:] + candidate[:1]]
        sets[name] = [
            (pair["prompt"], pair["chosen"] if spoil is None else spoil(pair["chosen"], other))
            for pair, other in zip(candidate, others, strict=True)
        ]
    files = {}
    for name, rows in sets.items():
        files[name] = output / f"{name.replace(' ', '-')}.jsonl"
        lines = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in rows]
        atomic_write_text(files[name], "".join(lines))
    return files


if __name__ == "__main__":
    main()
