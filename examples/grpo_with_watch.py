"""GRPO with TRL against an InfoRM reward, shaped by the latents and watched for overoptimization.

    python examples/grpo_with_watch.py --output runs/grpo [--policy MODEL --reward FOLDER]

Needs trl (pip install 'inform-rm[rl]'). Without models it takes small random ones that are made here; nothing is
downloaded. About 15 seconds on one CPU core, most of them imports. With random models the figures say nothing; what to
look for is which lines there are.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from inform_rm import InfoRMForSequenceClassification, RewardScorer
from inform_rm.eval.detection.latents import collect_latents
from inform_rm.integrations.trl import OveroptimizationCallback, RewardFunction
from inform_rm.world.backbone import train_tokenizer, write_backbone
from inform_rm.world.worlds import WorldConfig, sample_prompts, sample_responses

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--policy", help="causal LM")
parser.add_argument("--reward", help="InfoRM reward model")
options = parser.parse_args()
folder: Path = options.output

if options.policy is None:
    write_backbone(folder / "policy")
if options.reward is None:
    torch.manual_seed(0)
    reward_model = InfoRMForSequenceClassification.from_backbone(str(folder / "policy"), latent_dim=8)
    reward_model.save_pretrained(folder / "reward")
    train_tokenizer().save_pretrained(folder / "reward")
scorer = RewardScorer(options.reward or folder / "reward")
prompts = sample_prompts(WorldConfig(), 32)

# The reference: latents of responses from before the optimization, here of the world's own sampler.
responses = [sample_responses(prompt, 1)[0] for prompt in prompts]
reference = collect_latents(scorer, prompts, responses).values

# r - 0.1 * D_M: responses that the reference never looked like lose reward (arXiv:2510.13694).
reward = RewardFunction(scorer, reference=reference, shaping_coefficient=0.1, alpha=0.05)
trainer = GRPOTrainer(
    options.policy or str(folder / "policy"),
    reward_funcs=reward,
    args=GRPOConfig(
        str(folder / "run"), max_steps=4, learning_rate=1e-4, num_generations=4, per_device_train_batch_size=16,
        max_completion_length=16, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
)  # fmt: skip
# Every two steps: CSI, outliers and their like for what the policy has just written. The run stops when CSI jumps.
watch = OveroptimizationCallback(scorer, reference, reward.recent, every=2, action="stop", eps=0.8, alpha=0.05)
watch.attach(trainer)
trainer.train()

for line in trainer.state.log_history:
    if "csi" in line:
        print(f"step {line['step']}: CSI {line['csi_normalized']:.3f} a response, outliers {line['mop']:.2f}, "
              f"reward {line['sampled_reward']:.3f}")  # fmt: skip
print(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
