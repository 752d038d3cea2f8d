"""Folders for the Hub: the code that a saved model carries, and export."""

import fnmatch
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id

from inform_rm import configuration_inform, modeling_inform
from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.errors import InputError
from inform_rm.hub.cards import complete_card, model_card, whole_model_card
from inform_rm.hub.eval_results import ENTRIES_FOLDER, eval_entries, is_local, write_entries
from inform_rm.hub.folding import write_folded_model
from inform_rm.hub.result_folders import read_result_folder, refuse_other_models
from inform_rm.safety.checkpoints import check_own_file
from inform_rm.safety.uploads import scan_folder
from inform_rm.scoring.adapters import holds_adapters
from inform_rm.scoring.reward_models import load_reward_model
from inform_rm.util.files import atomic_directory, atomic_write_text, open_to_readers, write_json

logger = logging.getLogger(__name__)

_PAIR = (configuration_inform.__file__, modeling_inform.__file__)


def add_remote_code(folder: str | Path) -> None:
    """Make a saved folder loadable elsewhere: put the Hub pair in and name classes that readers know in its configs.

    ``save_pretrained`` does this for a plain model, but not for one whose class FSDP2 replaced.
    """
    folder = Path(folder)
    for source in _PAIR:
        shutil.copyfile(source, folder / Path(source).name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [modeling_inform.InfoRMForSequenceClassification.__name__]
    config["auto_map"] = configuration_inform.AUTO_MAP
    # Where the backbone came from: a folder of this machine is nobody's business.
    came_from = config.get("text_config", {}).get("_name_or_path")
    if came_from and is_local(came_from):
        del config["text_config"]["_name_or_path"]
    write_json(folder / "config.json", config)
    _name_tokenizer_class_of_transformers_4(folder / "tokenizer_config.json")


def _name_tokenizer_class_of_transformers_4(path: Path) -> None:
    """Undo the class name that transformers 5 gives a tokenizer: 4.57 refuses it, and 5 reads the old name as well."""
    if not path.exists():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # about the machine that loaded it
        settings.pop(name, None)
    write_json(path, settings)


def export_model(
    model: str,
    output: str,
    *,
    folded: bool = False,
    push_to: str | None = None,
    revision: str | None = None,
    results: Sequence[str | Path] = (),
    license: str | None = None,
) -> dict[str, int]:
    """Write a complete Hub folder of a trained InfoRM model: weights, tokenizer, card and, unless folded, code.

    Args:
        model: folder or Hub id of an InfoRM model, or a run folder's checkpoint.
        output: folder to write; it appears whole or not at all.
        folded: write the plain classifier of transformers that gives the same rewards but for a constant
            (`inform_rm.hub.folding`) and needs no remote code. Only where the reward is linear in the hidden state.
        push_to: also upload the folder as one commit to this Hub repository, created private if absent. What must not
            leave this machine (`inform_rm.safety.uploads`) stops the export before anything is uploaded; without
            `push_to` it is a warning.
        revision: revision of `model` on the Hub.
        results: folders of `evaluate` (with data or a suite) on this model, for the card and ``.eval_results``.
        license: the Hub's name of the model's licence, for the card; left as it is, or out, if not given.

    Returns:
        The files written, with their sizes in bytes.

    Raises:
        InputError: `model` is no InfoRM model or cannot be folded, `output` is not empty, results are about other
            weights, `push_to` is no repository id, or the folder holds what must not be uploaded.
        ConnectionError: if the upload fails; the message says what is there. The folder stays.
    """
    target = check_new_folder(output)
    if push_to is not None:
        _check_repository_id(push_to)
    folders = [read_result_folder(path, ("evaluate", "suite")) for path in results]
    refuse_other_models(folders, model, revision)
    loaded = load_reward_model(model, dtype="auto", device="cpu", revision=revision)
    if loaded.config.model_type != "inform":
        raise InputError(
            f"model: {model} is a {loaded.config.model_type} model; export writes InfoRM models only. A model of "
            "transformers itself needs no export: its own save_pretrained is complete."
        )
    tokenizer = load_tokenizer(model, revision=revision)
    with atomic_directory(target) as folder:
        if folded:
            write_folded_model(loaded, tokenizer, folder, source=None if Path(model).exists() else model)
            _name_tokenizer_class_of_transformers_4(folder / "tokenizer_config.json")
        else:
            loaded.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            add_remote_code(folder)
            _write_card(folder, model, loaded.config)
        open_to_readers(folder)
        if folders or license is not None:
            complete_card(folder / "README.md", target.resolve().name, folders, license)
        write_entries(folder, [entry for found in folders for entry in eval_entries(found)])
        _check_for_upload(folder, push_to)
    if push_to is not None:
        push_folder(target, push_to)
    return {path.relative_to(target).as_posix(): path.stat().st_size for path in _files(target)}


def check_new_folder(output: str | Path) -> Path:
    """Raise `InputError` unless nothing is there, or an empty folder."""
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"output: {output} exists and is not an empty folder. Name a new folder.")
    return target


def _write_card(folder: Path, model: str, config: Any) -> None:
    """The card and the ``.eval_results`` that the model has, or a new card."""
    card = Path(model) / "README.md"
    if not card.is_file():
        atomic_write_text(folder / "README.md", model_card(config, {}, None))
        return
    shutil.copyfile(check_own_file(card), folder / "README.md")
    if holds_adapters(model):
        whole_model_card(folder / "README.md")
    for entries in sorted((Path(model) / ENTRIES_FOLDER).glob("*.yaml")):
        (folder / ENTRIES_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(check_own_file(entries), folder / ENTRIES_FOLDER / entries.name)


def push_folder(
    folder: str | Path, repository: str, token: str | None = None, commit_message: str | None = None
) -> None:
    """Upload the files of a model folder in one commit; a new repository is private, an existing one stays as it is.

    Args:
        folder: what `export_model` wrote.
        repository: Hub id, ``name/model``.
        token: of the Hub; ``None``: the one that is logged in.
        commit_message: ``None``: "Upload reward model".

    Raises:
        InputError: before anything is uploaded: `repository` is no id, the folder holds what must not be uploaded, or
            the repository holds weight files that the upload would leave beside the new ones.
        ConnectionError: if the Hub refuses or cannot be reached; what is there then is what was there before.
    """
    folder = Path(folder)
    _check_repository_id(repository)
    _check_for_upload(folder, repository)
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    api, state = huggingface_hub.HfApi(token=token), "nothing was uploaded"
    try:
        if api.repo_exists(repository):
            _check_existing_repository(api, repository, set(files))
        else:
            api.create_repo(repository, private=True)
            state = f"the private repository {repository} was created and is empty"
        additions = [huggingface_hub.CommitOperationAdd(name, path) for name, path in files.items()]
        api.create_commit(repository, additions, commit_message=commit_message or "Upload reward model")
    except InputError:
        raise
    except Exception as error:  # HTTP errors of several libraries, and OSErrors
        raise ConnectionError(
            f"push_to: {state}: {' '.join(str(error).split())[:400] or type(error).__name__}. The folder is complete; "
            f"log in (hf auth login) or try again with: hf upload {repository} {folder}"
        ) from error


def _check_repository_id(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"push_to: {repository!r} is no Hub repository. Expected name/model. {error}") from error


def _check_for_upload(folder: Path, push_to: str | None) -> None:
    findings = scan_folder(folder)
    if not findings:
        return
    shown = "; ".join(findings[:5]) + (f"; and {len(findings) - 5} more" if len(findings) > 5 else "")
    if push_to is not None:
        raise InputError(
            f"push_to: nothing was uploaded, because of {shown}. Take it out of the model's files and export again; "
            "if it may be seen by everyone, export without --push-to and use: hf upload"
        )
    logger.warning("Before this folder is uploaded, look at: %s", shown)


def _check_existing_repository(api: Any, repository: str, files: set[str]) -> None:
    if not api.model_info(repository).private:
        logger.warning(
            "push_to: %s exists and is public; it stays so: everyone can read what is uploaded.", repository
        )
    kept = sorted(name for name in api.list_repo_files(repository) if name not in files)
    weights = [name for name in kept if fnmatch.fnmatchcase(name, "*.safetensors*") and "/" not in name]
    if weights:
        raise InputError(
            f"push_to: nothing was uploaded: {repository} holds other weights ({', '.join(weights[:3])}), which would "
            "lie beside the new ones and be loaded in their place. Delete them there, or name another repository."
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
