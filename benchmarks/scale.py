"""What a run needs in memory, time and storage: shapes and measured figures, for docs/results/scale.md.

    python benchmarks/scale.py --shared DIR

Counts parameters of public shapes on the meta device, and tokens of a pair in real data. Bytes a parameter come from
a checkpoint that is made on the spot. The speed of a GPU is an assumption (``--flops``, ``--utilisation``), not
measured.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, LlamaConfig

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
DATA = ("hh-rlhf", "qa-feedback", "ukp-convarg1")
PAIRS = 10_000_000
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real data/ and models/")
    parser.add_argument("--flops", type=float, default=989e12, help="bf16 peak of a GPU (default: H100, H200)")
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of it that training reaches")
    arguments = parser.parse_args()
    bytes_each = checkpoint_bytes(arguments.shared)
    print(f"Bytes a parameter in a checkpoint of full training: {bytes_each}")
    tokens = {name: tokens_of_a_pair(arguments.shared, name) for name in DATA}
    print(f"Tokens of a packed pair (prompt once): {tokens}\n")
    mean_tokens = tokens["hh-rlhf"]
    print("| shape, GPUs | weights, gradients, Adam / GPU | with bf16 weights and Adam | largest block, gathered |"
          " activations, 8 pairs | days for 10 M pairs | checkpoint with optimizer | Hub folder |")  # fmt: skip
    print("|" + "---|" * 8)
    for name, gpus in (("Llama-3-8B", 8), ("Llama-3-8B", 16), ("Llama-3-70B", 32), ("Llama-3-70B", 64)):
        config = LlamaConfig(**SHAPES[name])
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        layer = sum(parameter.numel() for parameter in model.layers[0].parameters())
        embedding = model.embed_tokens.weight.numel()
        computed = total - embedding  # an embedding is looked up, not multiplied
        # Forward 2 and backward 4 operations a parameter and token, and the forward pass once more: checkpointing.
        flops = 8 * computed * mean_tokens * PAIRS
        days = flops / (arguments.flops * arguments.utilisation * gpus) / 86400
        batch_tokens = 8 * mean_tokens
        # Checkpointing keeps each layer's input, in bf16; within one layer about 34 bytes a hidden unit and token
        # (Korthikanti et al. 2022, eq. 2, without the attention's square, which sdpa does not store).
        activations = batch_tokens * config.hidden_size * (2 * config.num_hidden_layers + 34)
        full = 16 * total / gpus
        half = 8 * total / gpus
        gathered = max(layer, embedding) * 2 * 2  # bf16, and the next block while this one computes
        cells = [
            f"{name} ({total / 1e9:.2f} B), {gpus}", f"{full / GIB:.1f} GiB", f"{half / GIB:.1f} GiB",
            f"{gathered / GIB:.1f} GiB", f"{activations / GIB:.1f} GiB", f"{days:.1f}",
            f"{sum(bytes_each.values()) * total / GIB:.0f} GiB", f"{bytes_each['weights'] * total / GIB:.0f} GiB",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def checkpoint_bytes(shared: Path) -> dict[str, float]:
    """Bytes a trainable parameter of weights and optimizer state, from a checkpoint of one real training step."""
    from inform_rm import train
    from inform_rm.training.reward_arguments import RewardTrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        train(
            RewardTrainingArguments(
                model=str(shared / "models" / "smollm2-135m-first6-v16k"),
                output_dir=f"{folder}/run",
                max_steps=1,
                data=(str(shared / "data" / "truthfulqa" / "train.jsonl.gz"),),
                max_pairs_per_source=8,
                use_cpu=True,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=1,
                chat_template="plain",
                overlong="error",
            )
        )
        checkpoint = Path(folder, "run", "checkpoints", "checkpoint-1")
        from safetensors import safe_open

        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            number = sum(file.get_tensor(name).numel() for name in file.keys())
        sizes = json.loads((checkpoint / "complete.json").read_text())
    return {
        "weights": round(sizes["model.safetensors"] / number, 3),
        "optimizer": round(sizes["optimizer.pt"] / number, 3),
    }


def tokens_of_a_pair(shared: Path, name: str) -> int:
    """Mean tokens of a pair of a real set, the shared prompt counted once."""
    from inform_rm.data.encoding import encode_pairs
    from inform_rm.data.preferences import load_preferences
    from inform_rm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared / "models" / "smollm2-135m-first6-v16k"), chat_template="plain")
    pairs = load_preferences(shared / "data" / name / "train.jsonl.gz").dataset.select(range(500))
    rows = encode_pairs(pairs, tokenizer, max_length=None, overlong="error").dataset
    sizes = [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) - row["prompt_length"] for row in rows]
    return round(sum(sizes) / len(sizes))


if __name__ == "__main__":
    main()
