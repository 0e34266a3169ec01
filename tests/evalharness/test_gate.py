from __future__ import annotations

import pytest

from evalharness.comparison import Comparison, compare
from evalharness.errors import RuleError
from evalharness.gate import Rule, Verdict, judge, parse_rule, read_rules, values
from evalharness.records import RECORDS_NAME, open_run
from evalharness.samples import load_fixed_prompts
from tests.evalharness.endpoint import better_adapter, header, run_once, samples, serve


@pytest.fixture(scope="module")
def comparison(finished_run) -> Comparison:
    return compare(finished_run, 200)


def passed(comparison: Comparison, *texts: str) -> list[bool]:
    return [verdict.passed for verdict in asked(comparison, *texts)]


def asked(comparison: Comparison, *texts: str) -> list[Verdict]:
    return [verdict for verdict in judge(comparison, [parse_rule(text) for text in texts]) if not verdict.implied]


def implied(comparison: Comparison, *texts: str, allow_failed: float = 0.0) -> dict[str, bool]:
    found = judge(comparison, [parse_rule(text) for text in texts], allow_failed)
    return {str(verdict.rule): verdict.passed for verdict in found if verdict.implied}


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
    (verdict,) = asked(comparison, "rouge_l.pairs >= 10")
    assert (verdict.value, str(verdict.rule)) == (11, "rouge_l.pairs >= 10")


def test_an_unknown_metric_is_an_error_with_a_suggestion(comparison):
    with pytest.raises(RuleError, match=r"did you mean .*rouge_l\.difference"):
        judge(comparison, [parse_rule("rouge_L.diffrence > 0")])


ONE_REVISION = {"base:mixed_revisions == 0": True, "starter:mixed_revisions == 0": True}


def test_an_incomplete_metric_fails_whichever_arm_its_rule_names(comparison):
    assert implied(comparison, "starter:rouge_l.value >= 99") == {
        "base:rouge_l.failed == 0": False,
        "starter:rouge_l.failed == 0": True,
        **ONE_REVISION,
    }
    assert implied(comparison, "perplexity.change_percent <= -15") == {
        "base:perplexity.failed == 0": True,
        "starter:perplexity.failed == 0": True,
        **ONE_REVISION,
    }


@pytest.mark.parametrize(("share", "most", "passes"), [(0.1, 1, True), (0.08, 0, False)])
def test_a_share_of_failed_samples_can_be_allowed(comparison, share, most, passes):
    found = implied(comparison, "rouge_l.difference > 0", allow_failed=share)
    assert found[f"base:rouge_l.failed <= {most}"] == passes
    assert found[f"starter:rouge_l.failed <= {most}"]


def test_a_rule_of_ones_own_replaces_the_implied_one(comparison):
    names = implied(comparison, "rouge_l.difference > 0", "base:rouge_l.failed <= 1")
    assert not [name for name in names if name.startswith("base:rouge_l.failed")]
    assert "starter:rouge_l.failed == 0" in names


def test_samples_that_were_not_asked_yet_count_as_failed(finished_run, tmp_path):
    for path in finished_run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (finished_run / RECORDS_NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / RECORDS_NAME).write_bytes(b"".join(lines[:-4]))
    found = implied(compare(tmp_path, 100), "perplexity.change_percent <= -15")
    assert not all(found.values())


def test_replies_of_two_revisions_fail_every_gate(tmp_path):
    server = better_adapter()
    server.failing.add(("base", "Question number 1?"))
    with serve(server) as url:
        run_once(tmp_path, url, samples(3))
        server.failing.clear()
        server.revision = "2"
        run_once(tmp_path, url, samples(3))
    found = implied(compare(tmp_path, 100), "rouge_l.difference > 0")
    assert [rule for rule, holds in found.items() if not holds] == ["base:mixed_revisions == 0"]


def test_a_rule_may_leave_out_an_arms_digest(tmp_path):
    server, arms = better_adapter(), ("base", "starter@0123456789ab")
    server.models[arms[1]] = {"revision": arms[1]}
    with serve(server) as url:
        run_once(tmp_path, url, samples(3), arms)
    found = compare(tmp_path, 100)
    assert passed(found, "starter:rouge_l.value >= 99", "starter@0123456789ab:rouge_l.value >= 99") == [True, True]
    assert "starter:rouge_l.failed == 0" in implied(found, "rouge_l.difference.low > 0")
    with pytest.raises(RuleError, match=r"did you mean starter@0123456789ab:rouge_l\.value"):
        passed(found, "starter:rouge_l.valu > 0")


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
