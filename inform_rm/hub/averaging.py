"""The weights of several reward models averaged into one model (WARM)."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.errors import InputError
from inform_rm.hub.cards import average_card
from inform_rm.hub.export import add_remote_code, check_new_folder
from inform_rm.safety.checkpoints import check_checkpoint, weight_files
from inform_rm.scoring.reward_models import fingerprint_tokenizer, load_reward_model
from inform_rm.util.files import atomic_directory, atomic_write_text, file_digest, versions, write_json
from inform_rm.util.result_folders import naming_damage

RESULT_FILE = "average_result.json"
# Measured on ten pairs of trained models: backbones of one start 0.84 (1800 steps at 1e-3 from random weights) to
# 0.9998 (fine-tuned), of two starts at most 0.002; InfoRM heads of one start 0.88 to 0.999, of two at most 0.17.
_LEAST_COSINE = 0.5
_NUMBERS_AT_ONCE = 1 << 22  # of each member, in float64: 32 MiB
_Weights = dict[str, tuple[str, Any]]  # tensor name -> (file name, open file)
_INDEX_FILE = "model.safetensors.index.json"
# Settings of a config that do not change a reward. Dropout is another: see `_deciding_settings`.
_FREE_SETTINGS = {
    "_name_or_path", "architectures", "auto_map", "beta", "dtype", "kl_reduction_version", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


def average_weights(
    members: Sequence[str | Path], output: str | Path, *, same_start: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Average the weights of reward models that were trained from one start, and save the mean as an ordinary model.

    WARM (Rame et al. 2024, arXiv:2401.12187): ``theta = 1/M * sum_m theta_m``, in float64. The mean of unrelated
    weights is no model; refused are members

    - whose ``train_result.json`` names different starting models (without that file the weights alone are judged);
    - with a cosine below 0.5 between the backbone matrices of any two, or between their reward heads of several
      layers (InfoRM). `train` draws a fresh head from its seed: save
      ``InfoRMForSequenceClassification.from_backbone(backbone)`` and its tokenizer once, in one folder, and let every
      run start from that (``model=folder``).

    Memory holds the first member while it is checked, then one weight file. The config is the first member's.

    Args:
        members: at least two folders of reward models; one that stands there twice counts twice.
        output: folder to write; it appears whole or not at all: weights in the members' dtype, config, tokenizer,
            code, model card and ``average_result.json``.
        same_start: the caller knows that the members may be averaged: leave out the three checks above.
        progress: show a progress bar.

    Returns:
        The content of ``average_result.json``: ``members`` with the SHA-256 of their weight files, ``backbone_cosine``
        and ``head_cosine`` (the least between any two members' matrices; ``None`` for one linear head),
        ``same_start`` as it was given, ``versions``.

    Raises:
        InputError: fewer than two members, a folder that is no reward model, members of different kind (model type,
            settings, tensors, dtype, tokenizer) or start, weights that are NaN or infinite, or an output that exists.
    """
    if isinstance(members, str | Path) or len(members) < 2:
        raise InputError(f"members: {members!r}; an average needs a list of at least two folders.")
    target = check_new_folder(output)
    folders = [Path(member) for member in members]
    # Whole and a reward model; the others have the same tensors, or are refused.
    first = load_reward_model(folders[0], dtype="auto", device="cpu")
    config, prefix = first.config, f"{first.base_model_prefix}."
    del first
    _check_configs(folders)
    for member in folders[1:]:
        try:
            check_checkpoint(member)
        except InputError as error:
            raise InputError(f"members: cannot read the weights of {member} ({error})") from error
    tokenizer = _common_tokenizer(folders)
    if not same_start:
        _check_recorded_starts(folders)
    with contextlib.ExitStack() as stack, atomic_directory(target) as folder:
        cosines = _write_average(folders, [_open_weights(each, stack) for each in folders], folder, prefix, progress)
        if not same_start:
            _check_cosines(folders, cosines)
        shutil.copyfile(folders[0] / "config.json", folder / "config.json")
        tokenizer.save_pretrained(folder)
        is_inform = config.model_type == "inform"
        if is_inform:
            add_remote_code(folder)
        found = {f"{part}_cosine": cosine for part, cosine in cosines.items()}
        result = {"members": _named(folders), **found, "same_start": same_start, "versions": versions()}
        atomic_write_text(folder / "README.md", average_card(config if is_inform else None, len(folders), RESULT_FILE))
        write_json(folder / RESULT_FILE, result)
    return result


def _named(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The members and their weight files, without what leads to a folder, which may name a user."""
    return [
        {"folder": "/".join(each.resolve().parts[-2:]), "files": {x: file_digest(each / x) for x in _files(each)}}
        for each in folders
    ]


def _check_configs(folders: Sequence[Path]) -> None:
    """`InputError` for a member that would give other rewards from the same weights than the first."""
    settings: list[dict[str, Any]] = []
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise InputError(f"members: {folder} has no config.json. Pass the folder of a complete reward model.")
        try:
            config = AutoConfig.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"members: cannot read the config of {folder}: {str(error).splitlines()[0]}") from error
        settings.append(dict(_deciding_settings(config.to_dict())))
        if changed := _changed(settings[0], settings[-1]):
            changed.sort(key=lambda key: key != "model_type")
            wanted, found = settings[0], settings[-1]
            listed = "; ".join(f"{key} is {found.get(key)!r}, not {wanted.get(key)!r}" for key in changed[:5])
            raise InputError(f"members: {folder} is of another kind than {folders[0]}: {listed}. Leave it out.")


def _changed(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))


def _deciding_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _deciding_settings(value, f"{prefix}{name}.")
        elif name not in _FREE_SETTINGS and "drop" not in str(name):
            yield f"{prefix}{name}", value


def _common_tokenizer(folders: Sequence[Path]) -> Any:
    first, *others = [load_tokenizer(folder) for folder in folders]
    for folder, tokenizer in zip(folders[1:], others, strict=True):
        if fingerprint_tokenizer(tokenizer) != fingerprint_tokenizer(first):
            raise InputError(
                f"members: {folder} has another tokenizer or chat template than {folders[0]}. Their weights answer to "
                "different token ids: leave it out."
            )
    return first


def _check_recorded_starts(folders: Sequence[Path]) -> None:
    starts = {folder: start for folder in folders if (start := _recorded_start(folder)) is not None}
    if len(set(starts.values())) > 1:
        listed = "; ".join(f"{folder} from {start}" for folder, start in starts.items())
        raise InputError(
            f"members: they were trained from different models: {listed}. Only weights that share a start can be "
            "averaged. If these names mean the same weights, pass same_start=True."
        )


def _recorded_start(folder: Path) -> str | None:
    """Starting model and revision that `train` wrote down; ``None`` where there is no such record."""
    path = folder / "train_result.json"
    if not path.is_file():
        return None
    with naming_damage("members", path):
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        model, revision = settings["model"], settings.get("revision")
    name = str(Path(model).resolve()) if Path(model).exists() else model
    return name if revision is None else f"{name} at {revision}"


def _files(folder: Path) -> list[str]:
    """Names of a model's weight files, which lie in the folder itself."""
    return sorted(path.name for path in weight_files(folder)) or ["model.safetensors"]


def _open_weights(folder: Path, stack: contextlib.ExitStack) -> _Weights:
    found: _Weights = {}
    for name in _files(folder):
        file: Any = stack.enter_context(safe_open(folder / name, framework="pt"))
        found |= {key: (name, file) for key in file.keys()}
    return found


def _check_tensors(folders: Sequence[Path], weights: Sequence[_Weights]) -> None:
    """Refuse members whose tensors differ in name, shape or dtype."""
    layouts = []
    for member in weights:
        slices = {key: file.get_slice(key) for key, (_, file) in member.items()}
        layouts.append({key: f"{part.get_dtype()} {part.get_shape()}" for key, part in slices.items()})
    for folder, found in zip(folders, layouts, strict=True):
        if changed := _changed(layouts[0], found):
            there, here = (layout.get(changed[0], "absent") for layout in (found, layouts[0]))
            raise InputError(
                f"members: {len(changed)} tensors of {folder} differ from those of {folders[0]}; {changed[0]} is "
                f"{there}, not {here}. Only equal shapes and types can be averaged."
            )


def _write_average(
    folders: Sequence[Path], weights: Sequence[_Weights], output: Path, prefix: str, progress: bool
) -> dict[str, float | None]:
    """Write the mean of all tensors into files like the first member's; the members' least cosines by part."""
    _check_tensors(folders, weights)
    # Norms' scales are near 1 in any model, and say nothing of its start.
    matrices = {key for key, (_, file) in weights[0].items() if len(file.get_slice(key).get_shape()) > 1}
    parts = {"backbone": {key for key in matrices if key.startswith(prefix)}}
    parts["head"] = matrices - parts["backbone"]
    if len(parts["head"]) == 1:
        parts["head"] = set()  # one linear map can be averaged whatever it started from
    products = {part: torch.zeros(len(weights), len(weights), dtype=torch.float64) for part in parts}
    with tqdm(total=len(weights[0]), unit="tensor", desc="average", disable=not progress) as bar:
        for name in sorted({file for file, _ in weights[0].values()}):
            means = {}
            for key in (key for key, (file, _) in weights[0].items() if file == name):
                means[key], product = _mean([member[key][1].get_tensor(key) for member in weights], key, folders)
                for part, keys in parts.items():
                    if key in keys:
                        products[part] += product
                bar.update()
            save_file(means, output / name, metadata={"format": "pt"})
    if (folders[0] / _INDEX_FILE).is_file() and _files(folders[0]) != ["model.safetensors"]:
        shutil.copyfile(folders[0] / _INDEX_FILE, output / _INDEX_FILE)
    cosines: dict[str, float | None] = {}
    for part, product in products.items():
        norms = product.diagonal().sqrt()
        cosines[part] = float((product / norms.outer(norms)).min()) if (norms > 0).all() else None
    return cosines


def _mean(tensors: Sequence[Tensor], key: str, folders: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Mean of M tensors, in their dtype, and their ``(M, M)`` inner products in float64."""
    products = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    if not tensors[0].is_floating_point():
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise InputError(f"members: {key} is {tensors[0].dtype} and differs; whole numbers have no average.")
        return tensors[0], products
    flat = [tensor.reshape(-1) for tensor in tensors]
    mean = torch.empty_like(flat[0])
    for start in range(0, len(mean), _NUMBERS_AT_ONCE):
        part = torch.stack([tensor[start : start + _NUMBERS_AT_ONCE].double() for tensor in flat])
        finite = part.isfinite().all(dim=1)
        if not finite.all():
            raise InputError(f"members: {key} of {folders[int(finite.int().argmin())]} holds NaN or infinity.")
        mean[start : start + _NUMBERS_AT_ONCE] = part.mean(dim=0)
        products += part @ part.T
    return mean.view(tensors[0].shape), products


def _check_cosines(folders: Sequence[Path], cosines: dict[str, float | None]) -> None:
    for part, cosine in cosines.items():
        if cosine is not None and cosine < _LEAST_COSINE:
            raise InputError(
                f"members: the {part}s of {', '.join(map(str, folders))} do not share a start: the least cosine "
                f"between two of them is {cosine:.2f}, below {_LEAST_COSINE}. Train all from one backbone and, if the "
                "head has several layers, from one saved head, too (see average_weights). If you know better, pass "
                "same_start=True."
            )
