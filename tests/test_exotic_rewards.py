"""Reward functions as people have them, right and by mistake: each is called as its trainer calls it, or refused.

They are called here, but for those whose imports must find nothing that was loaded before; `test_hostile_code` calls
functions in a process of their own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from entropy_core.errors import ProbeError
from entropy_core.files.functions import imported_files
from entropy_core.rewards import functions
from entropy_core.rewards.functions import compute_rewards
from entropy_core.rewards.signatures import Responses

TEXTS = ["2", "5;"]
CHATS = [[{"role": "user", "content": "1+1="}], [{"role": "user", "content": "2+2="}]]
COLUMNS = {"answer": ["2", "4"]}
VERL = {
    "data_source": ["sums", "sums"],
    "reward_model": [{"style": "rule", "ground_truth": "2"}, {"style": "rule", "ground_truth": "4"}],
    "extra_info": [{"index": 0}, None],
}


@pytest.fixture(autouse=True)
def _modules_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("beside_it", "package_beside", "lab"):
            del sys.modules[name]


def called(
    home: Path, body: str, columns: dict[str, Any] = COLUMNS, prompts: Any = ("1+1=", "2+2="), state: Any = None
) -> list[float | None]:
    (home / "mine.py").write_text(body)
    chats = [[{"role": "assistant", "content": text}] for text in TEXTS] if isinstance(prompts[0], list) else TEXTS
    given = Responses([*prompts], TEXTS, chats, [[4, 1], [7, 16]], columns, state or {"global_step": 3})
    return functions._called(f"{home / 'mine.py'}:reward", given)


LENGTHS = [0.5, 1.0]
RIGHT = {
    "async": "async def reward(completions, **_): return [len(c) / 2 for c in completions]",
    "an async object": (
        "class Length:\n    async def __call__(self, completions, **_): return [len(c) / 2 for c in completions]\n"
        "reward = Length()"
    ),
    "a function with its weight": (
        "import functools\ndef base(completions, weight, **_): return [weight * len(c) for c in completions]\n"
        "reward = functools.partial(base, weight=0.5)"
    ),
    "by the tokens": "def reward(completion_ids, **_): return [{4: 0.5, 7: 1.0}[ids[0]] for ids in completion_ids]",
    "by the step": "def reward(completions, trainer_state, **_):\n"
    "    return [len(c) * trainer_state.global_step / 6 for c in completions]",
    "with logs": (
        "def reward(completions, log_extra, log_metric, **_):\n    log_extra('text', completions)\n"
        "    log_metric('mean', 0.1)\n    return [len(c) / 2 for c in completions]"
    ),
    "without a place for more": "def reward(prompts, completions, answer): return [len(c) / 2 for c in completions]",
    "a tuple": "def reward(completions, **_): return tuple(len(c) / 2 for c in completions)",
    "an array": "import torch\ndef reward(completions, **_): return torch.tensor([len(c) / 2 for c in completions])",
}
OF_VERL = {
    "verl's": "def reward(data_source, solution_str, ground_truth, extra_info=None): return len(solution_str) / 2",
    "verl's, with more": (
        "def reward(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert extra_info in ({'index': 0}, {})\n"
        "    return {'score': len(solution_str) / 2, 'acc': ground_truth in '24'}"
    ),
    "verl's, async": (
        "async def reward(data_source, solution_str, ground_truth, extra_info=None):\n    return len(solution_str) / 2"
    ),
}


OF_OPENRLHF = {
    "OpenRLHF's, a tensor": "import torch\ndef reward(queries, prompts, labels): return torch.tensor(\n"
    "    [(len(q) - len(p)) / 2 for q, p in zip(queries, prompts, strict=True)])",
    "OpenRLHF's, with more": "def reward(queries, prompts, labels, **_):\n    assert labels == ['2', '4']\n"
    "    scores = [len(q.removeprefix(p)) / 2 for q, p in zip(queries, prompts)]\n"
    "    return {'rewards': scores, 'scores': scores, 'extra_logs': {}}",
}


@pytest.mark.parametrize("case", OF_OPENRLHF)
def test_a_function_of_openrlhfs_is_given_prompts_with_their_responses(tmp_path: Path, case: str):
    assert called(tmp_path, OF_OPENRLHF[case], {"label": ["2", "4"]}, ["a", "bc"]) == LENGTHS


@pytest.mark.parametrize("case", RIGHT)
def test_a_function_that_people_have_is_called_as_trl_calls_it(tmp_path: Path, case: str):
    assert called(tmp_path, RIGHT[case]) == LENGTHS


@pytest.mark.parametrize("case", OF_VERL)
def test_a_function_of_verls_is_called_once_for_each_response(tmp_path: Path, case: str):
    assert called(tmp_path, OF_VERL[case], VERL, CHATS) == LENGTHS


def test_a_response_may_be_left_open(tmp_path: Path):
    body = "def reward(completions, **_): return [None if ';' in c else 0.5 for c in completions]"
    assert called(tmp_path, body) == [0.5, None]


def test_messages_where_the_prompts_are_messages(tmp_path: Path):
    body = (
        "def reward(prompts, completions, **_):\n    assert prompts[0][0]['role'] == 'user'\n"
        "    return [len(c[0]['content']) / 2 * (c[0]['role'] == 'assistant') for c in completions]"
    )
    assert called(tmp_path, body, prompts=CHATS) == LENGTHS
    name = f"{tmp_path / 'mine.py'}:reward"
    assert compute_rewards(name, CHATS, TEXTS, COLUMNS, token_ids=[[4], [7]], trainer_state={}) == LENGTHS
    assert compute_rewards("exact_match", CHATS, TEXTS, COLUMNS) == [1.0, 0.0]  # ours read the text


REFUSED: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "verl's without its columns": (OF_VERL["verl's"], COLUMNS, CHATS, "no columns reward_model .*and data_source"),
    "verl's without a score": (
        "def reward(data_source, solution_str, ground_truth, extra_info): return {'acc': 1}",
        VERL,
        CHATS,
        "KeyError: 'score'",
    ),
    "verl's that raises": (
        "def reward(data_source, solution_str, ground_truth, extra_info): return 1 / (ground_truth == '2')",
        VERL,
        CHATS,
        r"ZeroDivisionError: division by zero at .*mine\.py:1 on sequence 1",
    ),
    "OpenRLHF's without labels": (
        OF_OPENRLHF["OpenRLHF's, with more"],
        COLUMNS,
        ["a", "b"],
        "takes queries, as OpenRLHF's do, and the pool has no column label",
    ),
    "async that raises": (
        "async def reward(completions, **_):\n    return [{'2': 1.0}[c] for c in completions]",
        COLUMNS,
        ["a", "b"],
        r"KeyError: '5;' at .*mine\.py:2 on sequence 1, prompt 'b'",
    ),
    "async of too few": (
        "async def reward(**_): return [1.0]",
        COLUMNS,
        ["a", "b"],
        "returned 1 values for 2 responses",
    ),
    "async and a generator": (
        "async def reward(completions, **_):\n    for c in completions: yield 1.0",
        COLUMNS,
        ["a", "b"],
        "returned async_generator",
    ),
    "text of messages": (
        "def reward(completions, **_): return [float(c.strip() == '2') for c in completions]",
        COLUMNS,
        CHATS,
        r"AttributeError: 'list' object has no attribute 'strip' at .*mine\.py:1 .*completions are lists of messages",
    ),
    "messages of text": (
        "def reward(completions, **_): return [len(c[0]['content']) for c in completions]",
        COLUMNS,
        ["a", "b"],
        "TypeError: string indices must be integers",
    ),
    "a column that is not there": (
        "def reward(prompts, completions, answer, solution): ...",
        COLUMNS,
        ["a", "b"],
        "'solution'.*'answer'",
    ),
    "no place for a column": (
        "def reward(prompts, completions): ...",
        COLUMNS,
        ["a", "b"],
        "'answer'",
    ),
    "a module that is not there": ("import beside_it_not", COLUMNS, ["a", "b"], "No module named 'beside_it_not'"),
    "a dictionary": (
        "def reward(completions, **_): return {'score': [1.0, 2.0]}",
        COLUMNS,
        ["a", "b"],
        "returned dict",
    ),
    "nothing for one, a text for another": (
        "def reward(completions, **_): return [None, '1']",
        COLUMNS,
        ["a", "b"],
        "returned '1' for sequence 1",
    ),
    "complex": ("def reward(completions, **_): return [1j, 1.0]", COLUMNS, ["a", "b"], "returned 1j for sequence 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_function_that_is_no_reward_is_refused_in_one_sentence(tmp_path: Path, case: str):
    body, columns, prompts, message = REFUSED[case]
    with pytest.raises(ProbeError, match=message) as raised:
        called(tmp_path, body, columns, prompts)
    assert "\n" not in str(raised.value) and "Fix: " in str(raised.value) and len(str(raised.value)) < 900


# --- what lies beside a file ------------------------------------------------------------------------------------------


def write(home: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    return home


BESIDE = {
    "mine.py": "import json\nimport beside_it\nfrom package_beside.inner import scale\n"
    "def reward(completions, **_): return [scale(len(c)) * beside_it.ONE for c in completions]\n",
    "beside_it.py": "ONE = 1.0\n",
    "package_beside/__init__.py": "from . import deeper\n",
    "package_beside/inner.py": "from .deeper import HALF\ndef scale(x): return x * HALF\n",
    "package_beside/deeper.py": "HALF = 0.5\n",
    "never.py": "raise SystemExit('not imported')\n",
}


def test_a_file_imports_its_siblings_and_the_packages_beside_it(tmp_path: Path):
    write(tmp_path, BESIDE)
    assert called(tmp_path, BESIDE["mine.py"]) == LENGTHS
    name = f"{tmp_path / 'mine.py'}:reward"
    assert compute_rewards(name, ["a", "b"], TEXTS, {}) == LENGTHS  # in a process of its own
    assert sorted(functions.imported_files(name)) == sorted(set(BESIDE) - {"mine.py", "never.py"})


def test_a_file_of_a_package_imports_relatively(tmp_path: Path):
    files = {
        "lab/__init__.py": "",
        "lab/rewards/__init__.py": "",
        "lab/rewards/mine.py": "from ..scale import HALF\nfrom . import near\nimport lab.other\n"
        "def reward(completions, **_): return [HALF * near.ONE * lab.other.ONE * len(c) for c in completions]\n",
        "lab/rewards/near.py": "ONE = 1\n",
        "lab/scale.py": "HALF = 0.5\n",
        "lab/other.py": "ONE = 1\n",
    }
    write(tmp_path, files)
    name = f"{tmp_path / 'lab' / 'rewards' / 'mine.py'}:reward"
    assert compute_rewards(name, ["a", "b"], TEXTS, {}) == LENGTHS
    assert sorted(functions.imported_files(name)) == sorted(
        ["../__init__.py", "../scale.py", "../other.py", "__init__.py", "near.py"]
    )


def test_an_error_in_a_sibling_names_its_line(tmp_path: Path):
    write(tmp_path, {"beside_it.py": "def judge(text):\n    return 1 / (text == '2')\n"})
    body = "import beside_it\ndef reward(completions, **_): return [beside_it.judge(c) for c in completions]\n"
    with pytest.raises(ProbeError, match=r"ZeroDivisionError: .* at .*beside_it\.py:2 on sequence 1"):
        called(tmp_path, body)
    write(tmp_path, {"beside_it.py": "import no_such_library\n"})
    del sys.modules["beside_it"]
    with pytest.raises(ProbeError, match=r"No module named 'no_such_library' at .*beside_it\.py:1"):
        called(tmp_path, body)


def test_what_is_installed_is_known_by_its_release():
    name = "trl.rewards:think_format_reward"  # of a lazy package
    assert functions.library(name).startswith("trl ")
    assert functions.imported_files(name) == {} == imported_files(Path(json.__file__))
    assert functions.library("exact_match") == functions.library("/some/file.py:reward") == ""
    completions = ["2", "<think>\nso\n</think>\n2"]
    assert compute_rewards(name, CHATS, completions, {}) == [0.0, 1.0]
