"""Rewards of folded models from vLLM, against this package's: the second half of `make test-engines`.

    python vllm_rewards.py FOLDER [FAMILY ...]      FOLDER is what `folded_models.py` wrote

Runs where vLLM is installed; neither this package nor pytest need be. Each model is loaded offline (`LLM.classify`,
`LLM.encode`) and served over HTTP (`/classify`, `/pooling`), and asked in every way that
`docs/how-to/engines.md` names. The offset that folding leaves is added here offline, and by vLLM itself
(`logit_mean`) over HTTP. Exit code 1 if a reward differs by more than TOLERANCE,
if a request fails, or if what the page says of `/score` is no longer so.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

TOLERANCE = 1e-3
START_SECONDS = 300
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
# What `inform-rm export` prints for a family that vLLM does not load by itself.
OVERRIDES = {"gemma3_text": {"architectures": ["Gemma3ForCausalLM"]}}


def offline(folder, cases):
    """Way -> rewards, the offset added."""
    from vllm import LLM

    overrides = OVERRIDES.get(folder.parent.name)
    other = {"convert": "classify", "hf_overrides": overrides} if overrides else {}
    engine = LLM(str(folder), runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256, **other)
    as_they_are = {"add_special_tokens": False}
    ids = [{"prompt_token_ids": row} for row in cases["ids"]]
    quiet = {"use_tqdm": False}
    asked = {
        "LLM.classify, text": engine.classify(cases["texts"], tokenization_kwargs=as_they_are, **quiet),
        "LLM.classify, ids": engine.classify(ids, **quiet),
    }
    found = {way: [row.outputs.probs[0] for row in rows] for way, rows in asked.items()}
    rows = engine.encode(ids, pooling_task="classify", **quiet)
    found["LLM.encode, ids"] = [float(row.outputs.data.reshape(-1)[0]) for row in rows]
    return {way: [reward + cases["offset"] for reward in rewards] for way, rewards in found.items()}


def over_http(folder, cases):
    """Way -> rewards as the server gives them, which adds the offset."""
    from transformers import AutoTokenizer

    bos = AutoTokenizer.from_pretrained(folder).bos_token or ""
    texts, ids, messages = cases["texts"], cases["ids"], cases["messages"]
    with served(folder, cases["offset"]) as url:

        def classify(**request):
            answer = post(f"{url}/classify", use_activation=False, **request)
            rows = sorted(answer["data"], key=lambda row: row["index"])
            return [row["probs"][0] for row in rows]

        def pooling(**request):
            answer = post(f"{url}/pooling", task="classify", use_activation=False, **request)
            return [row["data"][0] for row in sorted(answer["data"], key=lambda row: row["index"])]

        found = {
            "POST /classify, text": classify(input=texts, add_special_tokens=False),
            "POST /classify, ids": classify(input=ids),
            "POST /classify, messages": [classify(messages=turns)[0] for turns in messages],
            "POST /classify, activation unsaid": [
                post(f"{url}/classify", input=row)["data"][0]["probs"][0] for row in ids
            ],
            "POST /pooling, ids": pooling(input=ids),
            "POST /pooling, messages": [pooling(messages=turns)[0] for turns in messages],
            # verl 0.9.1: the text without a BOS token in front, and nothing said of special tokens.
            "POST /classify as verl does": [classify(input=text.removeprefix(bos))[0] for text in texts],
        }
        joined = post(f"{url}/score", text_1=cases["prompts"], text_2=cases["responses"], use_activation=False)
    return found, [row["score"] for row in joined["data"]]


@contextmanager
def served(folder, offset):
    """A server process that ends with the block; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--runner", "pooling",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port),
        "--pooler-config", json.dumps({"logit_mean": -offset}),
    ]  # fmt: skip
    if overrides := OVERRIDES.get(folder.parent.name):
        command += ["--convert", "classify", "--hf-overrides", json.dumps(overrides)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT})
        try:
            for _ in range(START_SECONDS):
                if server.poll() is not None:
                    break
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            else:
                server.kill()
            if server.poll() is not None:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read().decode(errors='replace')[-4000:]}")
            yield url
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def post(url, **body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"POST {url}: {error.code} {error.read().decode(errors='replace')[:1000]}") from error


def largest(rewards, expected):
    """Largest difference; not-a-number counts as infinite."""
    differences = [abs(one - other) for one, other in zip(rewards, expected, strict=True)]
    return max(difference if difference == difference else float("inf") for difference in differences)


def check(folder):
    """Print a line for each way into one model; return what is wrong."""
    cases = json.loads((folder / "cases.json").read_text())
    expected = cases["rewards"]
    spread = max(expected) - min(expected)
    wrong = [] if spread > 100 * TOLERANCE else [f"its rewards lie within {spread:.2g}, which shows nothing"]
    found = offline(folder / "folded", cases)
    served_rewards, joined = over_http(folder / "folded", cases)
    for way, rewards in {**found, **served_rewards}.items():
        difference = largest(rewards, expected)
        print(f"| {folder.name} | {way} | {difference:.1e} |", flush=True)
        if not difference <= TOLERANCE:
            wrong.append(f"{way} differs by {difference:.3g}")
    difference = largest(joined, expected)
    print(f"| {folder.name} | POST /score (not a reward) | {difference:.1e} |", flush=True)
    if difference <= TOLERANCE:
        wrong.append("POST /score gives the reward: docs/how-to/engines.md says that it does not")
    return [f"{folder.name}: {fault}" for fault in wrong]


def main():
    os.environ.update(ENVIRONMENT)
    try:
        import vllm
    except ImportError:
        print("skipped: vLLM is not installed here; `make test-engines` installs it", file=sys.stderr)
        return 0
    folder, *families = sys.argv[1:]
    folders = [Path(folder, family) for family in families] or sorted(
        path.parent for path in Path(folder).glob("*/cases.json")
    )
    print(f"vLLM {vllm.__version__}; largest difference from RewardScorer over 20 conversations, float32\n")
    print("| family | way | largest difference |\n|---|---|---|")
    wrong = []
    for each in folders:
        try:
            wrong += check(each)
        except Exception as error:  # the other families are still of interest
            wrong.append(f"{each.name}: {type(error).__name__}: {str(error)[-3000:]}")
    if not folders:
        wrong.append(f"{folder}: no cases.json there; run folded_models.py first")
    print("\n" + ("\n".join(wrong) or f"all within {TOLERANCE:g}"))
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    print(f"\npip check, of vLLM's environment:\n{checked.stdout.strip()}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
