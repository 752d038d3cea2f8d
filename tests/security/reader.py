"""Reads hostile inputs, each in a fork of this process with little memory and time, and tells how."""

import json
import os
import resource
import signal
import traceback
from pathlib import Path

import torch

from inform_rm.data.encoding import encode_pairs
from inform_rm.data.preferences import load_preferences
from inform_rm.data.response_rows import RowFault, score_rows_or_faults
from inform_rm.data.sources import source_digest
from inform_rm.data.tokenizer import load_tokenizer, render
from inform_rm.decomposition.likelihoods import load_likelihood
from inform_rm.errors import InputError
from inform_rm.hub.averaging import average_weights
from inform_rm.hub.export import export_model
from inform_rm.scoring.reward_models import load_reward_model
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.reward_arguments import read_arguments
from inform_rm.training.run import train
from inform_rm.util.journal import RewardJournal

MEMORY = 3 << 30  # bytes of address space beyond what the imports took
SECONDS = 30  # of processor time
WAITING_SECONDS = 300  # a read that never returns takes no processor time

torch.set_num_threads(1)


def scorer_of(folder):
    return RewardScorer(folder, device="cpu").score(["Say sun."], ["sun"])


def train_with(folder, data, output, **settings):
    overrides = {"model": folder, "data": [data], "output": output, "use_cpu": True, "max_steps": 4, "save_steps": 2,
                 "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, **settings}  # fmt: skip
    train(read_arguments(None, overrides))


def conversation(folder, messages, template=None):
    return render(load_tokenizer(folder, chat_template=template), [messages], tokenize=False)


def encoded_pairs(folder, data):
    return encode_pairs(load_preferences(data).dataset, load_tokenizer(folder), max_length=None).counts


def rows_to_score(path):
    for row in score_rows_or_faults(path):
        if isinstance(row, RowFault):
            raise InputError(row.reason)


OPERATIONS = {
    "reward model": lambda folder: load_reward_model(folder, device="cpu"),
    "trusted reward model": lambda folder: load_reward_model(folder, device="cpu", trust_remote_code=True),
    "scorer": scorer_of,
    "likelihood": lambda folder: load_likelihood(folder, device="cpu"),
    "tokenizer": lambda folder: load_tokenizer(folder),
    "trusted tokenizer": lambda folder: load_tokenizer(folder, trust_remote_code=True),
    "template": conversation,
    "average": lambda folder, output: average_weights([folder, folder], output, progress=False),
    "export": export_model,
    "pairs": lambda path: load_preferences(path).bad_rows,
    "pairs but bad ones": lambda path: load_preferences(path, on_bad_row="skip").bad_rows,
    "rows to score": rows_to_score,
    "digest": source_digest,
    "settings": lambda path: read_arguments(path, {}),
    "journal": lambda path: list(RewardJournal(path, {"model": "a"}).finished()),
    "encoded pairs": encoded_pairs,
    "train": train_with,
}


def run_forked(operation, arguments):
    """``{"outcome", "message", "mebibytes", "seconds"}``: "read", or the name of an exception type or of a signal."""
    report_read, report_write = os.pipe()
    base = resident_bytes()
    child = os.fork()
    if not child:
        os.close(report_read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        allowed = address_space_bytes() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (spent, spent))
        signal.alarm(WAITING_SECONDS)
        try:
            OPERATIONS[operation](*arguments)
            report = {"outcome": "read", "message": ""}
        except BaseException as error:
            if os.environ.get("SHOW_TRACEBACKS"):
                traceback.print_exc()
            report = {"outcome": type(error).__name__, "message": str(error)[:5000]}
        os.write(report_write, json.dumps(report).encode())
        os._exit(0)
    os.close(report_write)
    with os.fdopen(report_read) as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        report = {"outcome": signal.Signals(os.WTERMSIG(status)).name, "message": ""}
    else:
        report = json.loads(answer)
    grown = max(0, usage.ru_maxrss * 1024 - base)
    return {**report, "mebibytes": grown >> 20, "seconds": round(usage.ru_utime + usage.ru_stime, 2)}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def address_space_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
