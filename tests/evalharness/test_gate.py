from __future__ import annotations

import pytest

from evalharness.comparison import Comparison, compare
from evalharness.errors import RuleError
from evalharness.gate import Rule, judge, parse_rule, read_rules, values
from evalharness.records import open_run
from evalharness.samples import load_fixed_prompts
from tests.evalharness.endpoint import header, samples


@pytest.fixture(scope="module")
def comparison(finished_run) -> Comparison:
    return compare(finished_run, 200)


def passed(comparison: Comparison, *texts: str) -> list[bool]:
    return [verdict.passed for verdict in judge(comparison, [parse_rule(text) for text in texts])]


def test_rules_hold_or_fail_by_their_value(comparison):
    assert passed(
        comparison,
        "perplexity.change_percent <= -15",
        "perplexity.change_percent <= -60",
        "rouge_l.difference.low > 0",
        "starter:rouge_l.value >= 99",
        "base:rouge_l.failed == 0",
        "starter:rouge_l.failed==0",
        "rouge_l.pairs != 11",
    ) == [True, False, True, True, False, True, False]


def test_the_value_is_told(comparison):
    (verdict,) = judge(comparison, [parse_rule("rouge_l.pairs >= 10")])
    assert (verdict.value, str(verdict.rule)) == (11, "rouge_l.pairs >= 10")


def test_an_unknown_metric_is_an_error_with_a_suggestion(comparison):
    with pytest.raises(RuleError, match=r"did you mean .*rouge_l\.difference"):
        judge(comparison, [parse_rule("rouge_L.diffrence > 0")])


def test_an_unavailable_metric_fails_its_rule(tmp_path):
    open_run(tmp_path, header("http://h", samples(2)), load_fixed_prompts().samples, samples(2))
    empty = compare(tmp_path, 100)
    assert passed(empty, "perplexity.change_percent <= 100", "perplexity.change_percent > -1000") == [False, False]


def test_every_number_has_one_name(comparison):
    names = [name for name, _ in values(comparison)]
    assert len(set(names)) == len(names) > 50


@pytest.mark.parametrize("text", ["rouge_l", "rouge_l > x", "> 3", "rouge_l => 3", "rouge_l > 1 2", "rouge_l > nan"])
def test_a_malformed_rule_is_an_error(text):
    with pytest.raises(RuleError, match="must look like"):
        parse_rule(text)


def test_rules_are_read_from_toml(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('rules = ["rouge_l.difference.low > 0", "bleu.change_percent >= 1e1"]\n')
    assert read_rules(path) == [Rule("rouge_l.difference.low", ">", 0), Rule("bleu.change_percent", ">=", 10)]


@pytest.mark.parametrize("content", ["rules = []", 'rule = ["a > 1"]', "rules = [", "rules = [3]"])
def test_a_malformed_rule_file_is_an_error(tmp_path, content):
    path = tmp_path / "rules.toml"
    path.write_text(content)
    with pytest.raises(RuleError, match=r"rules\.toml"):
        read_rules(path)
