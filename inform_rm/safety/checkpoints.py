"""What a model folder or Hub repository claims, checked before anything of that size is made or any code is run."""

import contextlib
import json
import logging
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.hub import cached_file

from inform_rm.errors import InputError, shown

logger = logging.getLogger(__name__)

ADAPTER_REFUSAL = (
    "model: {} holds a PEFT adapter, not a whole model{}. Merge it into its base model first: load base and adapter "
    "with peft, then merge_and_unload() and save_pretrained(folder)."
)

# Parsed JSON takes up to 24 times its bytes. A config holds some KiB, the index of a thousand billion weights 10 MiB.
_MOST_CONFIG_BYTES = 16 << 20
# The largest tokenizer.json of a published model (262,144 tokens) has 33 MB.
_MOST_JSON_BYTES = 128 << 20
# Each layer and expert is an object, made before any weight is read. The deepest published models have 126 layers and
# 512 experts.
_MOST_PARTS = 1000
# transformers makes a dictionary entry for each.
_MOST_LABELS = 100_000
# No size, token id or position is larger; what has "length" in its name may say "without limit" (10**30).
_MOST_OF_ANYTHING = 2**31 - 1
# A model may have more numbers than its file: a fresh head, tied matrices that are counted twice. Twice as many and 64
# million (256 MiB) more are made and then refused by name, because weights are missing.
_SPARE_FACTOR, _SPARE_NUMBERS = 2, 1 << 26

_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_OWN_CODE = re.compile(r"[\w-]+(/[\w-]+)*\.\w+")
_PARTS = re.compile(r"(layers?|blocks?|depths?|experts)$")


def warn_unpinned(name: str, revision: str | None) -> None:
    """Warn before code of a Hub repository is run that can change: at no revision, or at a branch or tag."""
    if re.fullmatch("[0-9a-f]{40}", revision or "") or not name.strip() or Path(name).exists():
        return
    at = "" if revision is None else f" at {revision!r}, which can move"
    logger.warning(
        "trust_remote_code runs whatever code %s holds today%s. Pass revision=<commit> to pin what you have read.",
        name,
        at,
    )


def check_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    auto_class: Any = AutoModel,
) -> None:
    """Refuse a checkpoint that is not what it claims to be, at the cost of reading its JSON and weight headers.

    - ``config.json`` is a JSON object of at most 16 MiB, nothing in it is above 2**31 - 1 (but lengths), with at most
      1000 layers or experts and 100,000 labels.
    - Weight files are named by ``model.safetensors`` or an index whose names are plain (no folders), and each has a
      sound safetensors header.
    - The model that the config describes has at most twice the numbers that these headers hold, and 64 million.
      Not compared for a model with remote code, which must be trusted anyway.
    - Its weights are quantized in no way, or in one that transformers knows.
    - It is no PEFT adapter: transformers would load the base model that the adapter names.
    - With `trust_remote_code`, its code lies in the repository itself: what was trusted, and pinned by `revision`, is
      this one and no other.

    What does not exist is not complained of: whoever needs it does. ``auto_class`` is the class of transformers that
    will load it.

    Raises:
        InputError: naming the file, what is wrong, and the way out.
        OSError: the Hub cannot be reached.
    """
    name = str(model)
    check_files(model)
    if trust_remote_code:
        check_code_is_own(model, revision=revision)
    config = read_object(model, "config.json", revision)
    if find_file(model, "adapter_config.json", revision) is not None:
        raise InputError(ADAPTER_REFUSAL.format(name, ""))
    if config is None:
        return
    _check_numbers(config, f"{name}/config.json")
    named = config.get("transformers_weights")
    if named is not None and not (_is_plain_name(named) and named.endswith(".safetensors")):
        raise InputError(
            f"model: {name}/config.json takes its weights from {shown(named)}; only safetensors in the folder itself "
            "are read. Remove the entry, or convert the weights."
        )
    _check_quantization(config, f"{name}/config.json")
    paths = weight_files(model, revision=revision) if named is None else [find_file(model, named, revision)]
    held = sum(_numbers_held(path, f"{name}/{path.name}") for path in paths if path is not None)
    if held:
        _check_size(model, revision, trust_remote_code, auto_class, held)


def check_files(model: str | Path) -> None:
    """Raise `InputError` for a local folder with a pipe or device in it, or a JSON file or template over 128 MiB."""
    folder = Path(model)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        try:
            found = path.stat()
        except OSError:
            continue  # a link to nothing: whoever needs the file says that it is missing
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise InputError(f"model: {path} is a pipe or a device, not a file. Remove it.")
        limit = _MOST_CONFIG_BYTES if path.name in ("config.json", _INDEX_FILE) else _MOST_JSON_BYTES
        if path.suffix in (".json", ".jinja") and found.st_size > limit:
            raise InputError(f"model: {path} has {found.st_size} bytes; the limit is {limit}. It is no such file.")


def check_code_is_own(model: str | Path, *, revision: str | None = None) -> None:
    """Raise `InputError` if the config of a model or tokenizer takes its code from another repository or folder."""
    for name in ("config.json", "tokenizer_config.json"):
        settings = read_object(model, name, revision) or {}
        found = settings.get("auto_map")
        # A class, a list of several, or (old tokenizers) such a list without their kinds.
        references = list(found.values()) if isinstance(found, dict) else [found]
        parts = [part for item in references for part in (item if isinstance(item, list) else [item])]
        for part in (part for part in parts if isinstance(part, str)):
            if "--" in part:
                raise InputError(
                    f"model: {model}/{name} takes its code from another place, {part.partition('--')[0]}; "
                    f"trust_remote_code (and a pinned revision) are about {model} alone. Read that code, put it into "
                    "a folder with the model, and name it in auto_map without the part before '--'."
                )
            if not _OWN_CODE.fullmatch(part):
                raise InputError(
                    f"model: {model}/{name} takes its code from {shown(part)}; expected file.Class, the file in the "
                    "folder itself."
                )


def weight_files(model: str | Path, *, revision: str | None = None) -> list[Path]:
    """The safetensors files that transformers reads: ``model.safetensors``, else those that the index names.

    Raises:
        InputError: an index that is broken, or names what is not a safetensors file of the folder itself.
    """
    single = find_file(model, _SINGLE_FILE, revision)
    if single is not None:
        return [single]
    index = read_object(model, _INDEX_FILE, revision)
    if index is None:
        return []
    where = f"{model}/{_INDEX_FILE}"
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(index.get("metadata", {}), dict):
        raise InputError(f"model: {where} is no index: it has no map of weights to files. Copy it again.")
    files = []
    for name in dict.fromkeys(name if isinstance(name, str) else shown(name) for name in places.values()):
        if not _is_plain_name(name) or not name.endswith(".safetensors"):
            raise InputError(
                f"model: {where} names {shown(name)}; expected the plain name of a .safetensors file beside it. "
                "Do not use this checkpoint unless you know why."
            )
        path = find_file(model, name, revision)
        if path is None:
            raise InputError(
                f"model: cannot load {where}: {name}, which it names, is not there. Copy or download it again."
            )
        files.append(path)
    return files


def check_own_file(path: Path) -> Path:
    """The path; `InputError` if it links out of its folder (in the Hub's cache: repository): it would be copied on."""
    folder, target = path.parent.resolve(), path.resolve()
    homes = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(home) for home in homes):
        raise InputError(f"model: {path} links to a file outside its folder, which would be copied. Remove the link.")
    return path


def find_file(model: str | Path, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder or, fetched where needed, of a Hub repository; None if there is none.

    Raises:
        OSError: the Hub cannot be reached, or has no such repository.
    """
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    found = cached_file(str(model), name, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def read_object(model: str | Path, name: str, revision: str | None) -> dict[str, Any] | None:
    """The JSON object in a file of a checkpoint, of at most 16 MiB; None if there is no such file."""
    path = find_file(model, name, revision)
    if path is None:
        return None
    size = path.stat().st_size
    if size > _MOST_CONFIG_BYTES:
        raise InputError(f"model: {model}/{name} has {size} bytes; the limit is {_MOST_CONFIG_BYTES}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError(f"model: {model}/{name} is nested too deeply. It is no such file.") from None
    except ValueError as error:
        raise InputError(
            f"model: cannot load {model}/{name}: it is not JSON ({str(error)[:200]}). Copy it again."
        ) from None
    if not isinstance(found, dict):
        raise InputError(f"model: {model}/{name} holds a {type(found).__name__}; expected a JSON object.")
    return found


def _check_quantization(config: dict[str, Any], where: str) -> None:
    """Refuse a kind of quantization that transformers does not know: it would take the packed numbers as they are."""
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if isinstance(settings, dict) and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return  # bitsandbytes of old, without a name
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise InputError(
            f"model: {where} has weights quantized by {shown(method)}, which transformers does not know and would "
            "read as if they were not quantized. Use the model before its quantization."
        )


def _check_numbers(config: dict[str, Any], where: str) -> None:
    for key, value in _numbers(config):
        limit = _MOST_PARTS if _PARTS.search(key) else _MOST_LABELS if key == "num_labels" else _MOST_OF_ANYTHING
        if abs(value) > limit and not (limit == _MOST_OF_ANYTHING and "length" in key):
            raise InputError(f"model: {where} has {key} = {shown(value)}; the limit is {limit}. It is no real model.")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Whole numbers with their key; those of a list have its key. The JSON reader bounded the depth."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, "" if _PARTS.search(key) else key)  # mlp_only_layers holds numbers of layers
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def _numbers_held(path: Path, where: str) -> int:
    """How many numbers a weight file can hold, by its header; whole numbers may be packed, down to one a bit."""
    held = 0
    with reading_weights(where), safe_open(path, framework="pt") as file:
        for key in file.keys():
            part = file.get_slice(key)
            dtype = str(part.get_dtype())
            held += math.prod(part.get_shape()) * (int(dtype[1:]) if re.fullmatch(r"[IU]\d+", dtype) else 1)
    return held


@contextlib.contextmanager
def reading_weights(where: str | Path) -> Iterator[None]:
    """Raise `InputError` for a safetensors file that cannot be read in the ``with`` block."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"model: cannot load {where}: the safetensors file is incomplete or broken ({str(error)[:200]}). Copy "
            "or download it again; a pickled model is refused."
        ) from None


def _check_size(model: str | Path, revision: str | None, trust_remote_code: bool, auto_class: Any, held: int) -> None:
    try:
        config = AutoConfig.from_pretrained(
            str(model), trust_remote_code=trust_remote_code, **({} if revision is None else {"revision": revision})
        )
        if trust_remote_code and getattr(config, "auto_map", None) and config.model_type != "inform":
            return
        with torch.device("meta"), no_init_weights():
            built = auto_class.from_config(config)
        claimed = sum(tensor.numel() for tensor in [*built.parameters(), *built.buffers()])
    except Exception:
        return  # the loader makes the same model, without memory at first, and will say in its words what is wrong
    if claimed > _SPARE_FACTOR * held + _SPARE_NUMBERS:
        raise InputError(
            f"model: {model}/config.json describes a model of {claimed:.4g} numbers, but its weights hold "
            f"{held:.4g}. One of the two is not what was saved: copy or download both again."
        )


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in (".", "..") and re.fullmatch(r"[^/\\:\0]+", name) is not None
