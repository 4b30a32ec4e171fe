"""lm-eval is an extra: its absence and its misuse are named; a local task gives the score a literal computation gives."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from aerogel.errors import AerogelError
from aerogel.evaluate.lm_eval import LmEval
from aerogel.model.family import Family
from aerogel.model.network import Network
from tests.tiny import FAMILIES
from tests.words import tokenizer

QUESTIONS = [
    {"question": "the people of the", "choices": ["world", "war", "peace"], "answer": 0},
    {"question": "we in", "choices": ["congress", "a", "that"], "answer": 1},
    {"question": "our", "choices": ["people", "world", "war"], "answer": 2},
]


def tiny() -> Network:
    return Network(FAMILIES["llama"].build(), Family("llama", ("llama",)), processor=tokenizer())


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AerogelError, match=r"pip install 'aerogel\[tasks\]'"):
        LmEval(tasks=("arc_easy",)).measure(tiny())


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_is_scored(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra aerogel[tasks] is not installed")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "union.yaml").write_text(
        f"task: union\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/questions.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    net, right = tiny(), 0
    for question in QUESTIONS:
        ids = net.processor(question["question"], return_tensors="pt")["input_ids"]
        scores = net.module(ids).logits[0, -1]
        choices = torch.tensor([net.processor(choice)["input_ids"][0] for choice in question["choices"]])
        right += int(scores[choices].argmax() == question["answer"])
    found = LmEval(tasks=("union",), folder=str(tmp_path)).measure(net)
    assert found["union"]["acc"] == pytest.approx(right / 3)
    with pytest.raises(AerogelError, match="knows no task onion"):
        LmEval(tasks=("onion",), folder=str(tmp_path)).measure(net)
    with pytest.raises(AerogelError, match="has no tasks to run"):
        LmEval().measure(net)
    with pytest.raises(AerogelError, match="is no folder"):
        LmEval(tasks=("union",), folder=str(tmp_path / "absent")).measure(net)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A harness that scores one batch of two tokens; returns the metrics that it gives, to be changed."""
    metrics = {"acc,none": 0.5}

    def simple_evaluate(model: Network, tasks: list[str], **options: object) -> dict[str, object]:
        model.module(torch.tensor([[3, 4]]))
        return {"results": {task: {"alias": task, **metrics} for task in tasks}}

    for name, members in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda pretrained, **options: SimpleNamespace(module=pretrained)},
        "lm_eval.tasks": {"TaskManager": lambda include_path: SimpleNamespace(all_tasks=["union"])},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return metrics


def test_results_that_are_no_numbers_are_one_error(harness: dict[str, float]) -> None:
    net = tiny()
    assert LmEval(tasks=("union",)).measure(net) == {"union": {"acc": 0.5}}
    harness["perplexity,none"] = math.nan
    with pytest.raises(AerogelError, match="lm_eval: LlamaForCausalLM gives a perplexity of nan on union; its weights are damaged"):
        LmEval(tasks=("union",)).measure(net)
    del harness["perplexity,none"]
    net.module.model.norm.weight.data[0] = math.nan
    with pytest.raises(AerogelError, match="lm_eval: LlamaForCausalLM gives logits that are NaN or infinite"):
        LmEval(tasks=("union",)).measure(net)
    assert not net.module._forward_hooks
