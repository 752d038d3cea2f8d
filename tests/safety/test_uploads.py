"""What may leave with a model: the scan of exported folders, and the upload."""

import getpass
import json
import logging
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification, export_model
from inform_rm.errors import InputError
from inform_rm.hub.export import add_remote_code, push_folder
from inform_rm.safety.checkpoints import warn_unpinned
from inform_rm.safety.uploads import scan_folder
from inform_rm.scoring.reward_models import load_causal_lm

# Put together here, so that no scanner takes this file for a leak.
HF_TOKEN = "hf_" + "aBcD" * 9
AWS_KEY = "AKIA" + "ABCDEFGH12345678"


@pytest.fixture(scope="module")
def trained(causal_lm_dir, tokenizer, tmp_path_factory):
    """A saved model whose backbone came from a folder of this machine."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    model = InfoRMForSequenceClassification.from_backbone(str(causal_lm_dir("llama")), latent_dim=8, decoder="linear")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["plain", "folded"])
def exported(request, trained, tmp_path):
    export_model(str(trained), str(tmp_path / "exported"), folded=request.param)
    return tmp_path / "exported"


class RecordedHub:
    """Stands in for `HfApi`: notes the calls in order; what the repository holds is set by the test."""

    calls: ClassVar[list] = []
    holds: ClassVar[list | None] = None  # files of an existing repository
    is_private: ClassVar[bool] = True
    failure: ClassVar[Exception | None] = None

    def __init__(self, token=None):
        pass

    def repo_exists(self, repository):
        self.calls.append(("repo_exists", repository))
        return self.holds is not None

    def model_info(self, repository):
        return SimpleNamespace(private=self.is_private)

    def list_repo_files(self, repository):
        return self.holds

    def create_repo(self, repository, **options):
        self.calls.append(("create_repo", repository, options))

    def create_commit(self, repository, operations, **options):
        if self.failure is not None:
            raise self.failure
        operations = {operation.path_in_repo: str(operation.path_or_fileobj) for operation in operations}
        self.calls.append(("create_commit", repository, operations))

    def __getattr__(self, name):
        raise AssertionError(f"{name} is not for this")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", RecordedHub)
    for name, value in {"calls": [], "holds": None, "is_private": True, "failure": None}.items():
        monkeypatch.setattr(RecordedHub, name, value)
    return RecordedHub


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_exported_folder_holds_nothing_of_this_machine(exported, trained):
    assert scan_folder(exported) == []
    # Said once more without the scan: bytes of this machine's folders and of pickles are in no file.
    for path in exported.iterdir():
        content = path.read_bytes()
        for word in (str(trained), str(Path.home()), str(Path.cwd()), "/tmp/"):
            assert word.encode() not in content, (path.name, word)
        assert not content.startswith((b"\x80", b"PK")) and not re.search(rb"hf_[A-Za-z0-9]{30}", content)


def test_where_the_backbone_lay_is_told_before_and_not_after_export(trained, tmp_path):
    config = InfoRMConfig(latent_dim=4).to_dict()
    config["text_config"]["_name_or_path"] = str(trained)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (finding,) = scan_folder(tmp_path)
    assert re.fullmatch(rf"config.json, line \d+: an absolute path: {trained}", finding)
    add_remote_code(tmp_path)
    assert scan_folder(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "finding"),
    [
        ("README.md", "one\ntrained from /home/ada/models/x\n", "line 2: an absolute path: /home/ada/models/x"),
        ("README.md", "in C:\\Users\\ada\\x", r"line 1: an absolute path: C:\\Users\\ada\\x"),
        ("README.md", f"login with {HF_TOKEN}", r"line 1: a Hugging Face token: hf_a\.\.\.$"),
        ("README.md", "https://ada:letmein@example.org/x", "a password in an address"),
        ("README.md", "api_key = abcdefgh12", "a password or key: api_"),
        ("README.md", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("modeling_inform.py", f"key = '{AWS_KEY}'", r"line 1: an AWS access key: AKIA\.\.\."),
        ("config.json", '{"a": {"b": ["/cluster/ada/x"]}}', "config.json, line 1: an absolute path: /cluster/ada/x"),
        ("config.json", '{"a": "file:///x/y"}', "config.json, line 1: an absolute path: file:///x/y"),
        ("config.json", f'{{"{HF_TOKEN}": 1}}', "a Hugging Face token"),
        ("tokenizer_config.json", '{"name_or_path": "~/models/x"}', "line 1: an absolute path: ~/models/x"),
        ("tokenizer.json", f'{{\n"{HF_TOKEN}": 3}}', "tokenizer.json, line 2: a Hugging Face token"),
        ("chat_template.jinja", "{# /scratch/ada/template #}", "line 1: an absolute path: /scratch/ada/template"),
        ("README.md", b"\xff\xfe", "README.md: not UTF-8"),
        ("README.md", pickle.dumps({"a": 1}), "README.md: a pickle"),
        ("model.safetensors", pickle.dumps([1]), "model.safetensors: a pickle"),
        ("model.safetensors", b"12345678", "model.safetensors: no sound safetensors"),
        ("tokenizer.model", b"PK\x03\x04zip", "tokenizer.model: a pickle or an archive"),
        ("optimizer.pt", b"x", "optimizer.pt: not a file of a model folder"),
        ("training_args.bin", b"x", "training_args.bin: not a file"),
        ("pytorch_model.bin", b"x", "pytorch_model.bin: not a file"),
        ("rewards.partial", b"x", "rewards.partial: not a file"),
        ("pairs.jsonl", b"{}", "pairs.jsonl: not a file"),
        ("checkpoints/checkpoint-3/optimizer.pt", b"x", "checkpoints/checkpoint-3/optimizer.pt: not a file"),
        ("checkpoints/model.safetensors", b"x", "checkpoints/model.safetensors: not a file"),
        (".env", b"x", r"\.env: not a file"),
    ],
)  # fmt: skip
def test_every_kind_of_leak_is_found_with_its_place(tmp_path, name, content, finding):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (found,) = scan_folder(tmp_path)
    with pytest.raises(AssertionError, match=finding):
        raise AssertionError(found)
    assert HF_TOKEN not in found and AWS_KEY not in found  # a report is read by many


def test_the_header_of_a_weight_file_is_read(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"made": "/home/ada/x"})
    assert scan_folder(tmp_path) == ["model.safetensors, line 2: an absolute path: /home/ada/x"]


def test_links_are_found(tmp_path):
    (tmp_path / "README.md").symlink_to("/etc/hostname")
    assert scan_folder(tmp_path) == ["README.md: a link; only files are uploaded"]


def test_this_accounts_name_is_found_but_not_in_hub_ids_and_vocabularies(tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "lovelace")
    (tmp_path / "tokenizer.json").write_text('{"lovelace": 3}')
    (tmp_path / "README.md").write_text("base: lovelace/engine, lovelaces\nby lovelace.\n")
    assert scan_folder(tmp_path) == ["README.md, line 2: the name of this account: lovelace"]
    monkeypatch.setattr(getpass, "getuser", lambda: "user")  # a role in every chat template
    assert scan_folder(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "see https://example.org/home/page and and/or/data, </s> </think>", "run POST /v1/classify or /pooling",
        "eos_token: <|im_end|>", "1/2/2024", "f(x)/data/y", "./data/x.jsonl and data/home/x",
    ],
)  # fmt: skip
def test_ordinary_text_is_no_finding(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "chat_template.jinja").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"text": text}))
    assert scan_folder(tmp_path) == []


@pytest.mark.parametrize("folded", [False, True])
def test_push_makes_a_private_repository_and_one_commit_of_exactly_the_folder(hub, trained, tmp_path, folded):
    output = tmp_path / "exported"
    sizes = export_model(str(trained), str(output), folded=folded, push_to="someone/model")
    exists, created, committed = hub.calls
    assert exists == ("repo_exists", "someone/model")
    assert created == ("create_repo", "someone/model", {"private": True})
    assert committed == ("create_commit", "someone/model", {name: str(output / name) for name in names(output)})
    assert sizes == {name: (output / name).stat().st_size for name in names(output)}


def test_nothing_is_uploaded_where_the_scan_finds_something(hub, trained, tmp_path, caplog):
    source = tmp_path / "model"
    source.mkdir()
    for path in trained.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "README.md").write_text("# Model\n\ntrained on /home/ada/data.jsonl\n")
    message = "nothing was uploaded, because of README.md, line 3: an absolute path: /home/ada/data.jsonl"
    with pytest.raises(InputError, match=message):
        export_model(str(source), str(tmp_path / "exported"), push_to="someone/model")
    assert hub.calls == [] and not (tmp_path / "exported").exists()
    with caplog.at_level(logging.WARNING, "inform_rm"):  # for this machine the folder is written
        export_model(str(source), str(tmp_path / "exported"))
    assert "README.md, line 3" in caplog.text and (tmp_path / "exported" / "model.safetensors").exists()
    # What was added to the folder later is looked at, too.
    (tmp_path / "exported" / "README.md").write_text("# Model\n")
    (tmp_path / "exported" / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"optimizer\.pt: not a file of a model folder"):
        push_folder(tmp_path / "exported", "someone/model")
    assert hub.calls == []


def test_an_existing_public_repository_stays_so_and_is_told(hub, exported, monkeypatch, caplog):
    monkeypatch.setattr(hub, "holds", [".gitattributes", "README.md", "model.safetensors"])
    with caplog.at_level(logging.WARNING, "inform_rm"):
        push_folder(exported, "someone/model")
        assert not caplog.records
        monkeypatch.setattr(hub, "is_private", False)
        push_folder(exported, "someone/model")
    assert "someone/model exists and is public; it stays so" in caplog.text
    assert [call[0] for call in hub.calls] == ["repo_exists", "create_commit"] * 2


def test_weights_that_would_lie_beside_the_new_ones_are_refused(hub, exported, monkeypatch):
    monkeypatch.setattr(hub, "holds", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
    with pytest.raises(InputError, match=r"holds other weights \(model-00001-of-00002"):
        push_folder(exported, "someone/model")
    assert [call[0] for call in hub.calls] == ["repo_exists"]


def test_a_failed_upload_says_what_is_there(hub, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "failure", OSError("413 too large"))
    with pytest.raises(ConnectionError, match="private repository someone/model was created and is empty: 413 too la"):
        export_model(str(trained), str(tmp_path / "exported"), push_to="someone/model")
    assert (tmp_path / "exported" / "model.safetensors").exists()
    monkeypatch.setattr(hub, "holds", [])
    with pytest.raises(ConnectionError, match=r"push_to: nothing was uploaded: 413.*hf upload someone/model"):
        push_folder(tmp_path / "exported", "someone/model")


def test_a_wrong_repository_id_is_refused_before_any_work(hub, tmp_path):
    with pytest.raises(InputError, match="push_to: 'a/b/c' is no Hub repository"):
        export_model(str(tmp_path / "not-there"), str(tmp_path / "exported"), push_to="a/b/c")
    assert hub.calls == []


def test_a_causal_lm_whose_code_can_change_is_warned_of_before_it_is_run(caplog):
    with caplog.at_level(logging.WARNING, "inform_rm"), pytest.raises(InputError, match="cannot load someone/model"):
        load_causal_lm("someone/model", trust_remote_code=True)
    assert "runs whatever code someone/model holds today. Pass revision=<commit>" in caplog.text


@pytest.mark.parametrize(
    ("name", "revision", "is_warned"),
    [
        ("someone/model", None, True), ("someone/model", "main", True), ("someone/model", "v1.0", True),
        ("someone/model", "0123456789abcdef" * 2 + "01234567", False), (".", None, False),
    ],
)  # fmt: skip
def test_only_a_commit_is_pinned(name, revision, is_warned, caplog):
    with caplog.at_level(logging.WARNING, "inform_rm"):
        warn_unpinned(name, revision)
    assert bool(caplog.records) == is_warned
    assert ("'main', which can move" in caplog.text) == (revision == "main")
