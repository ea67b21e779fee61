"""Chat templates that do not come to an end, or fill the memory: refused by one error, and nothing stays behind."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pipeline_fixtures import make_run, probe, skip_figures, values, write_reward

from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import PromptError
from entropy_core.prompts import templates
from entropy_core.prompts.pools import Pool
from entropy_core.prompts.tokens import encode

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
STOPPED = r"the chat template of .* took (longer than|more than) .* was stopped"
LARGE = "the chat template of .* returned more than"
HOSTILE = {
    "loops within loops": (LOOPS, STOPPED),
    "a macro that calls itself for ever": (
        "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) if n < 90 }}{% endfor %}{% endmacro %}{{ f(0) }}",
        STOPPED,
    ),
    "a text of many gigabytes": ("{{ 'x' * 10**10 }}", STOPPED),
    "a text that doubles": (
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        STOPPED,
    ),
    "a list of many gigabytes": ("{% set x = [0] * 10**10 %}", r"took more|failed: MemoryError"),
    "a number without end": ("{{ 9 ** (9 ** (9 ** 9)) }}", STOPPED),
    "a width": ("{{ '%999999999999d' % 1 }}", r"took more|failed"),
    "centred": ("{{ 'x'.center(10**11) }}", r"took more|failed"),
    "more than is asked for": ("{{ '1' * 10**9 }}", rf"{LARGE}|{STOPPED}"),
    "deeper than Python goes": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "failed"),
    "itself": ("{% include 'chat_template.jinja' %}", "failed"),
    "Python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed: .*unsafe"),
}

SOME = ("loops within loops", "a text of many gigabytes", "Python")


@pytest.fixture
def limits(monkeypatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    monkeypatch.setattr(templates, "GIGABYTES", 1.0)


def pool(count: int = 3) -> Pool:
    return Pool(pa.table({"prompt": ["1+1="] * count}), ())


def with_template(text: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.attack("a chat template without end, or that fills the memory")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.chaos) for name in HOSTILE]
)
def test_a_hostile_template_is_refused(limits, name):
    text, said = HOSTILE[name]
    with pytest.raises(PromptError, match=said) as raised:
        encode(pool(), with_template(text), apply_chat_template=True)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 3000


@pytest.mark.attack("a chat template without end, or that fills the memory")
def test_a_sweep_ends_before_it_begins(limits, tmp_path: Path, monkeypatch):
    skip_figures(monkeypatch)
    run = make_run(tmp_path / "run")
    write_reward(tmp_path)
    for directory in run.glob("checkpoint-*"):
        (directory / "chat_template.jinja").write_text(LOOPS)
    with pytest.raises(PromptError, match=STOPPED):
        probe(values(run, tmp_path / "artifacts", batch_config={"apply_chat_template": True}), isolated=True)
    assert not (tmp_path / "artifacts").exists()


def test_what_a_template_is_given_is_what_transformers_gives_it():
    text = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ 'null' if m.content is none }}{% endfor %}"
        "{{ eos_token }}{{ tools | tojson }}{{ documents }}{{ a }}{{ add_generation_prompt }}"
    )
    tokenizer = with_template(text)
    turns = [[{"role": "user", "content": "1", "name": None}], [{"role": "system", "content": None}]]
    kwargs = {"a": {"b": [1]}, "tools": [{"name": "f"}], "eos_token": "!"}
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **kwargs)
    assert templates.rendered(tokenizer, turns, kwargs, {}) == expected
    tokenizer.chat_template = {"default": "1", "tool_use": "2", "own": "3"}
    assert templates.rendered(tokenizer, turns, {}, {}) == ["1", "1"]
    assert templates.rendered(tokenizer, turns, {"tools": []}, {}) == ["2", "2"]
    assert templates.rendered(tokenizer, turns, {"chat_template": "own"}, {}) == ["3", "3"]
    tokenizer.chat_template = {"own": "3"}
    with pytest.raises(PromptError, match="multiple chat templates with no default"):
        templates.rendered(tokenizer, turns, {}, {})


@pytest.mark.parametrize("name", ["tokenize", "padding", "continue_final_message", "return_tensors", "conversation"])
def test_an_argument_that_is_not_the_templates_is_refused(name):
    with pytest.raises(PromptError, match=f"chat_template_kwargs has '{name}', which no chat template is given"):
        encode(pool(), with_template("1"), apply_chat_template=True, chat_template_kwargs={name: True})
