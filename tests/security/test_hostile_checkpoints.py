"""Model folders made to harm who reads them: refused or survived, in little memory, and nothing is executed."""

import json
import os
import pickle
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

MOST_MEBIBYTES = 700  # the tiny model itself takes some 30
READ = "read"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def pickled(canary):
    return pickle.dumps({"score.weight": Payload(canary)})


def torch_pickled(path, canary):
    torch.save({"score.weight": Payload(canary)}, path)


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config(**changes):
    return lambda folder, canary: change_json(folder / "config.json", **changes)


def backbone_config(**changes):
    def change(folder, canary):
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        settings.get("text_config", settings).update(changes)
        path.write_text(json.dumps(settings))

    return change


def config_text(text):
    return lambda folder, canary: (folder / "config.json").write_text(text)


def tokenizer_config(**changes):
    return lambda folder, canary: change_json(folder / "tokenizer_config.json", **changes)


def weights_bytes(content):
    return lambda folder, canary: (folder / "model.safetensors").write_bytes(content)


def weights_header(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return weights_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def changed_weights(change):
    def build(folder, canary):
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return build


def index(place, target=None, **extra):
    """An index that names `place`; the weights move to `target` where the place can be reached."""

    def build(folder, canary):
        weights = load_file(folder / "model.safetensors")
        shutil.move(folder / "model.safetensors", folder.parent / "secret.safetensors")
        if target is not None:
            os.symlink(folder.parent / "secret.safetensors", folder / target)
        name = place.format(folder=folder) if isinstance(place, str) else place
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name), **extra}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        (folder / "decoy.safetensors").write_bytes((folder.parent / "secret.safetensors").read_bytes())

    return build


def index_text(text):
    def build(folder, canary):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return build


def only(name):
    """The weights as nothing but a pickle of this name."""

    def build(folder, canary):
        (folder / "model.safetensors").unlink()
        torch_pickled(folder / name, canary)

    return build


def pickle_beside_a_decoy(folder, canary):
    only("pytorch_model.bin")(folder, canary)
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")


def pickle_index(folder, canary):
    only("pytorch_model-00001-of-00001.bin")(folder, canary)
    weight_map = {"score.weight": "pytorch_model-00001-of-00001.bin"}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(text)


def safetensors_index_of_a_pickle(folder, canary):
    only("weights.bin")(folder, canary)
    text = json.dumps({"metadata": {}, "weight_map": {"score.weight": "weights.bin"}})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "x.safetensors").write_bytes(b"")


def pickle_named_safetensors(folder, canary):
    (folder / "model.safetensors").write_bytes(pickled(canary))


def torch_pickle_named_safetensors(folder, canary):
    torch_pickled(folder / "model.safetensors", canary)


def adapter(weights, base):
    def build(folder, canary):
        settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 1, "target_modules": ["q_proj"],
                    "base_model_name_or_path": base.format(folder=folder)}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        if weights == "adapter_model.bin":
            torch_pickled(folder / weights, canary)
        else:
            save_file({"x": torch.zeros(1)}, folder / weights)

    return build


def code(canary):
    """A module that makes a file when it is imported, with every class that a config may name."""
    names = ("Config", "Model", "Tokenizer")
    return f"import os\nos.mkdir({str(canary)!r})\n" + "".join(f"class {name}: pass\n" for name in names)


def local_code(**changes):
    """`auto_map` of a model type that nobody knows, with its code in the folder."""

    def build(folder, canary):
        (folder / "evil.py").write_text(code(canary))
        auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model",
                    "AutoModelForSequenceClassification": "evil.Model"}  # fmt: skip
        change_json(folder / "config.json", auto_map=auto_map, **changes)

    return build


def foreign_code(prefix, **changes):
    def build(folder, canary):
        other = folder.parent / "other"
        other.mkdir()
        (other / "evil.py").write_text(code(canary))
        (other / "config.json").write_text("{}")
        place = prefix.format(other=other)
        auto_map = {"AutoConfig": f"{place}evil.Config", "AutoModelForSequenceClassification": f"{place}evil.Model"}
        change_json(folder / "config.json", auto_map=auto_map, **changes)

    return build


def tokenizer_code(reference, copied=True):
    def build(folder, canary):
        place = folder if copied else folder.parent
        (place / "evil.py").write_text(code(canary))
        name = reference.format(folder=folder)
        change_json(
            folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map={"AutoTokenizer": [name, name]}
        )

    return build


def tokenizer_names_a_pickle(folder, canary):
    (folder / "vocab.pkl").write_bytes(pickled(canary))
    changes = {"vocab_file": "vocab.pkl", "pretrained_vocab_file": "vocab.pkl", "tokenizer_file": "vocab.pkl"}
    change_json(folder / "tokenizer_config.json", **changes)


def pickle_as(name):
    return lambda folder, canary: (folder / name).write_bytes(pickled(canary))


def name_elsewhere(folder, canary):
    other = folder.parent / "elsewhere"
    other.mkdir()
    (other / "config.json").write_text("{}")
    change_json(folder / "config.json", _name_or_path=str(other), name_or_path=str(other))


def template(text):
    def build(folder, canary):
        (folder / "chat_template.jinja").write_text(text.replace("CANARY", str(canary)))

    return build


def symlinked(name):
    """A file of the folder is a link to one outside that the reader of the folder may read."""

    def build(folder, canary):
        secret = folder.parent / "secret"
        secret.write_text("the secret key")
        os.symlink(secret, folder / name)

    return build


def symlink_loop(folder, canary):
    (folder / "config.json").unlink()
    os.symlink(folder / "config.json", folder / "config.json")


def fifo(name):
    def build(folder, canary):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return build


def endless(name):
    def build(folder, canary):
        (folder / name).unlink()
        os.symlink("/dev/zero", folder / name)

    return build


DEEP = '{"a":' * 10_000 + "1" + "}" * 10_000
HUGE_HEADER = weights_header({"score.weight": tensor(0, 4 * 10**12, (10**12,))}, b"\0" * 64)

# Name: how the folder is made, what reads it, and the message it is refused with (or READ: it does no harm).
CASES = {
    # pickles
    "pickle alone": (only("pytorch_model.bin"), "reward model", "only pickled weights"),
    "pickle beside other safetensors": (pickle_beside_a_decoy, "reward model", "safetensors"),
    "pickle beside other safetensors, training": (pickle_beside_a_decoy, "train", "safetensors"),
    "pickle index": (pickle_index, "reward model", "only pickled weights"),
    "index of safetensors names a pickle": (safetensors_index_of_a_pickle, "reward model", "weights.bin"),
    "pickle named safetensors": (pickle_named_safetensors, "reward model", "safetensors"),
    "torch pickle named safetensors": (torch_pickle_named_safetensors, "reward model", "safetensors"),
    "pickle named safetensors, likelihood": (pickle_named_safetensors, "likelihood", "safetensors"),
    "pickle named safetensors, training": (torch_pickle_named_safetensors, "train", "safetensors"),
    "pickle named safetensors, average": (pickle_named_safetensors, "average", "safetensors"),
    "transformers_weights names a pickle": (
        lambda folder, canary: (only("w.bin")(folder, canary), config(transformers_weights="w.bin")(folder, canary)),
        "reward model", "pickled|safetensors"),
    "adapter that is a pickle": (adapter("adapter_model.bin", "{folder}"), "reward model", "PEFT adapter"),
    "adapter of a model elsewhere": (adapter("adapter_model.safetensors", "other/repo"), "reward model", "adapter"),
    "adapter of a model elsewhere, training": (adapter("adapter_model.bin", "{folder}/.."), "train", "adapter"),
    "training_args that is a pickle": (pickle_as("training_args.bin"), "reward model", READ),
    "tokenizer names a pickle": (tokenizer_names_a_pickle, "tokenizer", READ),
    "tokenizer.json that is a pickle": (pickle_as("tokenizer.json"), "tokenizer", "no loadable tokenizer"),
    "tokenizer.model that is a pickle": (
        lambda folder, canary: [(folder / "tokenizer.json").unlink(), pickle_as("tokenizer.model")(folder, canary)],
        "tokenizer", "tokenizer"),
    "config.json that is a pickle": (pickle_as("config.json"), "reward model", "config"),
    # safetensors that lie
    "empty weights": (weights_bytes(b""), "reward model", "model.safetensors"),
    "header length of 2**63": (weights_header(b"{}", length=1 << 63), "reward model", "model.safetensors"),
    "header of 90 MB in a short file": (weights_header(b"{}", length=90_000_000), "reward model", "safetensors"),
    "header of nothing": (weights_header(b""), "reward model", "safetensors"),
    "header that is no object": (weights_header(b"[1, 2]"), "reward model", "safetensors"),
    "header nested 50,000 deep": (weights_header(b'{"a":' * 50_000), "reward model", "safetensors"),
    "header that is no UTF-8": (weights_header(b'{"\xff": 1}'), "reward model", "safetensors"),
    "offsets beyond the file": (weights_header({"a": tensor(0, 16)}, b"\0" * 8), "reward model", "safetensors"),
    "offsets that go back": (weights_header({"a": tensor(16, 0)}, b"\0" * 16), "reward model", "safetensors"),
    "offsets below 0": (weights_header({"a": tensor(-16, 0)}, b"\0" * 16), "reward model", "safetensors"),
    "overlapping tensors": (
        weights_header({"a": tensor(0, 16), "b": tensor(8, 24)}, b"\0" * 24), "reward model", "safetensors"),
    "a gap between tensors": (
        weights_header({"a": tensor(0, 16), "b": tensor(32, 48)}, b"\0" * 48), "reward model", "safetensors"),
    "data after the last tensor": (weights_header({"a": tensor(0, 16)}, b"\0" * 999), "reward model", "safetensors"),
    "shape larger than its bytes": (
        weights_header({"a": tensor(0, 16, (10**9,))}, b"\0" * 16), "reward model", "safetensors"),
    "shape whose size overflows": (
        weights_header({"a": tensor(0, 16, (1 << 62, 1 << 62))}, b"\0" * 16), "reward model", "safetensors"),
    "tensor of a terabyte": (HUGE_HEADER, "reward model", "safetensors"),
    "unknown dtype": (weights_header({"a": tensor(0, 16, dtype="PICKLE")}, b"\0" * 16), "reward model", "safetensors"),
    "the same name twice": (
        weights_header(
            b'{"a": %s, "a": %s}' % ((json.dumps(tensor(0, 16)).encode(),) * 2), b"\0" * 16), "reward model", "."),
    "a weight of another shape": (
        changed_weights(lambda w: w.update({"model.norm.weight": torch.zeros(5)})), "reward model", "norm"),
    "a weight of another type": (
        changed_weights(lambda w: w.update({"model.norm.weight": torch.zeros(32, dtype=torch.bool)})),
        "reward model", READ),
    "a weight that is missing": (changed_weights(lambda w: w.pop("model.norm.weight")), "reward model", "norm"),
    "weights that are a FIFO": (fifo("model.safetensors"), "reward model", "safetensors"),
    "weights without end": (endless("model.safetensors"), "reward model", "safetensors"),
    # an index that points elsewhere
    "index to the folder above": (index("../secret.safetensors"), "reward model", "index.*secret"),
    "index to an absolute path": (index("{folder}/../secret.safetensors"), "reward model", "index.*secret"),
    "index to the folder above, training": (index("../secret.safetensors"), "train", "index.*secret"),
    "index to a system file": (index("/etc/passwd"), "reward model", "index.*passwd"),
    "index to a missing file": (index("gone.safetensors"), "reward model", "gone.safetensors"),
    "index with backslashes": (index("..\\\\secret.safetensors"), "reward model", "index.*secret"),
    "index through a subfolder": (index("x/../../secret.safetensors"), "reward model", "index.*secret"),
    "index to a link": (index("model-1.safetensors", target="model-1.safetensors"), "reward model", READ),
    "index to a number": (index(7), "reward model", "index"),
    "index to a list": (index(["model.safetensors"]), "reward model", "index"),
    "index of NUL": (index("a\0b.safetensors"), "reward model", "index"),
    "index nested 10,000 deep": (index_text(DEEP), "reward model", "index"),
    "index that is a list": (index_text("[]"), "reward model", "index"),
    "index without a map": (index_text("{}"), "reward model", "index"),
    "index without entries": (index_text('{"metadata": {}, "weight_map": {}}'), "reward model", "index"),
    "index without end": (
        lambda folder, canary: os.symlink("/dev/zero", folder / "model.safetensors.index.json"),
        "reward model", "pipe or a device"),
    # code
    "code in the folder, not asked for": (local_code(model_type="evil"), "reward model", "trust_remote_code"),
    "code in the folder for a known type": (local_code(), "reward model", READ),
    "code in the folder, training": (local_code(model_type="evil"), "train", "trust_remote_code|remote code"),
    "code in the folder, average": (local_code(model_type="evil"), "average", "trust_remote_code"),
    "code in the folder, likelihood": (local_code(model_type="evil"), "likelihood", "trust_remote_code"),
    "code of another repository, not asked for": (
        foreign_code("other/repo--", model_type="evil"), "reward model", "trust_remote_code"),
    "code of another repository, trusted": (
        foreign_code("other/repo--", model_type="evil"), "trusted reward model", "other/repo"),
    "code of another folder, trusted": (
        foreign_code("{other}--", model_type="evil"), "trusted reward model", "other"),
    "code of another repository for a known type": (foreign_code("other/repo--"), "reward model", READ),
    "code of the tokenizer, not asked for": (tokenizer_code("evil.Tokenizer"), "tokenizer", "custom code"),
    "code of another repository's tokenizer": (
        tokenizer_code("other/repo--evil.Tokenizer"), "tokenizer", "other/repo"),
    "code of another repository's tokenizer, trusted": (
        tokenizer_code("other/repo--evil.Tokenizer"), "trusted tokenizer", "other/repo"),
    "code of another folder's tokenizer, trusted": (
        tokenizer_code("{folder}/..--evil.Tokenizer", copied=False), "trusted tokenizer", "--|other"),
    "code above the folder, trusted": (
        tokenizer_code("../evil.Tokenizer", copied=False), "trusted tokenizer", "takes its code from.*evil"),
    "code at an absolute path, trusted": (
        tokenizer_code("{folder}/../evil.Tokenizer", copied=False), "trusted tokenizer", "takes its code from.*evil"),
    "name of another folder": (name_elsewhere, "scorer", READ),
    "tokenizer class of another package": (
        tokenizer_config(tokenizer_class="os.system"), "tokenizer", READ),
    # configs that ask for the moon
    "hidden_size 10**9": (backbone_config(hidden_size=10**9), "reward model", "config.json.*weights"),
    "10**6 layers": (backbone_config(num_hidden_layers=10**6), "reward model", "num_hidden_layers"),
    "10**12 layers": (backbone_config(num_hidden_layers=10**12), "reward model", "num_hidden_layers"),
    "vocabulary of 10**12": (backbone_config(vocab_size=10**12), "reward model", "vocab_size"),
    "vocabulary of 10**9": (backbone_config(vocab_size=10**9), "reward model", "config.json.*weights"),
    "intermediate_size 10**9": (backbone_config(intermediate_size=10**9), "reward model", "config.json.*weights"),
    "head_dim 10**9": (backbone_config(head_dim=10**9), "reward model", "config.json.*weights"),
    "latent_dim 10**9": (config(latent_dim=10**9), "reward model", "config.json.*weights"),
    "latent_dim 10**30": (config(latent_dim=10**30), "reward model", "latent_dim"),
    "10**9 labels": (config(model_type="llama", num_labels=10**9), "reward model", "num_labels"),
    "10**9 labels of the backbone": (backbone_config(num_labels=10**9), "reward model", "num_labels"),
    "number of 5,000 digits": (config_text('{"model_type": "inform", "latent_dim": ' + "9" * 5000 + "}"),
                               "reward model", "config.json"),
    "negative hidden_size": (backbone_config(hidden_size=-32), "reward model", "model: "),
    "hidden_size 0": (backbone_config(hidden_size=0), "reward model", "model: "),
    "no attention heads": (backbone_config(num_attention_heads=0), "reward model", "model: "),
    "hidden_size NaN": (backbone_config(hidden_size=float("nan")), "reward model", "model: "),
    "hidden_size as text": (backbone_config(hidden_size="32"), "reward model", "model: "),
    "hidden_size as a list": (backbone_config(hidden_size=[32]), "reward model", "model: "),
    "hidden_size null": (backbone_config(hidden_size=None), "reward model", "model: "),
    "unknown activation": (backbone_config(hidden_act="__import__('os')"), "reward model", "model: "),
    "dtype that is a module": (config(dtype="torch.hub"), "reward model", "model: |read"),
    "dtype that is no type": (config(dtype="load"), "reward model", "model: |read"),
    "backbone of an unknown type": (backbone_config(model_type="evil"), "reward model", "model: "),
    "backbone that is a list": (config(text_config=[1]), "reward model", "model: "),
    "backbone that is the model itself": (backbone_config(model_type="inform"), "reward model", "model: "),
    "config nested 10,000 deep": (config_text(DEEP), "reward model", "config.json"),
    "config that is a list": (config_text("[]"), "reward model", "config.json"),
    "config of 20 MB": (config_text('{"a": "' + "a" * 20_000_000 + '"}'), "reward model", "config.json"),
    "config without end": (endless("config.json"), "reward model", "config.json"),
    "config that is a FIFO": (fifo("config.json"), "reward model", "config.json"),
    "config that links to itself": (symlink_loop, "reward model", "config.json"),
    "id2label of a million": (
        lambda folder, canary: config(id2label={str(n): str(n) for n in range(1_000_000)})(folder, canary),
        "reward model", "config.json|num_labels"),
    "quantization by unknown code": (
        config(quantization_config={"quant_method": "evil"}), "reward model", "quantized by 'evil'"),
    "quantization that is a list": (config(quantization_config=[1]), "reward model", "quantized by"),
    "rope of an unknown kind": (
        backbone_config(rope_parameters={"rope_type": "evil", "rope_theta": 1.0}), "reward model", "model: "),
    # tokenizers
    "tokenizer.json nested 50,000 deep": (
        lambda folder, canary: (folder / "tokenizer.json").write_text("[" * 50_000), "tokenizer", "tokenizer"),
    "tokenizer_config.json nested 10,000 deep": (
        lambda folder, canary: (folder / "tokenizer_config.json").write_text(DEEP), "tokenizer", "tokenizer"),
    "added token of id 10**12": (
        tokenizer_config(added_tokens_decoder={str(10**12): {"content": "<x>", "special": True}}), "scorer",
        "its ids go up to"),
    "tokenizer that links to a secret": (
        lambda folder, canary: [(folder / "tokenizer.json").unlink(), symlinked("tokenizer.json")(folder, canary)],
        "tokenizer", "tokenizer"),
    # files that would be copied on
    "model card that links to a secret": (symlinked("README.md"), "export", "README.md.*outside"),
    # chat templates of the tokenizer
    "template that asks for classes": (
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "scorer", "template"),
    "template that runs a command": (
        template("{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}"), "scorer", "template"),
    "template that gets at globals by a filter": (
        template("{{ (messages|attr('__class__')).__mro__ }}x"), "scorer", "template|leaves no token"),
    "template that formats its way out": (
        template("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"), "scorer", "template"),
    "template that includes a file": (template("{% include '/etc/passwd' %}"), "scorer", "template"),
    "template that imports": (template("{% import '/etc/passwd' as x %}"), "scorer", "template"),
    "template with a long loop": (template("{% for i in range(10**10) %}a{% endfor %}"), "scorer", "template"),
    "template with nested loops": (
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}a"), "scorer",
        "template.*loop"),
    "template of 10**10 letters": (template("{{ 'a' * 10**10 }}"), "scorer", "template"),
    "template of a huge number": (template("{{ 10**(10**10) }}"), "scorer", "template"),
    "template of 10**9 letters by a variable": (
        template("{% set n = 1000000000 %}{{ 'a' * n }}"), "scorer", "template"),
    "template of 4 million letters by doubling": (
        template("{% set x=namespace(a='a') %}{% for i in range(22) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a }}"),
        "scorer", "template makes a text"),
    "template that doubles two texts in turn": (
        template("{% set x=namespace(a='a', b='b') %}{% for i in range(99) %}{% set x.a = x.a + x.b %}"
                 "{% set x.b = x.b + x.a %}{% endfor %}{{ x.a }}"), "scorer", "template makes a text"),
    "template that doubles with each message": (
        template("{% set x=namespace(a='a') %}{% for m in messages %}{% set x.a = [x.a, x.a]|join %}{% endfor %}a"),
        "scorer", "template makes a text"),
    "template that grows by replacing": (
        template("{% set x=namespace(a='aa') %}{% for i in range(40) %}{% set x.a = x.a.replace('a', x.a) %}"
                 "{% endfor %}a"), "scorer", "template makes a text"),
    "template that grows by a filter": (
        template("{% set x=namespace(a='aa') %}{% for i in range(40) %}{% set x.a = x.a|replace('a', x.a) %}"
                 "{% endfor %}a"), "scorer", "template makes a text"),
    "template that doubles a list": (
        template("{% set x=namespace(a=[1]) %}{% for i in range(60) %}{% set x.a = x.a + x.a %}{% endfor %}a"),
        "scorer", "template makes a text"),
    "template that doubles a list of lists": (
        template("{% set x=namespace(a=['a']) %}{% for i in range(60) %}{% set x.a = [x.a, x.a] %}{% endfor %}"
                 "{{ x.a }}"),
        "scorer", "template makes a text"),
    "template that doubles for long prompts": (
        template("{% set x=namespace(a=messages[0].content) %}{% for i in range(22) %}{% set x.a = x.a ~ x.a %}"
                 "{% endfor %}{{ x.a if messages[0].content|length > 3 }}"), "scorer", "template makes"),
    "template that formats to a growing width": (
        template("{% set x=namespace(a=1) %}{% for i in range(9) %}{% set x.a = x.a * 10 %}{% endfor %}"
                 "{{ 'a'.ljust(x.a) }}"), "scorer", "template"),
    "template of 10**10 letters by width": (template("{{ 'a'.ljust(10000000000) }}"), "scorer", "template"),
    "template of 10**10 letters by a filter": (template("{{ 'a'|center(10000000000) }}"), "scorer", "template"),
    "template of 10**8 letters": (template("{{ 'a'|center(100000000) }}"), "scorer", "template makes a text"),
    "template that calls itself": (
        template("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"), "scorer", "template"),
    "template nested 5,000 deep": (template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"), "scorer", "template"),
    "template that divides by 0": (template("{{ 1 / 0 }}"), "scorer", "template"),
    "template that gives a number": (
        lambda folder, canary: change_json(folder / "tokenizer_config.json", chat_template=7)
        or (folder / "chat_template.jinja").unlink(), "scorer", "template"),
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(reward_dir, causal_lm_dir, read_all, tmp_path_factory):
    base = tmp_path_factory.mktemp("hostile")
    pairs = base / "pairs.jsonl"
    pairs.write_text('{"prompt": "Say sun.", "chosen": "sun", "rejected": "moon"}\n' * 8)
    cases = []
    for number, (name, (build, operation, _)) in enumerate(CASES.items()):
        folder = base / str(number) / "model"
        shutil.copytree(causal_lm_dir("llama") if operation in ("likelihood", "train") else reward_dir, folder)
        build(folder, folder.parent / "canary")
        output = folder.parent / "out"
        arguments = {"average": [folder, output], "export": [folder, output], "train": [folder, pairs, output]}
        arguments = arguments.get(operation, [folder])
        cases.append((name, operation, arguments))
    answers = read_all(cases)
    for number, name in enumerate(CASES):
        answers[name]["place"] = base / str(number)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_hostile_folder_is_refused_or_harmless(name, reports):
    expected, report = CASES[name][2], reports[name]
    assert not (report["place"] / "canary").exists(), "its payload ran"
    if expected == READ:
        assert report["outcome"] == "read", report
    else:
        assert report["outcome"] == "InputError", report
        assert re.search(expected, report["message"], re.DOTALL), report["message"]
        assert len(report["message"]) < 2000
    assert report["mebibytes"] < MOST_MEBIBYTES, report
    written = [path.read_bytes() for path in (report["place"] / "out").rglob("*") if path.is_file()]
    assert not any(b"the secret key" in content for content in written)


def test_payloads_would_run_elsewhere(tmp_path):
    """What the table holds is dangerous: read without care, each kind makes its file."""
    pickle.loads(pickled(tmp_path / "one"))
    torch_pickled(tmp_path / "file", tmp_path / "two")
    torch.load(tmp_path / "file", weights_only=False)
    exec(code(tmp_path / "three"), {})
    assert all((tmp_path / name).is_dir() for name in ("one", "two", "three"))
