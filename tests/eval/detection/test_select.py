"""`select`: the order is that of CSI's rank in the null, with the choice by gold beside it."""

import functools
import json
import sys

import pytest
import torch

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.cli import main
from inform_rm.errors import InputError
from inform_rm.eval.detection.detect import detect
from inform_rm.eval.detection.select import select
from inform_rm.eval.detection.settings import DetectionSettings

module = sys.modules[select.__module__]

COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey"]
QUICK = {"num_splits": 9, "num_resamples": 5, "alpha": 0.1}


def rows(first, number=40, odd=0, gold=0.0):
    plain = [f"It is {COLOURS[n % 8]}" + " indeed" * (n % 3) for n in range(first, first + number - odd)]
    texts = plain + [f"<b>{'no ' * (5 + n)}" for n in range(odd)]
    return [
        {"prompt": f"Name a colour, number {n % 7}", "response": text, "gold": gold + n % 2}
        for n, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, backbone_configs, tokenizer):
    """Two models of other K and beta."""
    made = {}
    for name, latent_dim, beta in (("narrow", 4, 0.1), ("wide", 8, 0.01)):
        torch.manual_seed(latent_dim)
        config = InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=latent_dim, beta=beta)
        made[name] = tmp_path_factory.mktemp(name)
        InfoRMForSequenceClassification(config).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.mark.parametrize("spoilt", ["narrow", "wide"])
def test_the_model_whose_candidates_stand_out_less_is_chosen(folders, spoilt):
    other = "wide" if spoilt == "narrow" else "narrow"
    candidates = {spoilt: rows(100, odd=20, gold=5.0), other: rows(200)}
    found = select(folders, rows(0), candidates, gold="gold", progress=False, **QUICK)
    assert found.chosen == other and [entry["name"] for entry in found.models] == [other, spoilt]
    assert found.chosen_by_gold == spoilt
    first, second = found.models
    assert (first["null_rank"], -first["csi_over_null"]) > (second["null_rank"], -second["csi_over_null"])
    assert second["gold"] == 5.5 and second["gold_place"] == 1 and second["gold_interval"][0] < 5.5
    assert {entry["name"]: (entry["latent_dim"], entry["beta"]) for entry in found.models} == {
        "narrow": (4, 0.1), "wide": (8, 0.01)
    }  # fmt: skip
    alone = detect(folders[spoilt], rows(0), candidates[spoilt], progress=False, **QUICK).candidates[0]
    assert second["csi_normalized"] == alone["csi_normalized"]
    assert second["null_rank"] == alone["csi_normalized_null_rank"]


def test_command_line(folders, tmp_path, capsys, monkeypatch, drawn):
    for name, content in {"reference": rows(0), "candidate": rows(100, odd=20)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    command = ["select", "--model", *(f"{name}={folder}" for name, folder in folders.items()), "--reference",
               f"{tmp_path}/reference.jsonl", "--candidate", f"{tmp_path}/candidate.jsonl", "--alpha", "0.1",
               "--output", f"{tmp_path}/out"]  # fmt: skip
    quickly = functools.partial(select, **{name: QUICK[name] for name in ("num_splits", "num_resamples")})
    monkeypatch.setattr(module, "select", quickly)
    assert main(command) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert f"chose {result['chosen']} among 2 models" in capsys.readouterr().out
    assert "chosen_by_gold" not in result and "gold" not in result["models"][0]
    page = (tmp_path / "out" / "result.html").read_text()
    assert "rank in the null" in page and (tmp_path / "out" / "models.png").exists()


def test_gold_of_a_csv_file_is_read(tmp_path):
    path = tmp_path / "candidates.csv"
    path.write_text("prompt,response,gold\nName a colour,red,0.5\nName a fruit,fig,2\n")
    assert module._gold(path, "gold", DetectionSettings())["gold"] == 1.25
    path.write_text(path.read_text() + "Name a day,Monday,much\n")
    with pytest.raises(InputError, match="row 3: column 'gold' holds 'much'"):
        module._gold(path, "gold", DetectionSettings())


def test_wrong_use_is_named(folders):
    with pytest.raises(InputError, match="expected at least two to choose from"):
        select({"narrow": folders["narrow"]}, rows(0), rows(9))
    with pytest.raises(InputError, match=r"candidates: names \['narrow'\] are not those of the models"):
        select(folders, rows(0), {"narrow": rows(9)})
    with pytest.raises(InputError, match="column 'gold' holds 'x'; expected its gold reward"):
        select(folders, rows(0), [*rows(9), {"prompt": "Name", "response": "x", "gold": "x"}], gold="gold")
