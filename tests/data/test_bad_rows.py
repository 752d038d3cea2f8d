"""Rows that show themselves as bad only when they are encoded, of every kind, in every command: named, or left out."""

import copy
import json

import pytest
import torch

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.data.encoding import encode_pairs
from inform_rm.data.preferences import load_preferences
from inform_rm.decomposition.gap_grid import distinct_prompts, gap_grid
from inform_rm.errors import InputError
from inform_rm.eval.decompose import decompose
from inform_rm.eval.detection.detect import detect
from inform_rm.eval.evaluate import evaluate
from inform_rm.eval.suites.evaluate_suite import evaluate_suite
from inform_rm.scoring.score_files import score_file
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train

BAD = 4  # place of the bad row, from 0
LENGTH = 60
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LONG = "xq" * LENGTH
SYSTEM = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Say sun."}]
# Fields of the bad row, the policy for over-long rows, and what must be said of it.
KINDS = {
    "template refuses": ({"prompt": SYSTEM}, "error", "no system role"),
    "same tokens": ({"chosen": "<think>a</think>Yes", "rejected": "<think>b</think>Yes"}, "error", "the same tokens"),
    "response does not fit": ({"chosen": LONG}, "truncate_prompt", f"alone takes .* of max_length {LENGTH} tokens"),
    "over-long": ({"prompt": LONG}, "error", f"tokens, over max_length {LENGTH}|tokens; the limit is {LENGTH}"),
}


@pytest.fixture(scope="module")
def strict(tokenizer):
    """A tokenizer whose template refuses system messages and drops what was thought."""
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = TEMPLATE
    return strict


@pytest.fixture(scope="module")
def scorer(strict, backbone_configs):
    torch.manual_seed(1)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=4))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return RewardScorer(model.eval(), strict, max_length=LENGTH)


@pytest.fixture(scope="module")
def backbone(strict, causal_lm_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict")
    for path in causal_lm_dir("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    strict.save_pretrained(folder)
    return folder


class Forwards:
    """Counts forward passes."""

    def __init__(self, model):
        self.number = 0
        self._handle = model.register_forward_pre_hook(self._see)

    def _see(self, *_):
        self.number += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_with(changes):
    rows = [{"prompt": f"Say sun {n}.", "chosen": f"sun {n}", "rejected": "no"} for n in range(9)]
    rows[BAD] |= changes
    return rows


def run_train(scorer, backbone, path, overlong, on_bad_row, output, **more):
    config = RewardTrainingArguments(
        model=str(backbone), data=(str(path),),
        output_dir=str(output), latent_dim=4, max_length=LENGTH, overlong=overlong,
        on_bad_row=on_bad_row, per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=1, use_cpu=True,
        **more,
    )  # fmt: skip
    counts = train(config)["train_pairs"]
    return counts["bad_rows"]


def run_stream(*arguments):
    return run_train(*arguments, streaming=True)


def run_evaluate(scorer, backbone, path, overlong, on_bad_row, output):
    result = evaluate(scorer, path, output, overlong=overlong, on_bad_row=on_bad_row, progress=False)
    assert result.num_pairs == result.data[0]["evaluated"] == 8 and result.data[0]["bad_rows"] == 1
    return result.data[0]["bad_row_reasons"]


def run_decompose(scorer, backbone, path, overlong, on_bad_row, output):
    options = {"overlong": overlong, "on_bad_row": on_bad_row, "num_prompts": 3, "progress": False}
    result = decompose(scorer, path, output, **options)
    assert result.num_pairs == 8 and result.distinct_prompts == 8 and not any(
        result.left_out[name] for name in ("overlong", "no_other_prompt", "nonfinite_rewards")
    )  # fmt: skip
    return result.data[0]["bad_row_reasons"]


PAIRS = {"train": run_train, "stream": run_stream, "evaluate": run_evaluate, "decompose": run_decompose}
# Each command once: which rows are bad is decided in one place, what follows in each command.
BAD_PAIRS = [
    ("template refuses", "evaluate"),
    *(("response does not fit", command) for command in PAIRS),
]


@pytest.mark.parametrize(("kind", "command"), BAD_PAIRS)
def test_a_bad_pair_is_named_or_left_out_and_listed(kind, command, scorer, backbone, tmp_path):
    changes, overlong, message = KINDS[kind]
    path = write(tmp_path / "pairs.jsonl", pairs_with(changes))
    arguments = scorer, backbone, path, overlong
    with Forwards(scorer.model) as forwards:
        with pytest.raises(InputError, match=rf"pairs\.jsonl, row {BAD + 1}: .*({message}).*on_bad_row='skip'"):
            PAIRS[command](*arguments, "error", tmp_path / "stopped")
        assert forwards.number == 0
    assert not list((tmp_path / "stopped").rglob("checkpoint-*"))
    reasons = PAIRS[command](*arguments, "skip", tmp_path / "skipped")
    assert len(reasons) == 1 and f"row {BAD + 1}" in reasons[0]


def test_a_bad_item_leaves_a_suite_without_a_score(scorer, tmp_path):
    changes, overlong, message = KINDS["response does not fit"]
    rows = [{**row, "subset": "hep-go", "id": number} for number, row in enumerate(pairs_with(changes))]
    for name, part in (("one.jsonl", rows[:3]), ("two.jsonl", rows[3:])):
        write(tmp_path / name, part)
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]

    def run(on_bad_row):
        options = {"overlong": overlong, "on_bad_row": on_bad_row, "progress": False}
        return evaluate_suite(scorer, "rewardbench", files, tmp_path / "out", **options)

    with (
        Forwards(scorer.model) as forwards,
        pytest.raises(InputError, match=rf"two\.jsonl, row {BAD - 2}: .*({message}).*on_bad_row='skip'"),
    ):
        run("error")
    assert forwards.number == 0
    result = run("skip")
    assert result.score is None and not result.complete and result.counts["evaluated"] == 8
    assert [part["bad_rows"] for part in result.data] == [0, 1] and [part["items"] for part in result.data] == [
        3,
        6,
    ]
    assert f"two.jsonl, row {BAD - 2}" in result.data[1]["bad_row_reasons"][0]
    assert result.subsets["hep-go"]["num_dropped"] == 1


def test_a_bad_response_is_named_or_left_out_by_score_and_detect(scorer, tmp_path):
    changes, _, message = KINDS["over-long"]
    message = f"({message})"
    rows = [{"prompt": f"Say sun {n % 5}.", "response": f"sun {n}" + " so" * (n % 7)} for n in range(40)]
    fine = write(tmp_path / "fine.jsonl", rows)
    bad = dict(rows[BAD])
    bad |= {{"chosen": "response"}.get(name, name): value for name, value in changes.items() if name != "rejected"}
    faulty = write(tmp_path / "faulty.jsonl", [*rows[:BAD], bad, *rows[BAD:]])
    quick = {"num_splits": 5, "num_resamples": 5, "alpha": 0.1, "progress": False}
    with Forwards(scorer.model) as forwards:
        for reference, candidate in ((fine, faulty), (faulty, fine)):
            with pytest.raises(InputError, match=rf"faulty\.jsonl, row {BAD + 1}.*{message}.*on_bad_row='skip'"):
                detect(scorer, reference, candidate, **quick)
        with pytest.raises(
            InputError, match=rf"1 of 41 rows.*faulty\.jsonl, row {BAD + 1}.*{message}.*on_bad_row='skip'"
        ):
            score_file(scorer, faulty, tmp_path / "out.jsonl", progress=False)
        assert forwards.number == 0
    found = detect(scorer, faulty, faulty, tmp_path / "detect", on_bad_row="skip", **quick)
    for part in (found.reference, found.candidates[0]):
        assert part["num_responses"] == 40 and part["bad_rows"] == 1
        assert f"faulty.jsonl, row {BAD + 1}" in part["bad_row_reasons"][0]
    assert found.candidates[0]["csi"] == detect(scorer, fine, fine, **quick).candidates[0]["csi"]
    assert "Bad rows left out: 1 of reference" in (tmp_path / "detect" / "result.html").read_text()
    assert score_file(scorer, faulty, tmp_path / "out.jsonl", progress=False, on_bad_row="skip")["bad_rows"] == 1
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [item["reward"] is None for item in written] == [number == BAD for number in range(41)]


def test_data_of_bad_rows_alone_are_refused_with_the_first_reasons(scorer, backbone, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [pairs_with({"prompt": SYSTEM})[BAD]] * 5)
    for name in ("evaluate", "stream"):  # the others encode like evaluate
        with pytest.raises(InputError, match=r"none of .* can be used.*row \d: .*no system role.*row \d"):
            PAIRS[name](scorer, backbone, path, "error", "skip", tmp_path / name)


def test_bad_rows_are_left_out_by_kind_and_the_others_encoded_as_alone(strict, tmp_path):
    rows = [row for changes, _, _ in KINDS.values() for row in pairs_with(changes)] * 10
    path = write(tmp_path / "pairs.jsonl", rows)
    good = write(tmp_path / "good.jsonl", [row for number, row in enumerate(rows) if number % 9 != BAD])
    found = encode_pairs(load_preferences(path).dataset, strict, max_length=LENGTH, on_bad_row="skip")
    assert [bad.row for bad in found.bad_rows] == [n + 1 for n in range(len(rows)) if n % 9 == BAD]
    assert [bad.kind for bad in found.bad_rows[:4]] == [
        "not encodable", "identical tokens", "overlong", "overlong"
    ]  # fmt: skip
    counts = {"pairs": len(rows), "overlong": 20, "dropped": 0, "truncated": 0}
    assert found.counts == {**counts, "not_as_written": {"n": 0, "examples": []}}
    expected = encode_pairs(load_preferences(good).dataset, strict, max_length=LENGTH).dataset
    names = ["chosen_input_ids", "rejected_input_ids", "prompt_length", "length", "chosen_characters"]
    assert found.dataset.select_columns(names).to_list() == expected.select_columns(names).to_list()


def test_a_clean_batch_is_rendered_once_and_a_faulty_one_row_by_row(strict, monkeypatch, tmp_path):
    sizes = []
    render = type(strict).apply_chat_template

    def counted(self, conversations, **options):
        sizes.append(len(conversations))
        return render(self, conversations, **options)

    monkeypatch.setattr(type(strict), "apply_chat_template", counted)
    clean = load_preferences(write(tmp_path / "clean.jsonl", pairs_with({}))).dataset
    for policy in ("error", "skip"):
        sizes.clear()
        encode_pairs(clean, strict, max_length=None, on_bad_row=policy)
        assert sizes == [9, 18]  # the prompts, and both conversations of each


def test_under_another_prompt_a_cell_that_cannot_be_rendered_is_not_used(scorer, tmp_path):
    rows = pairs_with({"prompt": SYSTEM})
    pairs = load_preferences(write(tmp_path / "pairs.jsonl", rows)).dataset
    prompt_rows, own = distinct_prompts(pairs)
    choice = torch.stack([own, torch.full_like(own, BAD)], dim=1)
    with pytest.raises(InputError, match=rf"row {BAD + 1}: .*no system role"):
        gap_grid(scorer, pairs, choice, prompt_rows)
    grid = gap_grid(scorer, pairs, choice, prompt_rows, on_bad_row="skip")
    assert grid.used[:, 0].tolist() == [row != BAD for row in range(9)] and not grid.used[:, 1].any()
    fine = torch.tensor([row for row in range(9) if row != BAD])
    alone = gap_grid(scorer, pairs, choice[fine], prompt_rows, rows=fine)
    assert alone.used[:, 0].all() and not alone.used[:, 1].any()
    torch.testing.assert_close(alone.rewards[:, 0], grid.rewards[fine, 0], atol=1e-5, rtol=0)
