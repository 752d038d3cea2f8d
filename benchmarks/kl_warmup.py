"""Why latents empty, and when the KL term should begin: small runs on human pairs, two cores, no GPU.

    python benchmarks/kl_warmup.py --data DIR/data --model DIR/models/smollm2-135m-first6-v16k --output runs/kl-warmup

The pairs are those that `real_text.py` trains its gold model on, up to `LONGEST` tokens, with flipped labels. Of six
layers the top one, the final norm and the head are trained, on the states before that layer, and only the last token
goes through it: a run is about half a minute on a core. Each run is a line of ``runs.jsonl``: accuracy on clean test
pairs, and every 25 updates the pair loss, the KL and its parts, and the norms of both gradients. Shapes: N rows, T
tokens, H hidden size.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inform_rm.training.kl_warmup import KLWarmup
from inform_rm.training.losses import kl_to_standard_normal, reward_model_loss
from real_text_models import WARMUP, Pairs, Variant, accuracy, batch, batches, start_of
from real_text_proxies import labelled
from real_text_texts import OTHERS_ANSWER, Rows, Sizes, read_rows, sample

LAYERS, PAIRS, TEST_PAIRS, LONGEST, EPOCHS, RATE, PART = 6, 4000, 1000, 96, 4, 3e-4, 25
RUNS = [  # (architecture, beta, kl_warmup_steps, kl_warmup_nats, share of flipped labels)
    ("standard", 0.0, 0.0, 0.0, 0.25), ("inform", 0.01, 0.1, 0.0, 0.25), ("inform", 0.01, 0.4, 0.0, 0.25),
    ("inform", 0.01, 0.1, 0.03, 0.25), ("inform", 0.1, 0.1, 0.0, 0.25), ("inform", 0.1, 0.1, 0.03, 0.25),
    ("standard", 0.0, 0.0, 0.0, 0.0), ("inform", 0.001, 0.1, 0.0, 0.0), ("inform", 0.001, 0.1, 0.03, 0.0),
]  # fmt: skip


class Top:
    """The top layer of a Llama for the last token, on states that are computed once."""

    def __init__(self, model: Any, rows: Rows, needed: Tensor, device: str = "cpu"):
        caught: list[Tensor] = []
        config, layer = model.config.text_config, model.model.layers[-1]
        self.lengths, self.place = rows.lengths, torch.full((len(rows.lengths),), -1)
        self.place[needed] = torch.arange(len(needed))
        hook = layer.register_forward_pre_hook(
            lambda module, args, named: caught.append(args[0] if args else named["hidden_states"]), with_kwargs=True
        )
        width = int(rows.lengths[needed].max())
        self.normed = torch.zeros(len(needed), width, config.hidden_size, dtype=torch.bfloat16)
        self.last = torch.zeros(len(needed), config.hidden_size)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            for part in needed[rows.lengths[needed].argsort()].split(128):
                model(*batch(rows, part, device))
                states = caught.pop().float()
                self.last[self.place[part]] = states[torch.arange(len(part)), rows.lengths[part] - 1]
                self.normed[self.place[part], : states.shape[1]] = _normed(states, config.rms_norm_eps).bfloat16()
        hook.remove()
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.shape, self.epsilon = (
            (config.num_key_value_heads, heads // config.num_key_value_heads, size),
            config.rms_norm_eps,
        )
        turned, sine = model.model.rotary_emb(self.last, torch.arange(width)[None])
        self.turns = turned[0].float(), sine[0].float()

    def __call__(self, model: Any, rows: Tensor) -> Tensor:
        """``(N, H)`` last states, after the final norm, of these rows."""
        layer, (groups, each, size), number = model.model.layers[-1], self.shape, len(rows)
        own, lengths = self.place[rows], self.lengths[rows]
        normed, last = self.normed[own, : int(lengths.max())], lengths - 1
        gain, attention = layer.input_layernorm.weight, layer.self_attn
        packed = torch.cat([attention.k_proj.weight, attention.v_proj.weight]) * gain
        key, value = (normed @ packed.to(normed).T).view(*normed.shape[:2], 2, groups, size).permute(2, 0, 3, 1, 4)
        cosine, sine = (each[: normed.shape[1]] for each in self.turns)
        key = _turned(key, cosine.to(key), sine.to(key))
        query = attention.q_proj(normed[torch.arange(number), last].float() * gain).view(
            number, groups * each, 1, size
        )
        query = _turned(query, cosine[last][:, None, None], sine[last][:, None, None]).view(number, groups, each, size)
        scores = (query.to(key) @ key.transpose(2, 3)).float() / math.sqrt(size)
        later = torch.arange(normed.shape[1]) >= lengths[:, None]
        weights = scores.masked_fill(later[:, None, None], -math.inf).softmax(dim=-1)
        states = self.last[own] + attention.o_proj((weights.to(value) @ value).reshape(number, -1).to(query))
        inputs = _normed(states, self.epsilon) * layer.post_attention_layernorm.weight
        states = states + layer.mlp(inputs)
        return _normed(states, self.epsilon) * model.model.norm.weight


def _normed(states: Tensor, epsilon: float) -> Tensor:
    return states * (states.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding."""
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


def run(top: Top, model: Any, variant: Variant, pairs: Pairs, seed: int) -> list[dict[str, float]]:
    """Train in place as `real_text_models.train`; what happened at every `PART`-th update, losses as means since."""
    trained = [*model.model.layers[-1].parameters(), *model.model.norm.parameters(), *model.score.parameters()]
    model.requires_grad_(False)
    for each in trained:
        each.requires_grad_()
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    torch.manual_seed(100 * seed)
    generator = torch.Generator().manual_seed(100 * seed)
    steps = variant.epochs * -(-len(pairs) // variant.pairs_per_step)
    order = (places for _ in range(variant.epochs)
             for places in batches(pairs, top.lengths, variant.pairs_per_step, generator))  # fmt: skip
    found, losses, warmup = [], [], KLWarmup(variant.beta, variant.kl_warmup_steps, variant.kl_warmup_nats)
    model.train()
    for step, places in enumerate(order):
        rise = min(1.0, (step + 1) / (WARMUP * steps))
        optimizer.param_groups[0]["lr"] = variant.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            states = top(model, torch.cat([pairs.chosen[places], pairs.rejected[places]]))
            if variant.architecture == "inform":
                rewards, mean, log_variance, _ = model.score(states, return_latents=True)
            else:
                rewards = model.score(states)
        loss = preferences = reward_model_loss(*rewards[:, 0].chunk(2))
        losses.append(float(preferences.detach()))
        row: dict[str, float] = {"update": step + 1}
        if variant.architecture == "inform":
            kl = kl_to_standard_normal(mean, log_variance)
            weight = warmup.weight(step, steps)
            warmup.add(len(places), len(places) * losses[-1])
            price = weight * 2 * kl.mean()
            loss = preferences + price
            if (step + 1) % PART == 0:
                at = mean.detach()
                row |= {
                    "weight": weight, "kl": float(kl.detach().mean()),
                    "offset": float(at.mean(dim=0).square().sum() / 2), "spread": float(at.var(dim=0).sum() / 2),
                    "gradient of preferences": _size(preferences, trained),
                    "gradient of KL": _size(price, trained) if weight else 0.0,
                }  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % PART == 0:
            found.append(row | {"loss of preferences": sum(losses) / len(losses)})
            losses = []
    return found


def _size(loss: Tensor, trained: list[Any]) -> float:
    slopes = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    return float(torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum().sqrt())


@torch.no_grad()
def judged(top: Top, model: Any, sets: dict[str, Pairs]) -> dict[str, float]:
    """Accuracy on sets of pairs."""
    model.eval()
    rewards, needed = torch.zeros(len(top.lengths)), _rows_of(sets)
    with torch.autocast("cpu", torch.bfloat16):
        for part in needed[top.lengths[needed].argsort()].split(256):
            rewards[part] = model.score(top(model, part))[:, 0].float()
    return {name: accuracy(rewards, each) for name, each in sets.items()}


def _rows_of(sets: dict[str, Pairs]) -> Tensor:
    return torch.cat([rows for each in sets.values() for rows in (each.chosen, each.rejected)]).unique()


def human_pairs(folder: Path, data: Path, model_folder: Path) -> tuple[Rows, Pairs, dict[str, Pairs]]:
    """Rows of tokens, training pairs, and clean test pairs: all, and those in which the prompt decides."""
    sample(folder, data, model_folder, Sizes(), "cpu", "real")
    rows, about = read_rows(folder, "real"), json.loads((folder / "samples" / "real.json").read_text())
    is_short = (rows.lengths.view(-1, 2).amax(dim=1) <= LONGEST).tolist()
    generator, kept = torch.Generator().manual_seed(0), {}
    for split, most in (("train", PAIRS), ("test", TEST_PAIRS)):
        places = torch.tensor([at for at, row in enumerate(about) if row["split"] == split and is_short[at]])
        kept[split] = places[torch.randperm(len(places), generator=generator)][:most]
    sources = [about[at]["source"] for at in kept["test"].tolist()]
    by_prompt = kept["test"][torch.tensor([name == OTHERS_ANSWER or name.startswith("swap-") for name in sources])]
    sets = {"all pairs": kept["test"], "prompt decides": by_prompt}
    return (
        rows,
        Pairs(2 * kept["train"], 2 * kept["train"] + 1),
        {name: Pairs(2 * at, 2 * at + 1) for name, at in sets.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of preference data")
    parser.add_argument("--model", type=Path, required=True, help="folder of a language model")
    parser.add_argument("--output", type=Path, default=Path("runs/kl-warmup"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows, pairs, sets = human_pairs(arguments.output, arguments.data, arguments.model)
    whole = start_of(arguments.model, LAYERS, Variant("standard"), 0, "cpu").eval()
    whole.set_attn_implementation("eager")  # about twice as quick in bfloat16 on a CPU
    top = Top(whole, rows, _rows_of({**sets, "train": pairs}))
    for seed in arguments.seeds:
        for architecture, beta, steps, nats, noise in RUNS:
            variant = Variant(architecture, beta, steps, nats, learning_rate=RATE, epochs=EPOCHS)
            model = start_of(arguments.model, LAYERS, variant, seed, "cpu")
            log = run(top, model, variant, labelled(pairs, noise, seed)[0], seed)
            found = {"noise": noise, "seed": seed, "accuracy": judged(top, model, sets), "log": log}
            with (arguments.output / "runs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"variant": asdict(variant), **found}) + "\n")
            print(architecture, beta, steps, nats, noise, seed, found["accuracy"], log[-1], flush=True)


if __name__ == "__main__":
    main()
