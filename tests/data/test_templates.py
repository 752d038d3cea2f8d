"""What the templates of well-known model families leave of a conversation, and the date that they write.

The templates follow the documented formats of their families but are written for these tests: a format's text is kept,
tools and parts are not.
"""

import copy
import datetime
import logging
from dataclasses import dataclass, field

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from inform_rm.data.check_data import check_data
from inform_rm.data.check_data_text import format_report
from inform_rm.data.encoding import encode
from inform_rm.data.messages import Message
from inform_rm.data.tokenizer import fix_date, load_tokenizer
from inform_rm.errors import InputError
from inform_rm.safety.chat_templates import TEMPLATE_DATE, check_template, has_fixed_date, with_fixed_date
from inform_rm.scoring.reward_models import fingerprint_tokenizer
from inform_rm.scoring.scorer import RewardScorer


@dataclass(frozen=True)
class Family:
    """A template, and for conversations that it does not keep whole ``"lost: ..."`` or ``"refused: ..."``."""

    template: str
    outcomes: dict[str, str] = field(default_factory=dict)


def _turns(*contents: str, system: str | None = None) -> list[Message]:
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return turns + [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]


# Prompt and response of each.
CONVERSATIONS: dict[str, tuple[list[Message], str]] = {
    "single": (_turns("At which temperature does water boil?"), "At 100 degrees."),
    "multi-turn": (_turns("Name a colour.", "Blue, as the sky.", "Another one?"), "Green, as the grass."),
    "system": (_turns("Name a fruit.", system="Answer in one short sentence."), "An apple is a fruit."),
    "reasoning": (_turns("What is 2 + 2?"), "<think>\nTwo and two.\nThat makes four.\n</think>\n\nIt is four."),
    "earlier reasoning": (
        _turns("What is 2 + 2?", "<think>\nTwo and two.\n</think>\n\nIt is four.", "And 3 + 3?"),
        "This one is six.",
    ),
    "blanks": (_turns("  Grüße, wie geht es? 你好 \n"), "\n\n Danke, gut: 好\u00a0🙂  \n"),
}

_CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_CUT_REASONING = "without its text up to '</think>'"


def _chatml_with(system: str) -> str:
    default = "{{ '<|im_start|>system\n" + system + "<|im_end|>\n' }}"
    return "{%- if messages[0].role != 'system' -%}" + default + "{%- endif -%}" + _CHATML


_LLAMA_3 = (
    "{{- bos_token }}{%- set ns = namespace(system='') %}{{- DATE }}"
    "{%- if messages[0].role == 'system' %}{%- set ns.system = messages[0].content | trim %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{- date + '\n\n' + ns.system + '<|eot_id|>' }}"
    "{%- for m in messages if m.role != 'system' %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

FAMILIES = {
    "Llama 2": Family(
        "{%- set ns = namespace(lead='') -%}{%- for m in messages -%}{%- if m.role == 'system' -%}"
        "{%- set ns.lead = '<<SYS>>\n' + m.content.strip() + '\n<</SYS>>\n\n' -%}{%- elif m.role == 'user' -%}"
        "{{ bos_token + '[INST] ' + ns.lead + m.content.strip() + ' [/INST]' }}{%- set ns.lead = '' -%}"
        "{%- else -%}{{ ' ' + m.content.strip() + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"
    ),
    "Llama 3.1": Family(_LLAMA_3.replace("{{- DATE }}", "{%- set date = '26 Jul 2024' %}")),
    "Llama 3.2": Family(
        _LLAMA_3.replace(
            "{{- DATE }}",
            '{%- if strftime_now is defined %}{%- set date = strftime_now("%d %b %Y") %}{%- else %}'
            "{%- set date = '26 Jul 2024' %}{%- endif %}",
        )
    ),
    "Mistral 7B v0.1": Family(
        "{{ bos_token }}{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('user and assistant must take turns') }}{%- endif -%}{%- if m.role == 'user' -%}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{%- else -%}{{ m.content + eos_token }}{%- endif -%}{%- endfor -%}",
        {"system": "refused: user and assistant must take turns"},
    ),
    "Mistral 7B v0.3": Family(
        "{{ bos_token }}{%- set ns = namespace(system='') -%}{%- if messages[0].role == 'system' -%}"
        "{%- set ns.system = messages[0].content + '\n\n' -%}{%- endif -%}"
        "{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}"
        "{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{{ '[INST] ' + (ns.system if m == users[-1] else '') + m.content + '[/INST]' }}"
        "{%- elif m.role == 'assistant' -%}{{ ' ' + m.content | trim + eos_token }}{%- endif -%}{%- endfor -%}"
    ),
    "Qwen 2.5": Family(_chatml_with("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
    "Qwen 3": Family(
        "{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for m in messages -%}"
        "{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' and '</think>' in m.content -%}"
        "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] -%}{%- if loop.index0 > ns.last -%}"
        "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif -%}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{%- else -%}{{ m.content }}{%- endif -%}"
        "{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
        {"earlier reasoning": f"lost: turn 2 (assistant) {_CUT_REASONING}"},
    ),
    "Gemma 2": Family(
        "{{ bos_token }}{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}"
        "{%- endif -%}{%- for m in messages -%}{%- set name = 'model' if m.role == 'assistant' else m.role -%}"
        "{{ '<start_of_turn>' + name + '\n' + m.content | trim + '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}",
        {"system": "refused: System role not supported"},
    ),
    "Gemma 3": Family(
        "{{ bos_token }}{%- set ns = namespace(lead='') -%}{%- for m in messages -%}{%- if m.role == 'system' -%}"
        "{%- set ns.lead = m.content + '\n\n' -%}{%- else -%}"
        "{%- set name = 'model' if m.role == 'assistant' else m.role -%}"
        "{{ '<start_of_turn>' + name + '\n' + ns.lead + m.content | trim + '<end_of_turn>\n' }}"
        "{%- set ns.lead = '' -%}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
    ),
    "Phi 3, first release": Family(
        "{{ bos_token }}{%- for m in messages -%}{%- if m.role in ('user', 'assistant') -%}"
        "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}",
        {"system": "refused: leaves nothing of turn 1 (system)"},
    ),
    "Phi 4": Family(
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_sep|>' }}{%- endif -%}"
    ),
    "DeepSeek-R1-Distill": Family(
        "{{ bos_token }}{%- for m in messages if m.role == 'system' -%}{{ m.content }}{%- endfor -%}"
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<\uff5cUser\uff5c>' + m.content }}"
        "{%- elif m.role == 'assistant' -%}{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] }}"
        "{{ eos_token }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<\uff5cAssistant\uff5c><think>\n' }}{%- endif -%}",
        {
            "reasoning": f"lost: the response {_CUT_REASONING}",
            "earlier reasoning": f"lost: turn 2 (assistant) {_CUT_REASONING}",
        },
    ),
    "SmolLM2": Family(_chatml_with("You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
    "SmolLM3": Family(
        "{%- set system = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' -%}"
        "{{ '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' }}"
        "{{ strftime_now(\"%d %B %Y\") + '\n\n## Custom Instructions\n\n' + system.rstrip() + '\n\n<|im_end|>\n' }}"
        "{%- for m in messages if m.role != 'system' -%}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
    "OLMo 2": Family(
        "{{ bos_token }}{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{{ '' if loop.last else '\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '\n<|assistant|>\n' }}{%- endif -%}"
    ),
    "Granite 3.2": Family(
        "{%- if messages[0].role != 'system' -%}"
        "{{ '<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nToday\\'s Date: ' }}"
        "{{ strftime_now( format = '%B %d, %Y' ) + '.<|end_of_text|>\n' }}{%- endif -%}{%- for m in messages -%}"
        "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif -%}"
    ),
    "Command-R": Family(
        "{{ bos_token }}{%- set names = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'} -%}"
        "{%- for m in messages -%}{{ '<|START_OF_TURN_TOKEN|><|' + names[m.role] + '_TOKEN|>' }}"
        "{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}"
    ),
    "Zephyr": Family(
        "{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
    ),
    "ChatML": Family(_CHATML),
    "gpt-oss": Family(
        "{{ '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n' }}"
        "{{ 'Knowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') }}"
        "{{ '\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final.<|end|>' }}"
        "{%- for m in messages -%}{%- if m.role == 'system' -%}"
        "{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '\n\n<|end|>' }}"
        "{%- elif m.role == 'user' -%}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- else -%}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
    ),
    "LLaVA, parts only": Family(
        "{%- for m in messages -%}{{ m.role.upper() + ': ' }}"
        "{%- for part in m.content | selectattr('type', 'equalto', 'text') -%}{{ part.text + ' ' }}{%- endfor -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}",
        {
            name: f"refused: leaves nothing of turn 1 ({'system' if name == 'system' else 'user'})"
            for name in CONVERSATIONS
        },
    ),
}

# strftime of the fixed date, by hand.
DATES = {
    "Llama 3.2": "26 Jul 2024",
    "SmolLM3": "26 July 2024",
    "Granite 3.2": "July 26, 2024",
    "gpt-oss": "2024-07-26",
}


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def set_clock(monkeypatch, *date: int):
    """Another day for transformers' ``strftime_now``."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(*date)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_leaves_of_each_conversation(name, tokenizer):
    family = FAMILIES[name]
    check_template(family.template, name)
    changed = fix_date(with_template(tokenizer, family.template), name)
    for kind, conversation in CONVERSATIONS.items():
        expected = family.outcomes.get(kind, "intact")
        if expected.startswith("refused: "):
            with pytest.raises(InputError) as refused:
                encode(changed, *conversation)
            assert expected.removeprefix("refused: ") in str(refused.value), kind
        else:
            lost = encode(changed, *conversation).lost
            assert ("intact" if lost is None else f"lost: {lost}") == expected, kind


def test_the_families_that_read_the_clock_write_the_fixed_date(tokenizer):
    assert {name for name, family in FAMILIES.items() if "strftime_now" in family.template} == set(DATES)
    for name, date in DATES.items():
        changed = fix_date(with_template(tokenizer, FAMILIES[name].template), name)
        assert date in changed.apply_chat_template(CONVERSATIONS["single"][0], tokenize=False)


def test_a_date_is_the_same_on_every_day_for_whoever_reads_the_saved_folder(tokenizer, tmp_path, monkeypatch, caplog):
    name = "Llama 3.2"
    with_template(tokenizer, FAMILIES[name].template).save_pretrained(tmp_path / "theirs")
    with caplog.at_level(logging.WARNING, "inform_rm"):
        loaded = load_tokenizer(tmp_path / "theirs")
        assert sum("date is fixed to 26 Jul 2024" in record.message for record in caplog.records) == 1
        loaded.save_pretrained(tmp_path / "ours")
        again = load_tokenizer(tmp_path / "ours")
        assert len(caplog.records) == 1
    assert fingerprint_tokenizer(again) == fingerprint_tokenizer(loaded) != fingerprint_tokenizer(tokenizer)
    prompt, response = CONVERSATIONS["single"]
    turns = [*prompt, {"role": "assistant", "content": response}]
    plain = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = encode(loaded, prompt, response).input_ids
    for date in ((2024, 1, 2), (2031, 12, 3)):
        set_clock(monkeypatch, *date)
        assert plain.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"] == ids
        assert encode(again, prompt, response).input_ids == ids
    text = plain.apply_chat_template(turns, tokenize=False)
    assert DATES[name] in text
    # Nothing else has changed: on that day the template says the same.
    set_clock(monkeypatch, 2024, 7, 26)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs.apply_chat_template(turns, tokenize=False) == text


def test_a_reward_does_not_change_with_the_day(tokenizer, reward_dir, monkeypatch):
    given = with_template(tokenizer, FAMILIES["SmolLM3"].template)
    rewards = []
    for date in ((2024, 1, 2), (2031, 12, 3)):
        set_clock(monkeypatch, *date)
        scorer = RewardScorer(reward_dir, given, device="cpu", max_length=512)
        rewards.append(scorer.score(["Name a colour."], ["Blue."]).item())
    assert rewards[0] == rewards[1]
    assert has_fixed_date(scorer.tokenizer.chat_template)
    assert given.chat_template == FAMILIES["SmolLM3"].template  # a copy was changed


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("\n  {% if true %}x{% endif %}\n{{ strftime_now('%Y') }}", "\n  {% if true %}x{% endif %}\n{{ '2024' }}"),
        ('  {{ strftime_now( "%H:%M" ) }} ', "  {{ '00:00' }} "),
        ("{{ strftime_now(format='it\"s %Y') }}", "{{ 'it\"s 2024' }}"),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}", "2024"),
    ],
)
def test_only_the_date_of_a_template_changes(template, expected, tokenizer):
    turns = [{"role": "user", "content": "a"}]
    fixed = with_template(tokenizer, with_fixed_date(template, "here"))
    reference = with_template(tokenizer, expected)
    assert fixed.apply_chat_template(turns, tokenize=False) == reference.apply_chat_template(turns, tokenize=False)


def test_a_template_that_only_asks_for_a_clock_stays_as_it_is():
    template = "{% if strftime_now is defined %}clock{% endif %}"
    assert with_fixed_date(template, "here") == template and not has_fixed_date(template)
    assert TEMPLATE_DATE.time() == datetime.time(0)


@pytest.mark.parametrize(
    "template",
    [
        "{% set form = '%Y' %}{{ strftime_now(form) }}",
        "{% set now = strftime_now %}{{ now('%Y') }}",
        "{{ strftime_now('%d ' + '%Y') }}",
    ],
)
def test_a_clock_that_cannot_be_fixed_is_refused_with_the_way_out(template, tokenizer):
    with pytest.raises(InputError, match=r"here: .* reads the clock .* constant format, or pass another"):
        fix_date(with_template(tokenizer, template), "here")


def test_check_data_shows_the_date(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a?", "chosen": "Yes, it is.", "rejected": "No."}\n', encoding="utf-8")
    report = check_data(path, with_template(tokenizer, FAMILIES["gpt-oss"].template))
    assert report["tokenizer"]["template_date"] == "2024-07-26" and "template_date '2024-07-26'" in format_report(
        report
    )
    assert check_data(path, tokenizer)["tokenizer"]["template_date"] is None


@pytest.fixture
def bare(tokenizer):
    """A tokenizer without chat template."""
    return with_template(tokenizer, None)


def test_check_data_reads_what_training_does_where_there_is_no_template(bare, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a?", "chosen": "Yes, it is.", "rejected": "No."}\n', encoding="utf-8")
    report = check_data(path, bare)
    assert report["sources"][0]["template"]["example_chosen"] == "\n\nHuman: a?\n\nAssistant: Yes, it is.</s>"
    assert report["tokenizer"]["has_chat_template"] is False and bare.chat_template is None
    assert any("no chat template" in line and "plain" in line for line in report["warnings"])


def test_scoring_without_a_template_says_once_that_nothing_is_put_between(bare, reward_dir, caplog):
    with caplog.at_level(logging.WARNING, "inform_rm"):
        scorer = RewardScorer(reward_dir, bare, device="cpu")
        for _ in range(2):
            scorer.score(["a?"], [" Yes."])
    assert sum("nothing is put between prompt and response" in record.message for record in caplog.records) == 1
    assert bare.decode(scorer.encode("a?", " Yes.", "row").input_ids) == "a? Yes.</s>"


def test_what_python_imports_at_its_start_does_not_count_as_the_templates(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("held = bytearray(1 << 30)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check_template("{{ messages[0].content }} once more", "here")
