"""Stage 5 of `real_text.py`: policies trained with GRPO against one proxy each, and judged by gold.

LoRA (peft) in all linear layers of the policy. A step: `GROUPS` prompts with `PER_GROUP` responses each, advantages
within a group, one update. Responses are written by a copy of the policy with the LoRA weights added in. Every few
steps one response to each held-aside prompt is measured: proxy, gold, and the exact KL divergence of each token's
distribution from the start's, summed over the response. Files: ``policy/NAME.safetensors`` with one row a measured
response: step, proxy, gold, kl, tokens, the response's ids, latents by the watching InfoRM and the second model's
reward; ``policy/NAME.json`` last.
"""

import copy
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inform_rm.util.files import write_json
from real_text_gold import Gold
from real_text_models import batch, half_products, rewards_of
from real_text_proxies import ATTACKED_NOISE, REPORT_SEEDS, Run, chosen_of, load_run, read_run
from real_text_texts import Rows, Texts, rows_of, seed_of
from real_text_writer import Writer

RANK = 16
GROUPS, PER_GROUP, ROWS_AT_ONCE = 32, 8, 32
CLIP = 0.2
COEFFICIENTS = (0.0, 0.05)
ATTACKED = ("standard, chosen", "InfoRM, chosen")
WORDS_AT_ONCE = 2048  # tokens whose distributions are held at once


@dataclass(frozen=True)
class PolicyRun:
    """One policy.

    Attributes:
        proxy: name of the proxy in the tables.
        coefficient: of the KL divergence from the start, a token, beside advantages of unit variance.
        seed: of the proxy, and of prompts and draws.
        learning_rate: of the LoRA weights.
        steps: each with new responses.
        every: steps between measurements.
    """

    proxy: str
    coefficient: float
    seed: int
    learning_rate: float = 5e-4
    steps: int = 42
    every: int = 6

    @property
    def name(self) -> str:
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.proxy.replace(', ', '-').replace(' ', '-')}-{self.coefficient:g}-{self.seed}-{key}"


def grpo_loss(own: Tensor, old: Tensor, start: Tensor | None, advantages: Tensor, coefficient: float) -> Tensor:
    """Mean over tokens of the clipped policy gradient's loss and the KL estimate of arXiv:2402.03300, eq. 3 and 4.

    Args:
        own: ``(N,)`` log probabilities of the drawn tokens by the policy.
        old: ``(N,)`` by the policy that drew them.
        start: ``(N,)`` by the start policy, or ``None`` with coefficient 0.
        advantages: ``(N,)``, each token's the one of its response.
        coefficient: of the KL divergence.
    """
    ratio = (own - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    if start is not None:
        loss = loss + coefficient * ((start - own).exp() - (start - own) - 1)
    return loss.mean()


def advantages_of(rewards: Tensor, per_group: int) -> Tensor:
    """``(B,)`` rewards less the mean of their group and over its standard deviation."""
    groups = rewards.view(-1, per_group)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def kl_of_tokens(log_probs: Tensor, start: Tensor) -> Tensor:
    """``(N,)`` KL divergences in nats of the distributions of the next token from the start's."""
    return (log_probs.exp() * (log_probs - start)).sum(dim=1)


class Policy:
    """The start policy with LoRA weights, and the copy that writes.

    Args:
        model: a ``LlamaForCausalLM`` on its device.
        new_tokens: longest response.
        end: the token that ends one.
    """

    def __init__(self, model: Any, new_tokens: int, end: int):
        from peft import LoraConfig, get_peft_model

        self.writer = Writer(copy.deepcopy(model), new_tokens, end)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        self.wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))
        self.device, self.new_tokens = str(model.device), new_tokens

    def parameters(self) -> list[nn.Parameter]:
        return [each for each in self.wrapped.parameters() if each.requires_grad]

    @torch.no_grad()
    def write(self, prompts: list[list[int]], per_prompt: int, seed: int) -> Rows:
        """Responses by the policy as it is now."""
        for name, module in self.wrapped.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                merged = module.base_layer.weight + module.get_delta_weight("default")
                self.writer.model.get_submodule(name).weight.copy_(merged)
        responses = self.writer.write(prompts, per_prompt, seed)
        numbers = [number for number in range(len(prompts)) for _ in range(per_prompt)]
        return rows_of([prompts[number] for number in numbers], responses, numbers)

    def drawn(self, rows: Rows, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows the ``(N, H)`` states before each token that was drawn, that token, and its row (0, 1, ...).

        The end that a cut response was given was not drawn.
        """
        ids, mask = batch(rows, places, self.device)
        starts, lengths = rows.prompt_lengths[places], rows.lengths[places]
        stops = torch.minimum(lengths, starts + self.new_tokens)
        every = torch.arange(ids.shape[1])
        is_drawn = ((every >= starts[:, None]) & (every < stops[:, None])).to(self.device)
        with half_products(self.device):
            hidden = self.wrapped.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False)
        return hidden.last_hidden_state[:, :-1][is_drawn[:, 1:]], ids[is_drawn], is_drawn.nonzero()[:, 0]

    def log_probs(self, states: Tensor) -> Tensor:
        """``(N, V)`` float32."""
        with half_products(self.device):
            logits = self.wrapped.get_base_model().lm_head(states)
        return logits.float().log_softmax(dim=1)

    def log_probs_of(self, states: Tensor, tokens: Tensor) -> Tensor:
        """``(N,)`` of these tokens; distributions are not kept for the backward pass."""

        def some(states: Tensor, tokens: Tensor) -> Tensor:
            return self.log_probs(states).gather(1, tokens[:, None])[:, 0]

        parts = zip(states.split(WORDS_AT_ONCE), tokens.split(WORDS_AT_ONCE), strict=True)
        return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])

    @torch.no_grad()
    def kl_from_start(self, rows: Rows) -> Tensor:
        """``(B,)`` exact KL divergence of each response's distributions from the start's, nats, on the CPU."""
        found = torch.zeros(len(rows.lengths))
        for places in torch.arange(len(rows.lengths)).split(ROWS_AT_ONCE):
            states, _, row = self.drawn(rows, places)
            with self.wrapped.disable_adapter():
                before, _, _ = self.drawn(rows, places)
            kls = torch.cat([
                kl_of_tokens(self.log_probs(one), self.log_probs(other))
                for one, other in zip(states.split(WORDS_AT_ONCE), before.split(WORDS_AT_ONCE), strict=True)
            ])  # fmt: skip
            found[places] = torch.zeros(len(places), device=kls.device).index_add(0, row, kls).cpu()
        return found

    def update(self, rows: Rows, advantages: Tensor, coefficient: float, optimizer: torch.optim.Optimizer) -> None:
        """One step on all rows, a few at a time."""
        every = torch.arange(len(rows.lengths))
        stops = torch.minimum(rows.responses(), torch.tensor(self.new_tokens))
        optimizer.zero_grad()
        for places in every.split(ROWS_AT_ONCE):
            states, tokens, row = self.drawn(rows, places)
            own, start = self.log_probs_of(states, tokens), None
            if coefficient:
                with torch.no_grad(), self.wrapped.disable_adapter():
                    start = self.log_probs_of(self.drawn(rows, places)[0], tokens)
            each = advantages[places].to(self.device)[row]
            loss = grpo_loss(own, own.detach(), start, each, coefficient)
            (loss * (len(tokens) / float(stops.sum()))).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimizer.step()


class Judges:
    """Who reads responses: the proxy, gold, and after the run two watchers.

    These are the chosen InfoRM of the run's own seed, of which CSI is asked, and the chosen standard model of the next
    seed, which learnt from other flips.
    """

    def __init__(self, folder: Path, model_folder: Path, layers: int, run: PolicyRun, device: str):
        self.folder, self.model_folder, self.layers, self.device = folder, model_folder, layers, device
        self.chosen = chosen_of(folder)
        self.proxy = self._named(run.proxy, run.seed)
        self.gold = Gold(folder, device)
        after = REPORT_SEEDS[(REPORT_SEEDS.index(run.seed) + 1) % len(REPORT_SEEDS)]
        self.second = self._named("standard, chosen", after)
        self.watcher = self.proxy if run.proxy == "InfoRM, chosen" else self._named("InfoRM, chosen", run.seed)

    def _named(self, name: str, seed: int) -> tuple[Any, list[float]]:
        run = Run(self.chosen[name], ATTACKED_NOISE, seed)
        figures = read_run(self.folder, run.name)
        assert figures is not None
        return load_run(self.folder, self.model_folder, self.layers, run, self.device), figures["units"]

    def by_proxy(self, rows: Rows) -> Tensor:
        model, (mean, deviation) = self.proxy
        return (rewards_of(model, rows, self.device)[0] - mean) / deviation

    def columns(self, rows: Rows) -> dict[str, Tensor]:
        """What all but KL have to say of measured responses."""
        model, (mean, deviation) = self.second
        return {
            "proxy": self.by_proxy(rows), "gold": self.gold(rows).float(),
            "second": (rewards_of(model, rows, self.device)[0] - mean) / deviation,
            "latents": rewards_of(self.watcher[0], rows, self.device, latents=True)[1].half(),
        }  # fmt: skip


def optimise(folder: Path, model_folder: Path, texts: Texts, layers: int, run: PolicyRun, device: str,
             stop_at: float | None = None) -> None:  # fmt: skip
    """Train a policy and write its files; `stop_at` (`time.time()`) ends it sooner, and what is measured is kept."""
    target = folder / "policy" / f"{run.name}.json"
    if target.exists():
        return
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(seed_of(run.seed, "lora"))
    policy = Policy(AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).to(device), texts.sizes.new_tokens,
                    texts.end)  # fmt: skip
    judges = Judges(folder, model_folder, layers, run, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    asked, held_aside = (texts.conversation_ids(texts.prompts(part)) for part in ("policy", "measured"))
    order = torch.Generator().manual_seed(run.seed)
    waiting: list[int] = []
    measured: list[dict[str, Tensor]] = []
    started = time.time()
    for step in range(run.steps + 1):
        late = stop_at is not None and time.time() > stop_at
        if step % run.every == 0 or step == run.steps or late:
            measured.append(_measured(policy, judges, held_aside, run, step))
            means = ", ".join(f"{name} {measured[-1][name].mean():.2f}" for name in ("proxy", "gold", "kl"))
            print(f"{run.name}: step {step}, {time.time() - started:.0f} s, {means}", flush=True)
        if step == run.steps or late:
            break
        if len(waiting) < GROUPS:
            waiting += torch.randperm(len(asked), generator=order).tolist()
        now, waiting = waiting[:GROUPS], waiting[GROUPS:]
        rows = policy.write([asked[place] for place in now], PER_GROUP, seed_of(run.seed, "trained", step))
        policy.update(rows, advantages_of(judges.by_proxy(rows), PER_GROUP), run.coefficient, optimizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: torch.cat([each[name] for each in measured]) for name in measured[0] if name != "ids"}
    width = max(each["ids"].shape[1] for each in measured)
    columns["ids"] = torch.cat(
        [nn.functional.pad(each["ids"], (0, width - each["ids"].shape[1])) for each in measured]
    )
    save_file(columns, target.with_suffix(".safetensors"))
    write_json(target, {"run": asdict(run), "steps": step, "seconds": round(time.time() - started)})


def _measured(
    policy: Policy, judges: Judges, prompts: list[list[int]], run: PolicyRun, step: int
) -> dict[str, Tensor]:
    rows = policy.write(prompts, 1, seed_of(run.seed, "measured", step))
    return {
        **judges.columns(rows), "kl": policy.kl_from_start(rows), "tokens": rows.responses(),
        "step": torch.full_like(rows.lengths, step), "ids": rows.ids.int(), "prompt_lengths": rows.prompt_lengths,
    }  # fmt: skip


def policy_runs() -> list[PolicyRun]:
    return [PolicyRun(name, coefficient, seed) for coefficient in COEFFICIENTS for name in ATTACKED
            for seed in REPORT_SEEDS]  # fmt: skip
