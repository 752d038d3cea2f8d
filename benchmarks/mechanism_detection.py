"""Who notices in time that a policy exploits its reward model? On the policies of `mechanism.py`, gold exact.

    python benchmarks/mechanism.py --output runs/mechanism --parts kept --keep
    python benchmarks/mechanism_detection.py --output runs/mechanism

Sets of 256 responses of a policy, every fifth step of its optimisation, are compared with 1,024 of the base policy:
CSI, MOP and outliers by nearest neighbours in the latents of the attacked InfoRM model (of the default InfoRM model
where a standard one is attacked), and the same on the last hidden states of the standard model of that seed; the
proxy's mean reward, and that of the other kind of model, which the policy does not see; the share of responses with
more than one repeated word; the policy's exact KL. All responses have 16 words, so that their length says nothing.

The level of an alarm is the highest value among 20 further sets of the base policy; 20 others say how often it is
reached by chance. Lead: KL at the peak of gold less KL at the first alarm. As any policy that learns leaves the base
policy, that level says that it moved, not that it went too far. So each statistic also gets the level at which
stopping keeps most gold on the selection seeds; what it keeps on the reported seeds is the figure to read.
`mechanism_detection_report.py` makes the tables. Writes ``detection.json``; started again, it does what is missing.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechanism import REPORT_SEEDS, SELECTION_SEEDS, kept_file, kept_variants, read_results, rows_of
from mechanism_models import Proxies
from mechanism_world import LENGTH, Dials, draw, make_world, policy_kl

RESPONSES, REFERENCE, NULL_SETS = 256, 1024, 40  # half of the null sets give the level, half the false alarms
DEFAULT, STANDARD = "InfoRM, beta 0.1, warm-up 0.1", "standard"
ALPHA = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mechanism"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    path = output / "detection.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done, results = {(row["attacked"], row["seed"]) for row in rows}, read_results(output)
    for seed in [*REPORT_SEEDS, *SELECTION_SEEDS]:
        start = time.time()
        files = {name: kept_file(output, (variant, seed, Dials()), state)
                 for name, (variant, state) in kept_variants().items()}  # fmt: skip
        for name, choice in kept_variants().items():
            if (name, seed) not in done and files[name].exists():
                for figures in rows_of(results, choice, Dials(), [seed]):  # one, or none while its group is trained
                    own = {key: figures["policy"][key] for key in ("gold", "proxy")}
                    rows.append(watch(name, seed, files) | own | {"accuracy": figures["accuracy"]})
        path.write_text(json.dumps(rows), encoding="utf-8")
        print(f"seed {seed}: {time.time() - start:.0f} s", flush=True)


def watch(name: str, seed: int, files: dict[str, Path]) -> dict[str, Any]:
    """Every statistic of every set for the policy against one model: null sets first, then every measured step."""
    from safetensors.torch import load_file

    world = make_world(seed, Dials())
    policies = load_file(files[name])["log_policy"].exp()
    generator = torch.Generator().manual_seed(seed + 3_000_000)
    sizes = [(world.probabilities, REFERENCE + NULL_SETS * RESPONSES), *((each, RESPONSES) for each in policies)]
    words = torch.cat([
        draw(policy, torch.rand(size * LENGTH, generator=generator)).view(size, LENGTH) for policy, size in sizes
    ])  # fmt: skip
    row: dict[str, Any] = {"attacked": name, "seed": seed, "values": {}}
    row["kl"] = policy_kl(policies, world.probabilities).tolist()
    for watcher in (STANDARD, name if name.startswith("InfoRM") else DEFAULT):
        points, rewards = features(watcher, files[watcher], words)
        kind = "states of the standard model" if watcher == STANDARD else "latents of InfoRM"
        for statistic, values in statistics_of(points).items():
            row["values"][f"{statistic}, {kind}"] = values
        if watcher != name:  # a reward model that the policy does not see
            row["other_reward"] = rewards[REFERENCE + NULL_SETS * RESPONSES :].reshape(-1, RESPONSES).mean(1).tolist()
    ordered = words[REFERENCE:].sort(dim=-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).sum(dim=-1) > 1
    row["values"]["repetition"] = repeated.view(-1, RESPONSES).double().mean(dim=-1).tolist()
    return row


@torch.no_grad()
def features(name: str, file: Path, words: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Latent means of InfoRM or last states of a standard model ``(N, K)``, and rewards, of words ``(N, L)``."""
    from safetensors.torch import load_file

    proxies = Proxies([kept_variants()[name][0]], [0], torch.device("cpu"))
    kept = {part.removeprefix("weights."): value[None] for part, value in load_file(file).items()}
    proxies.model.eval().load_state_dict({part: kept[part][0] for part in proxies.weights})
    states = torch.cat([proxies.states(kept, part[None])[0] for part in words.split(512)])
    rewards = proxies.model.score(states)[:, 0].double().numpy()
    return (proxies.model.score.encode(states)[0] if proxies.is_inform else states).double().numpy(), rewards


def statistics_of(points: np.ndarray) -> dict[str, list[float]]:
    """Each statistic of each set, from the points of the reference and then of the sets."""
    from inform_rm.eval.detection.clusters import auto_eps, fit_csi
    from inform_rm.eval.detection.nearest_neighbours import fit_nearest_neighbours
    from inform_rm.eval.detection.outliers import fit_mop
    from inform_rm.eval.detection.settings import DetectionSettings

    reference, sets = points[:REFERENCE], points[REFERENCE:].reshape(-1, RESPONSES, points.shape[1])
    settings = DetectionSettings(eps=auto_eps(reference, num_points=RESPONSES), alpha=ALPHA)
    csi, mop, neighbours = (fit(reference, settings) for fit in (fit_csi, fit_mop, fit_nearest_neighbours))
    found: dict[str, list[float]] = {
        name: [] for name in ("CSI", "MOP", "Mahalanobis", "kNN outliers", "kNN distance")
    }
    for each in sets:
        values, columns = mop(each, 0)
        found["MOP"].append(values["mop"])
        found["Mahalanobis"].append(float(np.sqrt(columns["squared_mahalanobis"]).mean()))
        values, _ = neighbours(each, 0)
        found["kNN outliers"].append(values["knn_outliers"])
        found["kNN distance"].append(values["mean_knn_distance"])
        found["CSI"].append(csi(each, 0)[0]["csi_normalized"])
    return found


if __name__ == "__main__":
    main()
