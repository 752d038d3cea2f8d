"""Rewards of a tiny random model of every decoder that transformers knows: equal however they are computed?

python benchmarks/architectures.py [--only llama,mamba] [--output docs/reference/backbones.md] [--json FILE]

Each model goes the whole way: a causal LM saved by transformers, made a reward model by `from_backbone`, saved, and
loaded again in a process in which this package is not imported. Its rewards of rows alone are compared with those of
the same rows padded on the right, padded on the left, and packed with shared prompts.
"""

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from inform_rm import InfoRMForSequenceClassification
from inform_rm.scoring.packing import pack_sequences, packed_attention_of, packed_rewards, why_not_packed

TOLERANCE = 1e-5
VOCABULARY = 99
# Each is given to the configs that know it.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "sliding_window": 6,
    "init_std": 0.2, "rotary_dim": 4, "ffn_dim": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "n_routed_experts": 4, "num_experts": 4,
    "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
HYBRID = ["linear_attention", "full_attention"]
# What else a model type needs to be tiny, or to have each kind of its layers.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "ctrl": {"dff": 48},
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "falcon": {"num_kv_heads": 4},
    "falcon (ALiBi)": {"alibi": True, "num_kv_heads": 4, "new_decoder_architecture": False},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 48, "attention_chunk_size": 6, "no_rope_layer_interval": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": {"layer_types": HYBRID, "block_size": 8},
    "nemotron_h": {
        "layers_block_type": HYBRID, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
        "chunk_size": 8,
    },
    "opt (projected)": {"word_embed_proj_dim": 16},
    "opt": {"word_embed_proj_dim": 32},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16,
        "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 8, "adapter_rank": 4,
        "num_mem_blocks": 1, "kv_channels": 16, "num_query_groups": 4,
    },
}  # fmt: skip
MODEL_TYPES = [
    *"""
apertus arcee bamba biogpt bitnet bloom codegen cohere cohere2 cpmant ctrl dbrx deepseek_v2 deepseek_v3 diffllama
doge dots1 ernie4_5 ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text
gemma3n_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe
granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe lfm2 lfm2_moe llama llama4_text
mamba mamba2 minimax ministral mistral mixtral modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo olmo2
olmo3 olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next
recurrent_gemma rwkv seed_oss smollm3 stablelm starcoder2 vaultgemma xglm xlstm zamba zamba2
""".split(),
    "falcon (ALiBi)", "opt (projected)",
]  # fmt: skip
PROMPT = 7
# A process that may import torch and transformers only: the model's code comes from its folder.
LOADER = """
import json, sys
import torch, transformers
transformers.logging.set_verbosity_error()
from transformers import AutoModelForSequenceClassification
torch.set_num_threads(1)
rewards = {}
for name, folder, batches in json.load(open(sys.argv[1])):
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            raise ValueError(f"not all weights fit: {info}")
        model.eval()
        with torch.no_grad():
            rewards[name] = [
                model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0].tolist()
                for ids, mask in batches
            ]
    except Exception as error:
        rewards[name] = f"{type(error).__name__}: {error}"
assert "inform_rm" not in sys.modules
json.dump(rewards, open(sys.argv[2], "w"))
"""

# Where the results begin in the page that --output names.
HEADING = "## What was tried"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--output", help="a Markdown page: what follows its heading 'What was tried' is replaced")
    parser.add_argument("--json", help="write the differences as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("inform_rm").setLevel(logging.ERROR)
    start = time.perf_counter()
    names = arguments.only.split(",") if arguments.only else sorted(MODEL_TYPES)
    with tempfile.TemporaryDirectory() as folder:
        results = {name: try_here(name, Path(folder) / name.replace(" ", "-")) for name in names}
        load_without_package(results, Path(folder))
    table = [
        "| model type | parameters | saved and loaded | padded right | padded left | packed |",
        "|---|---|---|---|---|---|",
    ]
    table += [row(name, result) for name, result in results.items()]
    text = summary(results, time.perf_counter() - start) + "\n\n" + "\n".join(table)
    print(text)
    if arguments.json:
        for result in results.values():
            result.pop("batches", None)
        Path(arguments.json).write_text(json.dumps(results, indent=1))
    if arguments.output:
        path = Path(arguments.output)
        before = path.read_text().partition(HEADING)[0]
        path.write_text(f"{before}{HEADING}\n\n{text}\n")


def make_config(name: str) -> Any:
    """A tiny config: the sizes of `SIZES` that the model type knows, and what `SPECIAL` adds."""
    model_type = name.split(" ")[0]
    known = AutoConfig.for_model(model_type)
    fields = set(known.to_dict()) | set(known.attribute_map)
    sizes = {key: value for key, value in SIZES.items() if key in fields}
    return AutoConfig.for_model(model_type, **{**sizes, **SPECIAL.get(name, {})})


def example_rows() -> list[list[int]]:
    """Five rows: three with the same prompt, one that differs from the first in its first token alone, one short."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, VOCABULARY, (40,), generator=generator).tolist()
    prompt = drawn[:PROMPT]
    rows = [prompt + drawn[7:11], prompt + drawn[11:20], prompt + drawn[20:21]]
    return [*rows, [prompt[0] % 90 + 4, *rows[0][1:]], drawn[30:33]]


def try_here(name: str, folder: Path) -> dict[str, Any]:
    """Build, save, `from_backbone`, save again, and score packed; differences, or the reason why not."""
    rows = example_rows()
    try:
        torch.manual_seed(0)
        causal_lm = AutoModelForCausalLM.from_config(make_config(name)).eval()
        causal_lm.save_pretrained(folder / "lm")
        model = InfoRMForSequenceClassification.from_backbone(folder / "lm", latent_dim=8, dtype=torch.float32).eval()
        with torch.no_grad():
            ids = torch.tensor(rows[:1])
            # Llama 4's causal LM does not find its own backbone under its prefix.
            backbone = causal_lm.model if causal_lm.base_model is causal_lm else causal_lm.base_model
            theirs = backbone(ids, use_cache=False)[0]
            weights = (theirs - model.model(ids, use_cache=False)[0]).abs().max().item()
            alone = [model(torch.tensor([ids])).logits.item() for ids in rows]
        model.save_pretrained(folder / "reward")
        why_not = why_not_packed(model)
        packed = None
        if why_not is None:
            with torch.no_grad(), packed_attention_of(model):
                together, _ = packed_rewards(model, pack_sequences(rows, [PROMPT] * 3 + [0, 0]))
            packed = largest_difference(together.tolist(), alone)
    except Exception as error:
        return {"refused": " ".join(str(error).replace(f"{folder}/lm", "it").split())[:150]}
    return {
        "folder": str(folder / "reward"), "alone": alone, "batches": padded_batches(rows), "packed": packed,
        "why_not_packed": why_not, "weights": weights, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def padded_batches(rows: list[list[int]]) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Ids and masks: each row alone, then all padded on the right, then on the left, with an ordinary token."""
    longest = max(map(len, rows)) + 3
    batches = [([ids], [[1] * len(ids)]) for ids in rows]
    right = [(ids + [5] * (longest - len(ids)), [1] * len(ids) + [0] * (longest - len(ids))) for ids in rows]
    left = [([5] * (longest - len(ids)) + ids, [0] * (longest - len(ids)) + [1] * len(ids)) for ids in rows]
    return [*batches, *[([ids for ids, _ in side], [mask for _, mask in side]) for side in (right, left)]]


def load_without_package(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Let a process without this package load every saved model, and add the differences of its rewards."""
    jobs = [(name, result["folder"], result["batches"]) for name, result in results.items() if "folder" in result]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", LOADER, str(folder / "jobs.json"), str(folder / "rewards.json")]
    subprocess.run(command, env=environment, cwd=folder, check=True, stderr=subprocess.DEVNULL)
    for name, rewards in json.loads((folder / "rewards.json").read_text()).items():
        result = results[name]
        if isinstance(rewards, str):
            result["refused"] = rewards[:200]
            continue
        *alone, right, left = rewards
        result["reloaded"] = largest_difference([reward for (reward,) in alone], result["alone"])
        result["right"] = largest_difference(right, result["alone"])
        result["left"] = largest_difference(left, result["alone"])


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Infinite where a reward is no number."""
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    return max(difference if math.isfinite(difference) else math.inf for difference in differences)


def row(name: str, result: dict[str, Any]) -> str:
    if "refused" in result:
        return f"| {name} | | refused: {result['refused']} | | | |"
    packed = result["why_not_packed"] if result["packed"] is None else cell(result["packed"])
    saved = cell(max(result["reloaded"], result["weights"]))
    if abs(result["alone"][0] - result["alone"][3]) < 10 * TOLERANCE:
        saved += " (does not show: blind to its first token)"
    cells = [name, f"{result['parameters']:,}", saved, cell(result["right"]), cell(result["left"]), packed]
    return f"| {' | '.join(cells)} |"


def cell(difference: float) -> str:
    return f"{difference:.0e}" if difference <= TOLERANCE else f"**{difference:.0e}**"


def summary(results: dict[str, dict[str, Any]], seconds: float) -> str:
    ran = [result for result in results.values() if "refused" not in result]
    checks = ("weights", "reloaded", "right", "left")
    equal = sum(max(result[check] for check in checks) <= TOLERANCE for result in ran)
    packed = sum(result["packed"] is not None and result["packed"] <= TOLERANCE for result in ran)
    return (
        f"{equal} of {len(results)} give equal rewards ({TOLERANCE:g}) alone, padded on either side, and after "
        f"saving and loading;\n{packed} of these also packed; {len(results) - len(ran)} refused. transformers "
        f"{transformers.__version__}, torch {torch.__version__.split('+')[0]}, on a CPU; {seconds:.0f} s."
    )


if __name__ == "__main__":
    main()
