"""Best-of-n with a causal language model: what choosing by a reward does to another reward.

    python examples/best_of_n.py --output runs/best-of-n [--policy MODEL --proxy MODEL --gold MODEL]

Needs a causal LM that writes, a reward model that chooses (the proxy), and one that is taken for the truth (the gold).
Without them it takes small random ones that are made here; nothing is downloaded. About 10 seconds on one CPU core.
"""

import argparse
from pathlib import Path

import torch

from inform_rm import InfoRMForSequenceClassification, simulate
from inform_rm.world.backbone import train_tokenizer, write_backbone
from inform_rm.world.worlds import WorldConfig, sample_prompts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, required=True)
for name in ("policy", "proxy", "gold"):
    parser.add_argument(f"--{name}")
options = parser.parse_args()
folder: Path = options.output

if options.policy is None or options.proxy is None or options.gold is None:
    write_backbone(folder / "random")
    for seed, name in enumerate(("proxy", "gold")):
        torch.manual_seed(seed)
        model = InfoRMForSequenceClassification.from_backbone(str(folder / "random"), latent_dim=8)
        model.save_pretrained(folder / name)
        train_tokenizer().save_pretrained(folder / name)

found = simulate(
    options.proxy or str(folder / "proxy"),
    folder / "result",
    gold=options.gold or str(folder / "gold"),
    policy=options.policy or str(folder / "random"),
    prompts=sample_prompts(WorldConfig(), 8),
    num_responses=16,  # the policy goes as far as KL = log 16 - 15/16 nats
    max_new_tokens=24,
    device="cpu",
    progress=False,
)
peak = found.proxies["proxy"]["peak"]
print(f"the policy wrote {found.num_responses} responses to each of {found.num_prompts} prompts")
print(f"gold peaks at n = {peak['n']} (KL {peak['kl_nats']:.2f} nats), {peak['fall']:.3f} above n = {found.ns[-1]}")
print(f"page: {folder / 'result' / 'result.html'}")
