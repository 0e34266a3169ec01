from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from evalharness.metrics.rouge import Rouge

ROOT = Path(__file__).resolve().parents[3]


def scores(tmp_path, predictions, references):
    return Rouge(keep_in_memory=True, cache_dir=str(tmp_path)).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("text", ["The cat sat on the mat.", "今天天气很好。", "Привет, большой мир", "=> 🙂 <="])
def test_identical_text_scores_100_in_every_script(tmp_path, text):
    assert {name: values[0] for name, values in scores(tmp_path, [text], [text]).items()} == {
        "rouge_1": pytest.approx(100),
        "rouge_2": pytest.approx(100),
        "rouge_l": pytest.approx(100),
    }


def test_an_empty_reply_scores_zero_and_disjoint_ones_too(tmp_path):
    found = scores(tmp_path, ["", "dogs bark"], ["the cat sat", "the cat sat"])
    assert found["rouge_l"] == [0, 0]


def test_english_is_scored_as_rouge_score_does(tmp_path):
    prediction, reference = "The quick dog jumps over a lazy cat", "A quick brown fox jumps over the lazy dog."
    theirs = RougeScorer(["rouge1", "rougeL"]).score(reference, prediction)
    ours = scores(tmp_path, [prediction], [reference])
    assert ours["rouge_1"][0] == pytest.approx(100 * theirs["rouge1"].fmeasure)
    assert ours["rouge_l"][0] == pytest.approx(100 * theirs["rougeL"].fmeasure)


def test_each_metric_script_loads_by_path_offline(tmp_path):
    code = """
import json, evaluate
texts = ["The cat sat on the mat today."]
for name in ("rouge", "bleu", "chrf"):
    metric = evaluate.load(f"evalharness/metrics/{name}.py", keep_in_memory=True)
    print(json.dumps(metric.compute(predictions=texts, references=texts)))
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    rouge, bleu, chrf = map(json.loads, done.stdout.splitlines())
    assert rouge["rouge_l"] == [100]
    assert bleu["statistics"] == [[8, 8, 8, 7, 6, 5, 8, 7, 6, 5]]
    assert len(chrf["statistics"][0]) == 18
