"""What must not leave the house with a model: pickles, paths and names of this machine, tokens, training state.

A model folder has the files of `HUB_FILES`; whatever else lies in it is a finding by its name. In those files
`scan_folder` looks for pickles, and in text and the headers of weight files for paths, tokens and the account's name.
"""

import fnmatch
import getpass
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

# What a model folder for the Hub holds. Training state, data and half-written files have other names.
HUB_FILES = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "configuration_inform.py", "modeling_inform.py", "README.md",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja", ".eval_results/*.yaml",
)  # fmt: skip
# Lists of word pieces: any word may stand there, also one that is somebody's name or looks like a path.
_VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "model.safetensors.index.json"
)  # fmt: skip
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
_PATH = rf"(?<![\w.:/~<>)\]-])/(?:{_ROOTS})/[\w.+-]+[\w.+/-]*|\b[A-Za-z]:\\+(?:Users|home|Documents and Settings)\\\S*"
# A whole text of a JSON file is a path at any root.
_QUOTED_PATH = r'(?<=")(?:(?:file:/|~)?/[^/\s"<>|]+/[^\s"<>|]*|(?:~/|file://|[A-Za-z]:[\\/])[^\s"]+)(?=")'
# Accounts that say nothing about anyone, and whose names are ordinary words of a config or a chat template.
_NOBODY = ("root", "user", "admin", "ubuntu", "debian", "runner", "nobody", "default", "jovyan", "docker", "model")


def scan_folder(folder: str | Path) -> list[str]:
    """Findings such as ``"README.md, line 3: an absolute path: /home/..."``, in the order of the files; empty is good.

    Found are: files that no model folder has (optimizer state, data, run records, pickles) and links; pickles under
    any name; weight files that are none; absolute paths; the name of this account and its home folder; tokens, keys
    and passwords by their form, shown by their first four characters only. Not found is what has no such form.
    """
    folder = Path(folder)
    findings = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            findings.append(f"{name}: a link; only files are uploaded")
        elif not path.is_dir():
            findings += [f"{name}{finding}" for finding in _scan_file(path, name)]
    return findings


def _scan_file(path: Path, name: str) -> list[str]:
    if not path.is_file() or not any(fnmatch.fnmatchcase(name, pattern) for pattern in HUB_FILES):
        return [": not a file of a model folder"]
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_PICKLE_STARTS):
        return [": a pickle or an archive, whatever its name says; reading it can run any code"]
    if path.suffix == ".model":
        return []
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                text = json.dumps(weights.metadata() or {}, indent=0)
        else:
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return [": not UTF-8 text"]
    except (SafetensorError, OSError) as error:
        return [f": no sound safetensors file ({error})"]
    if name in _VOCABULARIES:
        home, secrets = str(Path.home()), _SECRETS
        private = {"the home folder": re.escape(home)} if home.count("/") > 1 or "\\" in home else {}
    else:
        quoted = path.suffix in (".json", ".safetensors")
        secrets = _SECRETS | _SECRETS_IN_PROSE
        private = {"an absolute path": f"{_QUOTED_PATH}|{_PATH}" if quoted else _PATH} | _account()
    found = [
        (match.start(), f"{what}: {match[0][:4]}...") for what in secrets for match in re.finditer(secrets[what], text)
    ]
    found += [(match.start(), f"{what}: {match[0]}") for what in private for match in re.finditer(private[what], text)]
    return [f", line {text.count(chr(10), 0, at) + 1}: {finding}" for at, finding in sorted(found)]


def _account() -> dict[str, str]:
    """The form of this account's name, but for Hub ids (name/model): a repository's own address tells those."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for its user
        name = Path.home().name
    if len(name) < 3 or name.lower() in _NOBODY:
        return {}
    return {"the name of this account": rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])"}
