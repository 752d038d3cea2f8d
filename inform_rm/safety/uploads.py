"""What must not leave the house with a model: pickles, paths and names of this machine, tokens, training state.

`scan_folder` looks through a folder that is meant for the Hub. It reads every text file and the header of every weight
file, and knows which files such a folder has; whatever else lies there is a finding.
"""

import fnmatch
import getpass
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# What a model folder for the Hub holds. Training state, data and half-written files have other names.
HUB_FILES = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "configuration_inform.py", "modeling_inform.py", "README.md",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
# Lists of word pieces: any word may stand there, also one that is somebody's name or looks like a path.
_VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "model.safetensors.index.json"
)  # fmt: skip
_BINARY = (".safetensors", ".model")
# Every pickle of protocol 2 or later begins with 0x80 and its number; torch.save of today writes a ZIP archive.
_PICKLE_STARTS = (*(bytes((0x80, protocol)) for protocol in range(2, 6)), b"PK\x03\x04")

_SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key (sk-...)": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a signed web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# Forms that word pieces could have, too.
_SECRETS_IN_PROSE = {
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@",
    "a password or key": r"(?i)\b(?:passw(?:or)?d|secret|api_?key|access_token)[\"']?\s*[:=]\s*[\"']?[^\s\"'<>{}]{8,}",
}
_ROOTS = (
    "home|Users|root|tmp|var|mnt|media|data|srv|opt|scratch|work|workspace|content|private|gpfs|lustre|nfs|fsx|efs|"
    "Volumes|etc|usr|shared|storage|projects?|net|dev|run|kaggle|app|local"
)
# In running text a slash also parts words; a path is what begins at one of the usual roots.
_PATH = re.compile(
    rf"(?<![\w.:/~<>)\]-])/(?:{_ROOTS})/[\w.+-]+[\w.+/-]*|\b[A-Za-z]:\\+(?:Users|home|Documents and Settings)\\\S*"
)
_WHOLE_PATH = re.compile(r"/(?:[^/\s<>|]+/)+[^/\s<>|]*|[A-Za-z]:[\\/]\S+|~/\S+|file://\S+")
# Accounts that say nothing about anyone, and whose names are ordinary words of a config or a chat template.
_NOBODY = ("root", "user", "admin", "ubuntu", "debian", "runner", "nobody", "default", "jovyan", "docker", "model")


def scan_folder(folder: str | Path) -> list[str]:
    """Findings such as ``"README.md, line 3: an absolute path: /home/..."``, in the order of the files; empty is good.

    Found are: files that no model folder has (optimizer state, data, run records, pickles) and links; pickles under
    any name; weight files that are none; absolute paths; the name of this account and its home folder; tokens, keys
    and passwords by their form, shown by their first four characters only. Not found is what has no such form.

    Args:
        folder: the folder, with everything below it.
    """
    folder = Path(folder)
    findings = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            findings.append(f"{name}: a link; only files are uploaded")
        elif path.is_dir():
            continue
        elif not path.is_file():
            findings.append(f"{name}: no regular file")
        elif not any(fnmatch.fnmatchcase(name, pattern) for pattern in HUB_FILES):
            findings.append(f"{name}: not a file of a model folder")
        else:
            findings += [f"{name}{finding}" for finding in _scan_file(path, name)]
    return findings


def _scan_file(path: Path, name: str) -> list[str]:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_PICKLE_STARTS):
        return [": a pickle or an archive, whatever its name says; reading it can run any code"]
    if path.suffix == ".safetensors":
        return _scan_header(path)
    if path.suffix in _BINARY:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return [": not UTF-8 text"]
    if name in _VOCABULARIES:
        return [f", line {_line(text, at)}: {what}" for at, what in _secrets(text, _SECRETS) + _home(text)]
    if path.suffix == ".json":
        try:
            return [f", {place}: {what}" for place, key, value in _strings(json.loads(text)) for what in
                    _of_value(key, value)]  # fmt: skip
        except ValueError as error:
            return [f": not valid JSON ({error})"]
    return [f", line {_line(text, at)}: {what}" for at, what in _of_prose(text)]


def _scan_header(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        return [f": no sound safetensors file ({error})"]
    return [f", header, {key}: {what}" for key, value in metadata.items() for what in _of_value(key, value)]


def _of_value(key: str, value: str) -> list[str]:
    if _WHOLE_PATH.fullmatch(value):
        return [f"an absolute path: {value}"]
    return [what for _, what in _of_prose(f"{key}: {value}")]


def _of_prose(text: str) -> list[tuple[int, str]]:
    """What is found in text that people or programs wrote, each with its place."""
    found = _secrets(text, {**_SECRETS, **_SECRETS_IN_PROSE})
    found += [(match.start(), f"an absolute path: {match.group()}") for match in _PATH.finditer(text)]
    account = _account()
    if account:
        # A Hub id (name/model) tells what the repository's own address tells.
        form = rf"(?<![\w/.-]){re.escape(account)}(?![\w/-])"
        found += [(match.start(), f"the name of this account: {account}") for match in re.finditer(form, text)]
    return sorted(found)


def _secrets(text: str, forms: dict[str, str]) -> list[tuple[int, str]]:
    return [
        (match.start(), f"{what}: {match.group()[:4]}...")
        for what, form in forms.items()
        for match in re.finditer(form, text)
    ]


def _home(text: str) -> list[tuple[int, str]]:
    home = str(Path.home())
    at = text.find(home) if home.count("/") > 1 or "\\" in home else -1
    return [] if at < 0 else [(at, f"the home folder: {home}")]


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _strings(value: Any, place: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    """Each string of a JSON value, keys included: where it stands, the key next to it, the string."""
    if isinstance(value, dict):
        for name, inner in value.items():
            short = name if len(name) < 32 else f"{name[:4]}..."  # it may be the secret
            below = f"{place}.{short}" if place else short
            yield below, "", name
            yield from _strings(inner, below, name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{place}[{index}]", key)
    elif isinstance(value, str):
        yield place, key, value


def _account() -> str | None:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for its user
        name = Path.home().name
    return name if len(name) > 2 and name.lower() not in _NOBODY else None
