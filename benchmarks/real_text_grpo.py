"""Stage 6 of `real_text.py`: policies trained with GRPO against one proxy each, and judged by gold.

LoRA in the top layers of the policy alone: a sampled text's states below them, and those that proxies read, are the
start's, and come with the sampling. Every prompt is asked once. A step: `GROUPS` prompts with `PER_GROUP` responses
each, advantages within a group, `PASSES` times an update with each half of them, with clipping. Every few steps one
response to each held-aside prompt is measured: proxy, gold, and the exact KL divergence of each token's distribution
from the start's, summed over the response. Files: ``policy/NAME/samples/PART`` as those of the stage sample, parts
``measured`` and ``trained``, one chunk a step, with proxy, gold and KL in the lines; ``policy/NAME/done.json`` last.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from inform_rm.util.files import write_json
from real_text_gold import UNITS, gold_rewards, load_gold
from real_text_models import Prepared, TopLayers, attention, rewards_of, start_of
from real_text_policy import LlamaWithStates, Rows, write_rows
from real_text_proxies import ATTACKED_NOISE, REPORT_SEEDS, Run, chosen_of, read_run, weights_of_run
from real_text_samples import Sizes, Texts, depths_of, layers_of, save_chunk

LORA_LAYERS, RANK = 6, 16
GROUPS, PER_GROUP, PASSES = 4, 4, 2
CLIP = 0.2
COEFFICIENTS = (0.0, 0.1)
ATTACKED = ("standard, chosen", "InfoRM, chosen", "InfoRM, as it comes")  # the last without KL penalty alone
Where = tuple[Tensor, Tensor]  # rows and columns of the tokens that were drawn


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
    learning_rate: float = 2e-3
    steps: int = 16
    every: int = 4

    @property
    def name(self) -> str:
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.proxy.replace(', ', '-').replace(' ', '-')}-{self.coefficient:g}-{self.seed}-{key}"


def grpo_loss(
    log_probs: Tensor, start: Tensor | None, drawn: Tensor, old: Tensor, advantages: Tensor, coefficient: float
) -> Tensor:
    """Mean over tokens of the clipped policy gradient's loss and the exact KL divergence (arXiv:2402.03300, eq. 3).

    Args:
        log_probs: ``(N, V)`` of the policy, N drawn tokens.
        start: ``(N, V)`` of the start policy, or ``None`` with coefficient 0.
        drawn: ``(N,)`` tokens.
        old: ``(N,)`` log probability of them by the policy that drew them.
        advantages: ``(N,)``, each token's the one of its response.
        coefficient: of the KL divergence.
    """
    ratio = (log_probs.gather(1, drawn[:, None])[:, 0] - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    if start is None:
        return -gain.mean()
    return coefficient * kl_of_tokens(log_probs, start).mean() - gain.mean()


def kl_of_tokens(log_probs: Tensor, start: Tensor) -> Tensor:
    """``(N,)`` KL divergences in nats of the distributions of the next token from the start's."""
    return (log_probs.exp() * (log_probs - start)).sum(dim=1)


def advantages_of(rewards: Tensor, per_group: int) -> Tensor:
    """``(B,)`` rewards less the mean of their group and over its standard deviation."""
    groups = rewards.view(-1, per_group)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


class Policy:
    """The start policy with LoRA (peft) in its top layers.

    Args:
        model: a ``LlamaForCausalLM``.
        spans: trained layers of proxies and of gold.
        lora_layers: how many layers have LoRA weights.
    """

    def __init__(self, model: Any, spans: tuple[range, range], lora_layers: int = LORA_LAYERS):
        from peft import LoraConfig, get_peft_model

        layers = model.config.num_hidden_layers
        self.first, (self.proxy_depth, self.gold_depth) = layers - lora_layers, [span.start for span in spans]
        if not self.proxy_depth <= self.first <= self.gold_depth:
            raise ValueError(
                f"LoRA begins at layer {self.first}; proxies read the states before layer {self.proxy_depth}, gold "
                f"those before {self.gold_depth}: it has to begin in between. Choose another number of layers."
            )
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=names, layers_to_transform=list(range(self.first, layers))
        )
        self.wrapped = get_peft_model(model, config)
        self.model = self.wrapped.get_base_model()
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        self.reader = LlamaWithStates(self.model, tuple(dict.fromkeys((self.proxy_depth, self.first))))

    def parameters(self) -> list[nn.Parameter]:
        return [each for each in self.wrapped.parameters() if each.requires_grad]

    def top(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """``(B, T, H)`` normed last states, and those before gold's layer."""
        body, dtype, size = self.model.model, self.model.lm_head.weight.dtype, self.reader.size
        hidden = rows.states[self.first].float()
        every = torch.arange(hidden.shape[1])[None]
        rotary, seen, before = body.rotary_emb(hidden, every), every[:, None] <= every[:, :, None], hidden
        for number, layer in enumerate(body.layers[self.first :], self.first):
            if number == self.gold_depth:
                before = hidden
            own, normed = layer.self_attn, layer.input_layernorm(hidden).to(dtype)
            query, key, value = (
                part(normed).float().unflatten(-1, (-1, size)).transpose(1, 2)
                for part in (own.q_proj, own.k_proj, own.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, *rotary)
            hidden = hidden + own.o_proj(attention(query, key, value, seen).to(dtype))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden).to(dtype))
        return body.norm(hidden), before

    def log_probs(self, normed: Tensor, where: Where) -> Tensor:
        """``(N, V)`` log probabilities at the places of drawn tokens."""
        rows, columns = where
        logits = self.model.lm_head(normed[rows, columns - 1].to(self.reader.dtype)).float()
        return logits.log_softmax(dim=1)


def drawn_places(rows: Rows, new_tokens: int) -> Where:
    """Rows and columns of the tokens that the policy drew; the end of a response that was cut is not one of them."""
    stops = rows.prompt_lengths + (rows.lengths - rows.prompt_lengths).clamp_max(new_tokens)
    columns = torch.arange(rows.ids.shape[1])[None]
    own = (columns >= rows.prompt_lengths[:, None]) & (columns < stops[:, None])
    found = own.nonzero(as_tuple=True)
    return found[0], found[1]


def some_rows(rows: Rows, kept: Tensor) -> Rows:
    states = {depth: value[kept] for depth, value in rows.states.items()}
    return Rows(rows.ids[kept], rows.prompt_lengths[kept], rows.lengths[kept], states)


@dataclass
class Judges:
    """The proxy that a policy is trained against and gold, both in standard deviations of the start's responses."""

    proxy: TopLayers
    proxy_units: list[float]
    gold: TopLayers
    gold_units: list[float]

    def by_proxy(self, rows: Rows, policy: Policy) -> Tensor:
        """``(B,)`` rewards."""
        ready = Prepared(rows.states[policy.proxy_depth], rows.lengths)
        return (rewards_of(self.proxy, ready)[0] - self.proxy_units[0]) / self.proxy_units[1]

    def by_gold(self, before: Tensor, rows: Rows) -> Tensor:
        """``(B,)`` rewards from the start's states before gold's layer."""
        ready = Prepared(before.half(), rows.lengths)
        return (rewards_of(self.gold, ready)[0] - self.gold_units[0]) / self.gold_units[1]


def policy_runs() -> list[PolicyRun]:
    """Seeds before settings, so that what is done of the runs compares the same seeds."""
    free = [
        PolicyRun(name, 0.0, seed) for names in (ATTACKED[:2], ATTACKED[2:]) for seed in REPORT_SEEDS for name in names
    ]
    held = [PolicyRun(name, COEFFICIENTS[1], seed) for seed in REPORT_SEEDS for name in ATTACKED[:2]]
    return free + held


def train_policies(folder: Path, data: Path, model_folder: Path, sizes: Sizes, runs: list[PolicyRun]) -> None:
    """One after the other, each from the start."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = Texts(data, AutoTokenizer.from_pretrained(model_folder), sizes)
    prompts = {part: texts.prompts(part) for part in ("policy", "measured")}
    for run in runs:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
        torch.manual_seed(run.seed)
        spans = depths_of(model.config.num_hidden_layers)
        policy = Policy(model, spans, min(LORA_LAYERS, model.config.num_hidden_layers - spans[0].start))
        optimise(folder, run, policy, judges_of(folder, model_folder, run), texts, prompts)


def judges_of(folder: Path, model_folder: Path, run: PolicyRun) -> Judges:
    layers = layers_of(model_folder)
    proxy, units = proxy_of(folder, model_folder, run.proxy, run.seed)
    return Judges(proxy, units, load_gold(folder, model_folder, layers), gold_rewards(folder, UNITS).tolist())


def proxy_of(folder: Path, model_folder: Path, name: str, seed: int) -> tuple[TopLayers, list[float]]:
    """A proxy of the tables, trained with flipped labels, and mean and deviation of its rewards."""
    variant = chosen_of()[name]
    known, figures = Run(variant, ATTACKED_NOISE, seed), read_run(folder, Run(variant, ATTACKED_NOISE, seed))
    if figures is None:
        raise FileNotFoundError(f"{name}, seed {seed}: not trained. Run the stage 'proxies'.")
    model = start_of(model_folder, depths_of(layers_of(model_folder))[0], variant, 0)
    model.load_state_dict(weights_of_run(folder, known)["member 0"], strict=False)
    return model, figures["units"]["member 0"]


def optimise(
    folder: Path, run: PolicyRun, policy: Policy, judges: Judges, texts: Texts, prompts: dict[str, list[str]]
) -> None:
    """Train a policy and write its files; `prompts` has those to be trained on, and those ``measured``."""
    home = folder / "policy" / run.name
    if (home / "done.json").exists():
        return
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    start_time = time.process_time()
    for step, asked in enumerate(_prompts_of_steps(prompts["policy"], run)):
        if step % run.every == 0:
            rows, normed, where = _written(policy, texts, prompts["measured"], 1, _seed(run.seed, "measured", step))
            _judged(home, "measured", step, policy, judges, texts, prompts["measured"], (rows, normed, where),
                    with_start=True)  # fmt: skip
        if step == run.steps:
            break
        rows, normed, where = _written(policy, texts, asked, PER_GROUP, _seed(run.seed, "trained", step))
        every = [prompt for prompt in asked for _ in range(PER_GROUP)]
        proxy, old, start = _judged(home, "trained", step, policy, judges, texts, every, (rows, normed, where),
                                    with_start=run.coefficient > 0)  # fmt: skip
        _update(policy, optimizer, run.coefficient, rows, where, advantages_of(proxy, PER_GROUP), old, start)
        if step % run.every == 0:
            print(f"{run.name}: step {step}, {time.process_time() - start_time:.0f} s of CPU", flush=True)
    write_json(home / "done.json", {"run": asdict(run), "cpu_seconds": round(time.process_time() - start_time)})


def _prompts_of_steps(prompts: list[str], run: PolicyRun) -> Iterator[list[str]]:
    """`GROUPS` prompts a step, in the order of the seed, and none after the last step."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(run.seed)).tolist()
    if len(order) < GROUPS * run.steps:
        raise ValueError(f"{len(order)} prompts for {run.steps} steps of {GROUPS}. Ask for fewer steps.")
    for step in range(run.steps):
        yield [prompts[place] for place in order[GROUPS * step : GROUPS * (step + 1)]]
    yield []


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def _written(policy: Policy, texts: Texts, asked: list[str], per_prompt: int, seed: int) -> tuple[Rows, Tensor, Where]:
    ids = [texts.prompt_ids(prompt) for prompt in asked]
    rows = write_rows(policy.reader, ids, per_prompt, texts.sizes.new_tokens, texts.end, seed)
    with torch.no_grad():
        normed, _ = policy.top(rows)
    return rows, normed, drawn_places(rows, texts.sizes.new_tokens)


@torch.no_grad()
def _judged(
    home: Path, part: str, step: int, policy: Policy, judges: Judges, texts: Texts, asked: list[str],
    written: tuple[Rows, Tensor, Where], with_start: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Write a chunk; the proxy's rewards, log probabilities of the drawn tokens, and all of the start's, if asked for.

    The start's pass gives gold and KL, too: without it they are missing in the lines.
    """
    rows, normed, where = written
    own, start = policy.log_probs(normed, where), None
    columns = {"proxy": judges.by_proxy(rows, policy)}
    if with_start:
        with policy.wrapped.disable_adapter():
            start_normed, before = policy.top(rows)
            start = policy.log_probs(start_normed, where)
        columns["gold"] = judges.by_gold(before, rows)
        columns["kl"] = torch.zeros(len(rows.lengths)).index_add(0, where[0], kl_of_tokens(own, start))
    lines = []
    for row, prompt in enumerate(asked):
        ids = rows.ids[row, rows.prompt_lengths[row] : rows.lengths[row] - 1].tolist()
        lines.append({"prompt": prompt, "response": texts.tokenizer.decode(ids), "tokens": len(ids), "step": step,
                      **{name: float(values[row]) for name, values in columns.items()}})  # fmt: skip
    kept = {policy.proxy_depth: rows.states[policy.proxy_depth]} if part == "measured" else {}
    save_chunk(home, part, step, Rows(rows.ids, rows.prompt_lengths, rows.lengths, kept), lines, 0.0)
    return columns["proxy"], own.gather(1, rows.ids[where][:, None])[:, 0], start


def _update(
    policy: Policy, optimizer: torch.optim.Optimizer, coefficient: float, rows: Rows, where: Where,
    advantages: Tensor, old: Tensor, start: Tensor | None,
) -> None:  # fmt: skip
    """`PASSES` times two updates, each of half of the rows."""
    for kept in torch.arange(len(rows.lengths)).chunk(2) * PASSES:
        own = torch.isin(where[0], kept)
        place = where[0][own] - int(kept[0]), where[1][own]
        part = some_rows(rows, kept)
        normed, _ = policy.top(part)
        of_start = None if start is None else start[own]
        loss = grpo_loss(policy.log_probs(normed, place), of_start, part.ids[place], old[own],
                         advantages[kept][place[0]], coefficient)  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
