from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser

import pytest

from evalharness.comparison import compare
from evalharness.records import open_run
from evalharness.report.forest import forest
from evalharness.report.write import html, markdown_report, write_report
from tests.evalharness.endpoint import ChatServer, header, run_once, samples, serve

ATTACK = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>```\n# Owned"
VOID = {"meta", "input", "img", "br", "link"}


class Page(HTMLParser):
    """Collects elements and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    server = ChatServer({"base": lambda prompt: ATTACK, "starter": lambda prompt: ATTACK + prompt}, {})
    server.chat_only = True
    server.failing.add(("base", "Question number 2?"))
    directory = tmp_path_factory.mktemp("hostile")
    with serve(server) as url:
        run_once(directory, url, samples(4))
    return compare(directory, 100)


def test_markup_in_a_reply_is_inert(hostile):
    page = Page(html(hostile))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "img" not in {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert any(ATTACK in text for text in page.texts)
    assert "out of &lt;luck&gt;" in html(hostile)


def test_the_policy_allows_only_the_script_that_is_there(hostile):
    text = html(hostile)
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for tag, a in Page(text).elements if tag == "meta" and "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_page_needs_no_other_file(hostile):
    for _, attributes in Page(html(hostile)).elements:
        assert not {"src", "href"} & set(attributes)


def test_markdown_keeps_replies_inside_their_fences(hostile):
    fence, inside = "", False
    for line in markdown_report(hostile).splitlines():
        if inside:
            inside = line != fence
        elif line.startswith("```"):
            fence, inside = line, True
        else:
            assert "Owned" not in line
            assert "<script>" not in line
    assert not inside


def test_the_report_says_why_perplexity_is_unavailable(hostile):
    assert "unavailable: /tokenize: HTTP 404" in html(hostile)


def test_all_three_reports_carry_the_numbers_and_where_they_are_from(finished_run):
    comparison = compare(finished_run, 200)
    paths = write_report(finished_run, comparison)
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for word in (comparison.header.url, comparison.header.data_sha256, "starter@1", "fp-starter", "tok:13a"):
            assert word in text, f"{path.name} lacks {word}"
    for path in paths[:2]:
        text = path.read_text(encoding="utf-8")
        assert "starter is better than base" in text
        assert "Explain quantum computing in simple terms." in text
        assert "7.39" in text


def test_the_json_has_every_metric_and_no_invented_number(tmp_path):
    open_run(tmp_path, header("http://h", samples(2)), (), samples(2))
    write_report(tmp_path, compare(tmp_path, 100))
    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert {metric["estimates"]["base"]["value"] for metric in document["metrics"]} == {None}
    assert document["verdicts"][0]["outcome"] == "unmeasured"


def test_every_state_of_a_sample_can_be_filtered(tmp_path):
    open_run(tmp_path, header("http://h", samples(1)), (), samples(1))
    elements = Page(html(compare(tmp_path, 100))).elements
    options = {attributes["value"] for tag, attributes in elements if tag == "option"}
    assert options == {"", "better", "worse", "equal", "unscored", "failed"}
    assert [a["data-state"] for tag, a in elements if tag == "tr" and "data-state" in a] == ["unscored"]


def test_the_provenance_says_which_revisions_were_served(tmp_path):
    served = {"base": "base (0123456789ab)", "starter": None}
    open_run(tmp_path, header("http://h", samples(2)).model_copy(update={"served": served}), (), samples(2))
    text = markdown_report(compare(tmp_path, 100))
    assert "| revision of base | base (0123456789ab) |" in text
    assert "| revision of starter | not told by the server |" in text


def test_one_arm_alone_is_reported_without_a_verdict(tmp_path):
    open_run(tmp_path, header("http://h", samples(2), ("base",)), (), samples(2))
    page = Page(html(compare(tmp_path, 100)))
    assert any("measured alone" in text for text in page.texts)


def test_llama_factorys_metrics_stand_in_a_table_of_their_own_and_decide_nothing(finished_run):
    plain, both = compare(finished_run, 100), compare(finished_run, 100, lf=True)
    assert "LLaMA-Factory" not in html(plain) + markdown_report(plain)
    title = "As LLaMA-Factory computes it; not comparable with the rest"
    for text in (html(both), markdown_report(both)):
        before, _, after = text.partition(title)
        assert "BLEU-4 (LF)" not in before
        assert "BLEU-4 (LF)" in after
    assert Page(html(both)).open == []
    assert both.own_metrics == plain.metrics
    assert [row.label for row in forest(both, "starter").rows] == [row.label for row in forest(plain, "starter").rows]
    found = {row.name: row.estimates["starter"].value for row in both.lf_metrics}
    assert found["lf_bleu_4"] == pytest.approx(100)
    assert found["lf_perplexity_row_mean"] > 1
