"""`generate`: each row is drawn by its own seed, a continued run gives what an uninterrupted one gives."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from inform_rm import generate
from inform_rm.cli import main
from inform_rm.data.messages import to_messages
from inform_rm.data.prompt_rows import read_prompts, written_prompt
from inform_rm.data.response_rows import score_rows_or_faults
from inform_rm.errors import InputError
from inform_rm.eval.best_of_n.policies import CausalLMPolicy
from inform_rm.eval.generation.local_model import SeededSampler, Task, write_locally
from inform_rm.eval.generation.settings import GenerationSettings
from inform_rm.util.endpoint import EndpointError
from inform_rm.util.journal import RecordJournal

SHORT = {"max_new_tokens": 6, "progress": False}
QUESTIONS = ["Name a colour.", "Name a fruit, please.", "How many apples are in the basket?", "Write about the sea."]


@pytest.fixture(scope="module")
def causal_lm(causal_lm_dir):
    return AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama")).eval()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "chosen": "a", "rejected": "b", "id": f"q{n}"} for n, text in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1] | {"id": "again"}]))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tokens_are_drawn_from_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 0.0, -1.0, -torch.inf, 1.0])
    expected = torch.softmax(logits.double() / 0.7, dim=0).numpy()
    sampler = SeededSampler(range(5_000), 1, temperature=0.7)
    left = sampler(torch.zeros(5_000, 1), logits.expand(5_000, -1))
    assert (left.isfinite().sum(dim=1) == 1).all()
    counts = np.bincount(left.argmax(dim=1), minlength=5)
    assert counts[3] == 0
    assert chisquare(np.delete(counts, 3), np.delete(expected, 3) * 5_000).pvalue > 1e-3
    # The nucleus of 0.8: the likeliest token (0.70) and the next (0.17), in their old proportion.
    left = SeededSampler(range(5_000), 1, temperature=0.7, top_p=0.8)(torch.zeros(5_000, 1), logits.expand(5_000, -1))
    counts = np.bincount(left.argmax(dim=1), minlength=5)
    kept = expected[[0, 4]] / expected[[0, 4]].sum()
    assert counts[[1, 2, 3]].sum() == 0 and chisquare(counts[[0, 4]], kept * 5_000).pvalue > 1e-3


def test_a_row_is_the_same_alone_and_among_others_and_without_a_cache(causal_lm, tokenizer):
    settings = GenerationSettings(max_new_tokens=8, temperature=0.9)
    policy = CausalLMPolicy(causal_lm, tokenizer, max_new_tokens=8)
    tasks = [Task(str(n), policy.prompt_ids(to_messages(text)), n) for n, text in enumerate(QUESTIONS)]
    tasks.append(tasks[0]._replace(name="other seed", seed=99))
    together = {name: reply for batch in write_locally(policy, settings, tasks) for name, reply in batch.items()}
    alone = {task.name: next(write_locally(policy, settings, [task]))[task.name] for task in tasks}
    assert together == alone and len({reply.text for reply in alone.values()}) == len(alone)
    # By hand: the whole text through the model for each token, and inversion of the distribution function.
    for task in tasks:
        ids, uniforms = list(task.prompt_ids), np.random.default_rng(task.seed).random(8)
        for uniform in uniforms:
            with torch.no_grad():
                logits = causal_lm(torch.tensor([ids])).logits[0, -1].double() / 0.9
            ids.append(int((torch.softmax(logits, dim=0).cumsum(dim=0) <= uniform).sum()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        new = ids[len(task.prompt_ids) :]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == alone[task.name].text
        assert alone[task.name].completion_tokens == len(new)


def test_temperature_0_takes_the_likeliest_token_whatever_the_models_own_config_asks(causal_lm, tokenizer):
    settings = GenerationSettings(max_new_tokens=5, temperature=0)
    policy = CausalLMPolicy(causal_lm, tokenizer, max_new_tokens=5)
    ids = policy.prompt_ids(to_messages("Name a colour."))
    own = causal_lm.generation_config
    own.repetition_penalty = 50.0
    try:
        reply = next(write_locally(policy, settings, [Task("one", ids, 0)]))["one"]
    finally:
        own.repetition_penalty = None
    assert causal_lm.generation_config is own
    for _ in range(5):
        ids = [*ids, int(causal_lm(torch.tensor([ids])).logits[0, -1].argmax())]
    assert reply.text == tokenizer.decode(ids[-5:], skip_special_tokens=True).strip()


def test_rows_say_what_other_commands_need(causal_lm, tokenizer, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    result = generate(causal_lm, prompts, out, tokenizer=tokenizer, num_samples=2, **SHORT)
    rows = read(out)
    assert [(row["id"], row["prompt"], row["sample"]) for row in rows] == [
        (f"q{n}#{sample}", text, sample) for n, text in enumerate(QUESTIONS) for sample in range(2)
    ]
    assert len({row["seed"] for row in rows}) == 8 and all(row["tokens"] <= 6 for row in rows)
    assert Counter(row["finish_reason"] for row in rows) == result.finish_reasons
    assert {row["finish_reason"] for row in rows if row["tokens"] < 6} <= {"stop"}
    assert [row.response for row in score_rows_or_faults(out)] == [row["response"] for row in rows]
    about = json.loads((tmp_path / "out.jsonl.about").read_text())
    assert about == json.loads(json.dumps(result.to_dict()))
    assert about["prompts"] | {"reasons": 0} == {
        "rows": 5, "repeated": 1, "not_drawn": 0, "bad_rows": 0, "unanswered": 0, "reasons": 0
    }  # fmt: skip
    assert about["num_responses"] == 8 and about["num_prompts"] == 4 and about["settings"]["num_samples"] == 2
    assert about["completion_tokens"] == sum(row["tokens"] for row in rows) and about["versions"]["torch"]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_killed_run_goes_on_to_what_an_uninterrupted_one_gives(causal_lm, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("inform_rm.eval.generation.local_model.CPU_TOKENS_PER_BATCH", 60)  # two rows or three
    options = {"tokenizer": tokenizer, "num_samples": 3, **SHORT}
    whole = tmp_path / "whole.jsonl"
    generate(causal_lm, prompts, whole, **options)
    add, calls = RecordJournal.add, []

    def killed(self, records):
        add(self, records)
        calls.append(len(records))
        if len(calls) == 2:
            with self.path.open("a") as file:
                file.write('["torn')
            raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordJournal, "add", killed)
        generate(causal_lm, prompts, out, **options)
    assert not out.exists() and 1 < sum(calls) < 12
    with pytest.raises(InputError, match=r"temperature was 1\.0, is 0\.5"):
        generate(causal_lm, prompts, out, temperature=0.5, **options)
    result = generate(causal_lm, prompts, out, **options)
    assert result.reused == sum(calls) and out.read_bytes() == whole.read_bytes()


def test_prompts_and_samples_are_added_to_an_earlier_file(causal_lm, tokenizer, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    options = {"tokenizer": tokenizer, **SHORT}
    generate(causal_lm, prompts, out, num_prompts=2, **options)
    first = {(row["prompt"], row["sample"]): row["response"] for row in read(out)}
    assert generate(causal_lm, prompts, out, num_samples=2, **options).reused == 2
    both = {(row["prompt"], row["sample"]): row["response"] for row in read(out)}
    assert len(both) == 8 and both.items() >= first.items()
    # Another seed, or a file that somebody changed, is written anew.
    assert generate(causal_lm, prompts, out, num_samples=2, seed=1, **options).reused == 0
    assert {(row["prompt"], row["sample"]): row["response"] for row in read(out)} != both
    out.write_text(out.read_text().replace("Name a fruit", "Name a fig"))
    assert generate(causal_lm, prompts, out, num_samples=2, seed=1, **options).reused == 0


def test_a_damaged_record_of_finished_rows_is_refused_and_left(causal_lm, tokenizer, prompts, tmp_path, monkeypatch):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"

    def killed(self, records):
        raise KeyboardInterrupt

    identity = {}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecordJournal, "add", killed)
        patch.setattr(RecordJournal, "delete", lambda self: identity.setdefault("header", self.path.read_text()))
        generate(causal_lm, prompts, out, tokenizer=tokenizer, **SHORT)
    partial.write_text(identity["header"] + '["name"]\n')
    with pytest.raises(InputError, match="line 2 is damaged"):
        generate(causal_lm, prompts, out, tokenizer=tokenizer, **SHORT)
    assert partial.read_text().endswith('["name"]\n')


def test_a_prompt_that_does_not_fit_is_named_or_left_out(causal_lm, tokenizer, tmp_path):
    rows = [{"prompt": "Name a colour."}, {"prompt": "no " * 200}, {"prompt": ""}, {"prompt": "Name a fruit."}]
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"row 3.*empty"):
        generate(causal_lm, rows, out, tokenizer=tokenizer, **SHORT)
    with pytest.raises(InputError, match=r"1 cannot be answered. .*row 2: the prompt has \d+ tokens"):
        generate(causal_lm, rows[:2], out, tokenizer=tokenizer, **SHORT)
    assert not (tmp_path / "out.jsonl.partial").exists()  # known before anything was written
    result = generate(causal_lm, rows, out, tokenizer=tokenizer, on_bad_row="skip", **SHORT)
    assert [row["prompt"] for row in read(out)] == ["Name a colour.", "Name a fruit."]
    assert result.prompts["bad_rows"] == result.prompts["unanswered"] == 1 and len(result.prompts["reasons"]) == 2


def test_an_endpoint_writes_the_same_kind_of_rows(chat_server, prompts, tmp_path, monkeypatch):
    key = "sk-scripted-0123456789abcdef"
    monkeypatch.setenv("MY_KEY", key)

    def script(fields):
        if "sea" in fields["messages"][0]["content"]:
            return 200, server.completion(f"The sea, and my key {key}", "length"), {}
        return f"reply with seed {fields['seed']}"

    server = chat_server(script)
    out = tmp_path / "out.jsonl"
    options = {"endpoint": server.url, "api_key_env": "MY_KEY", "num_samples": 2, "temperature": 0.3, **SHORT}
    result = generate("small", prompts, out, **options)
    rows = read(out)
    assert result.finish_reasons == {"stop": 6, "length": 2} and len(server.requests) == 8
    assert {row["model"] for row in rows} == {"small"}
    assert all(row["response"] in (f"reply with seed {row['seed']}", "The sea, and my key ***") for row in rows)
    assert {each["seed"] for each in server.requests} == {row["seed"] for row in rows}
    assert all(each["max_tokens"] == 6 and each["temperature"] == 0.3 for each in server.requests)
    assert not any(key in path.read_text() for path in tmp_path.iterdir())
    assert generate("small", prompts, out, **options).reused == 8 and len(server.requests) == 8


def test_an_endpoint_that_fails_in_the_middle_loses_nothing(chat_server, prompts, tmp_path):
    server = chat_server(lambda fields: f"{fields['messages'][-1]['content']} {fields['seed']}")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = {"endpoint": server.url, "num_samples": 3, "tries": 1, **SHORT}
    generate("small", prompts, whole, **options)
    answer, asked = server.script, len(server.requests)
    server.script = lambda fields: answer(fields) if len(server.requests) < asked + 6 else (500, b"down", {})
    with pytest.raises(EndpointError, match="HTTP 500: down"):
        generate("small", prompts, out, **options, concurrency=1)
    server.script, before = answer, len(server.requests)
    result = generate("small", prompts, out, **options, concurrency=1)
    assert result.reused == 5 and len(server.requests) == before + 7 and out.read_bytes() == whole.read_bytes()


def test_prompts_come_in_every_layout_and_are_written_so_that_they_are_read_again(tmp_path):
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]
    rows = [
        {"prompt": "Human: Hi.\n\nAssistant: Hello!\n\nHuman: Who are you?\n\nAssistant:"},
        {"prompt": [*talk, {"role": "user", "content": "Who are you?"}], "response": "not wanted"},
        {"prompt": "Why?", "system": "Be short.", "chosen": "a", "rejected": "b"},
        {"question": "Why?"},
        {"prompt": [{"role": "user", "content": "User: is this a transcript?"}]},
    ]
    found = read_prompts(rows[:3])
    assert [row.where for row in found.rows] == ["list in memory, row 1", "list in memory, row 3"]
    assert found.repeated == 1 and found.rows[1].messages[0] == {"role": "system", "content": "Be short."}
    assert read_prompts(rows[3:4], {"prompt": "question"}).rows[0].messages[0]["content"] == "Why?"
    for row in [*found.rows, *read_prompts(rows[4:]).rows]:
        assert to_messages(written_prompt(row.messages)) == row.messages
    with pytest.raises(InputError, match="1 distinct ones in 1 rows; expected at least 2"):
        read_prompts(rows[:1], num_prompts=2)
    with pytest.raises(InputError, match=r"row 1.*no 'prompt'.*prompt=question"):
        read_prompts(rows[3:4])
    drawn = [read_prompts([{"prompt": str(n)} for n in range(9)], num_prompts=3, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0].not_drawn == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: -1"), ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": 0, "num_samples": 2}, "num_samples: 2 with temperature 0"), ({"top_p": 0}, "top_p: 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"), ({"num_prompts": 0}, "num_prompts: 0"),
        ({"on_bad_row": "drop"}, "on_bad_row: got 'drop'"),
        ({"api_key_env": "X"}, "api_key_env: no setting of this name"),
        ({"endpoint": "http://localhost", "device": "cpu"}, "device: no setting of this name"),
        ({"endpoint": "http://localhost", "concurrency": 0}, "concurrency: 0"),
        ({"endpoint": "http://localhost", "timeout": 0}, "timeout: 0"),
        ({"endpoint": "http://localhost", "tries": 0}, "tries: 0"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        generate("small", [{"prompt": "Why?"}], tmp_path / "out.jsonl", **options)
    with pytest.raises(InputError, match=r"expected the name of a .jsonl file"):
        generate("small", [{"prompt": "Why?"}], tmp_path / "out.json")


def test_command_line(causal_lm_dir, chat_server, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = ["generate", "--prompts", str(prompts), "--output", str(out), "--max-new-tokens", "4", "--model"]
    assert main([*command, str(causal_lm_dir("llama")), "--num-prompts", "3", "--device", "cpu"]) == 0
    assert "wrote 3 responses to 3 prompts, " in capsys.readouterr().out and len(read(out)) == 3
    server = chat_server(lambda fields: "Yes.")
    assert main([*command, "small", "--endpoint", server.url, "--concurrency", "2"]) == 0
    assert "wrote 4 responses to 4 prompts, 0 cut at 4 tokens, 0 empty, 0 left out" in capsys.readouterr().out
    server.script = lambda fields: (401, b"who are you", {})
    assert main([*command, "other", "--endpoint", server.url, "--tries", "1"]) == 2
    assert "refuses the key (HTTP 401: who are you)" in capsys.readouterr().err
    assert main([*command, "other", "--endpoint", "http://127.0.0.1:9/v1", "--tries", "1"]) == 1
