"""Fixtures that tests share: tiny models and tokenizers made here, and the real data folder where there is one.

torch and what else is slow to import is imported in the fixtures: the process that hands out tests needs none of it.
"""

import gc
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

# Nothing is asserted about time: on a busy machine any example can be slow. The same examples in every run, so that a
# change is not refused for what it did not do; `make fuzz` looks for new ones.
_UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
hypothesis_settings.register_profile("same", **_UNTIMED, derandomize=True)
hypothesis_settings.register_profile("search", **_UNTIMED, max_examples=2000, print_blob=True)
hypothesis_settings.load_profile("same")

_SENTENCES = [
    "Name a colour and a fruit, please. Human: Assistant:",
    "The sky is blue and the grass is green, but roses are red.",
    "How many apples are in the basket? There are seven apples.",
    "Write one short sentence about the sea. The sea is calm today.",
]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage while modules are imported: it took a third of the time, and they leave hardly any.

    Nor look at the modules again later: each Trainer asks for a whole collection, which took 0.4 seconds.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _libraries_as_tests_want_them(tmp_path_factory):
    """One thread, no progress bars, files not flushed to a disk whose power no test cuts.

    What test runs encode stays out of the user's cache, also in processes that tests start.
    """
    import datasets
    import torch
    from transformers.utils import logging

    import inform_rm  # noqa: F401  registers the Auto classes, before any test asks for them

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and models beside the project; tests that need it are skipped elsewhere."""
    path = Path(os.environ.get("INFORM_RM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no real data: {path} is not there (set INFORM_RM_SHARED)")
    return path


@pytest.fixture(scope="session")
def backbone_configs():
    """One tiny config per architecture: hidden size 32, 2 layers, vocabulary 320."""
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return {
        "llama": LlamaConfig(**sizes, num_key_value_heads=2),
        "llama_tied": LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True),
        "mistral": MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8),
        "qwen2": Qwen2Config(**sizes, num_key_value_heads=2),
        "gpt_neox": GPTNeoXConfig(**sizes),
        "gpt2": GPT2Config(
            vocab_size=320, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
        ),
    }


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer (320 ids) with distinct pad, bos and eos tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(_SENTENCES, trainer)
    built = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    built.chat_template = _CHAT_TEMPLATE
    return built


@pytest.fixture(scope="session")
def causal_lm_dir(tmp_path_factory, backbone_configs, tokenizer) -> Callable[[str], Path]:
    """Folder of a random causal LM of the named architecture, with tokenizer; read-only, made once a session."""
    import torch
    from transformers import AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(f"causal-lm-{name}")
            AutoModelForCausalLM.from_config(backbone_configs[name]).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory, backbone_configs, tokenizer):
    """A sound InfoRM folder with tokenizer; to be copied, not changed."""
    import torch

    from inform_rm import InfoRMConfig, InfoRMForSequenceClassification

    folder = tmp_path_factory.mktemp("reward-model")
    torch.manual_seed(0)
    InfoRMForSequenceClassification(InfoRMConfig(backbone_configs["llama"], latent_dim=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exit_code_of_fork() -> Callable[[Callable[[], object]], int | None]:
    """Run a function in a fork of this process, which spares importing torch again; negative: minus a signal."""

    def run(function: Callable[[], object]) -> int | None:
        process = multiprocessing.get_context("fork").Process(target=function)
        process.start()
        process.join(120)
        return process.exitcode

    return run


class PageReader(HTMLParser):
    """Tags, attributes, cells by row and text of an HTML page; fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def values(self, *names: str) -> list[str | None]:
        """Values of the attributes of these names."""
        return [value for name, value in self.attributes if name in names]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "source", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.texts[self._open[-1]][-1] += data
            if self._open[-1] in ("td", "th"):
                self.rows[-1][-1] += data


@pytest.fixture(scope="session")
def read_page() -> type[PageReader]:
    """Reads the source of an HTML page."""
    return PageReader


@pytest.fixture(scope="session", autouse=True)
def savefig():
    """Figures are not drawn, which takes most of the time of a small evaluation. Yields what draws them in full."""
    from matplotlib.figure import Figure

    in_full = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"\x89PNG"))
        yield in_full


@pytest.fixture(scope="module")
def drawn(savefig):
    """From here to the module's end figures are drawn, with few points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", _save_coarsely)
        yield


def _save_coarsely(figure, file, **options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_layout_engine("none")
    figure.set_dpi(20)
    FigureCanvasAgg(figure).print_png(file)


class ChatServer:
    """An OpenAI-compatible server on this machine whose replies are what ``script`` makes of each request.

    A script takes the request's fields and gives the text of the reply, or ``(status, body, headers)``.
    """

    def __init__(self, script):
        self.script, self.requests, self.headers, self.paths = script, [], [], []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(fields)
                owner.headers.append(dict(self.headers))
                owner.paths.append(self.path)
                made = owner.script(fields)
                status, body, headers = (200, owner.completion(made), {}) if isinstance(made, str) else made
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @staticmethod
    def completion(text, finish_reason="stop"):
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": len(str(text).split())}}

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def chat_server(monkeypatch):
    """Starts a `ChatServer`; requests are sent again at once, without the wait."""
    monkeypatch.setattr("inform_rm.util.endpoint.ChatEndpoint._wait", lambda self, seconds: None)
    started = []

    def start(script):
        started.append(ChatServer(script))
        return started[-1]

    yield start
    for server in started:
        server.close()
