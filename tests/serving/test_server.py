"""The command itself: a process, a socket, real clients, and an end by signal that loses nothing."""

import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from datasets import Dataset

import inform_rm
from inform_rm.cli import main
from inform_rm.errors import InputError
from inform_rm.serving.server import read_token, serve

WORDS = ["red", "apples", "seven", "the", "sea", "blue"]


def pairs_of(seed, count):
    generator = random.Random(seed)
    return [
        (f"How many {generator.choice(WORDS)}?", " ".join(generator.choices(WORDS, k=generator.randint(1, 12))))
        for _ in range(count)
    ]


def rows_of(pairs):
    return {"rows": [{"prompt": prompt, "response": response} for prompt, response in pairs]}


def tell_to_end(process):
    """SIGTERM, once: a second one, after the server has let go of its handlers, would kill."""
    if not hasattr(process, "told"):
        process.told = True
        process.send_signal(signal.SIGTERM)


@contextmanager
def started(folder, *arguments, **environment):
    """A server process, its URL and, after the block, its end by SIGTERM: ``process.returncode``, ``process.log``."""
    command = [sys.executable, "-m", "inform_rm.cli", "serve", "--model", str(folder), "--port", "0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"^serving .* at (http://\S+)$", line):
                break
        else:
            raise AssertionError("".join(lines))
        reading = threading.Thread(target=lambda: lines.extend(process.stdout))
        reading.start()
        yield process, found[1]
        tell_to_end(process)
        process.wait(300)
        reading.join(60)
        process.log = "".join(lines)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def url(served_dir):
    with started(served_dir) as (process, address):
        yield address
    assert process.returncode == 0, process.log


@pytest.mark.slow
def test_64_clients_over_sockets_each_get_their_own_rewards(url, scorer):
    requests = [pairs_of(seed, 1 + seed % 5) for seed in range(64 * 4)]
    expected = [scorer.score(*map(list, zip(*pairs, strict=True))).tolist() for pairs in requests]

    def client(start):
        with httpx.Client(timeout=300) as connection:
            return [connection.post(f"{url}/score", json=rows_of(pairs)) for pairs in requests[start::64]]

    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(client, range(64)))
    for start in range(64):
        for answer, rewards in zip(answers[start], expected[start::64], strict=True):
            assert answer.json()["rewards"] == pytest.approx(rewards, abs=1e-5)


@pytest.mark.slow
def test_an_openrlhf_style_client(url, scorer, tokenizer):
    requests = pytest.importorskip("requests")
    pairs = pairs_of(1, 24)
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}] for prompt, response in pairs
    ]
    # As its trainer does: what the policy saw and wrote, decoded with special tokens; beside it prompts and labels.
    queries = tokenizer.batch_decode(tokenizer.apply_chat_template(turns, return_dict=False))
    answer = requests.post(
        url=f"{url}/get_reward",
        json={"query": queries, "prompts": [prompt for prompt, _ in pairs], "labels": [None] * len(pairs)},
        headers={"Content-Type": "application/json"},
        timeout=180,
    )
    answer.raise_for_status()
    expected = scorer.score(*map(list, zip(*pairs, strict=True))).tolist()
    assert answer.json()["rewards"] == answer.json()["scores"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_trl_run_is_rewarded_by_the_server(url, scorer, causal_lm_dir, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is an optional extra: pip install 'inform-rm[rl]'")
    seen = []

    def served_reward(prompts, completions, **_):
        answer = httpx.post(f"{url}/score", json=rows_of(zip(prompts, completions, strict=True)), timeout=300)
        answer.raise_for_status()
        seen.append((prompts, completions, answer.json()["rewards"]))
        return answer.json()["rewards"]

    arguments = trl.GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=3, logging_steps=1, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=6, report_to="none", disable_tqdm=True, seed=0,
        learning_rate=1e-3, save_strategy="no",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        str(causal_lm_dir("llama")), reward_funcs=served_reward, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"{number} red apples"} for number in range(12)]),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 3
    for prompts, texts, rewards in seen:
        assert rewards == pytest.approx(scorer.score(prompts, texts).tolist(), abs=1e-5)
    logged = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert logged == pytest.approx([sum(rewards) / len(rewards) for *_, rewards in seen], abs=1e-5)


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_ends_with_0(served_dir, scorer):
    requests = [pairs_of(seed, 100) for seed in range(8)]
    expected = [scorer.score(*map(list, zip(*pairs, strict=True))).tolist() for pairs in requests]
    with started(served_dir, "--tokens-per-batch", "64") as (process, url), ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(httpx.post, f"{url}/score", json=rows_of(pairs), timeout=300) for pairs in requests]
        deadline = time.monotonic() + 300
        while "inform_rm_queued_rows 800.0" not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline and not any(future.done() for future in waiting)
        tell_to_end(process)
        answers = [future.result() for future in waiting]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    assert process.returncode == 0, process.log
    for answer, rewards in zip(answers, expected, strict=True):
        assert answer.status_code == 200
        assert answer.json()["rewards"] == pytest.approx(rewards, abs=1e-5)


@pytest.mark.slow
def test_the_token_comes_from_the_environment_and_is_nowhere_to_be_read(served_dir):
    token = "t0ken-of-the-test"
    with started(served_dir, "--max-body-bytes", "100000", INFORM_RM_TOKEN=token) as (process, url):
        body = rows_of([("an apple", "a")])
        for content in (b"{}", b" " * 3_000_000):
            assert httpx.post(f"{url}/score", content=content, timeout=300).status_code == 401
        wrong = {"Authorization": "Bearer t0ken-of-the-tesT"}
        assert httpx.post(f"{url}/score", json=body, headers=wrong).status_code == 401
        right = {"Authorization": f"Bearer {token}"}
        assert httpx.post(f"{url}/score", json=body, headers=right).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        # The refusal arrives though the client sends more than it takes: no reset connection.
        for content in (b" " * 3_000_000, iter([b" " * 100_000] * 30)):
            assert httpx.post(f"{url}/score", content=content, headers=right, timeout=300).status_code == 413
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            assert token.encode() not in file.read()
    assert process.returncode == 0
    assert token not in process.log and "apple" not in process.log


def test_token_files(tmp_path, monkeypatch):
    monkeypatch.delenv("INFORM_RM_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("INFORM_RM_TOKEN", "from-environment")
    assert read_token(None) == "from-environment"
    path = tmp_path / "token"
    path.write_text("from-file\nanything\n")
    assert read_token(path) == "from-file"
    for content in ("", "\n", "  \n"):
        path.write_text(content)
        with pytest.raises(InputError, match="is empty; expected the token"):
            read_token(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_a_taken_or_impossible_address_is_said_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "no/such/model", "--port", str(port)]) == 2
        assert f"cannot listen at 127.0.0.1:{port} (Address already in use)" in capsys.readouterr().err
    with pytest.raises(InputError, match="port: 70000"):
        serve("no/such/model", port=70000)
    with pytest.raises(InputError, match="cannot listen at not-an-address"):
        serve("no/such/model", host="not-an-address")


def test_without_the_extra_the_message_says_what_to_install(monkeypatch, capsys):
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert main(["serve", "--model", "no/such/model"]) == 2
        assert f"{package} is not installed. pip install 'inform-rm[serve]'" in capsys.readouterr().err


def test_serve_from_python_ends_when_told_and_leaves_no_thread(scorer, monkeypatch):
    """In a thread, where no signal arrives: the server object is told directly."""
    assert inform_rm.serve is serve
    import uvicorn

    servers = []
    monkeypatch.setattr(
        uvicorn.Server, "__init__",
        lambda self, config, real=uvicorn.Server.__init__: (real(self, config), servers.append(self))[0],
    )  # fmt: skip
    # Not read with capsys while the other thread prints: what it prints between a read and a truncation is lost.
    printed: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("inform_rm.serving.server.print", lambda text, **_: printed.put(text), raising=False)
    before = set(threading.enumerate())
    serving = threading.Thread(target=lambda: serve(scorer, port=0, max_rows=2))
    serving.start()
    url = printed.get(timeout=300).split()[-1]
    assert url.startswith("http://127.0.0.1:")
    assert httpx.post(f"{url}/score", json=rows_of(pairs_of(0, 2))).status_code == 200
    assert httpx.post(f"{url}/score", json=rows_of(pairs_of(0, 3))).status_code == 422
    servers[0].should_exit = True
    serving.join(300)
    assert not serving.is_alive() and set(threading.enumerate()) <= before


def test_listening_beyond_this_machine_without_a_token_is_warned_of(scorer, monkeypatch, caplog):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    for keywords, warns in (({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "token": "t"}, False), ({}, False)):
        caplog.clear()
        serve(scorer, port=0, **keywords)
        assert ("no token is set" in caplog.text) == warns
