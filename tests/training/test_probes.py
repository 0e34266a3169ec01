"""The probes are what the trained model answers, rendered as served, and show an adapter that is loaded wrongly."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_tiny_adapter
from training import attention
from training.artifact import PROBES_NAME, ArtifactError, read_manifest, read_probes
from training.chat import Message, end_of_turn_id, render_prompt
from training.model import load_base
from training.probes import add_plain_scores, plain_scores, probe_error, write_probes
from training.readable import Whole


@pytest.fixture
def model(tiny_base: Path, tiny_adapters: dict[str, Path]):
    attention.register()
    base = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation=attention.NAME)
    return peft.PeftModel.from_pretrained(base, str(tiny_adapters["starter"]))


def scaled(model, factor: float):
    changed = copy.deepcopy(model)
    for module in changed.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= factor
    return changed


def test_an_adapter_carries_its_probes_and_the_manifest_their_hash(tiny_adapters):
    probes = read_probes(tiny_adapters["starter"])
    assert (probes.compute, probes.dtype) == ("plain", "float32")
    assert 4 <= len(probes.probes) <= 8
    assert PROBES_NAME in read_manifest(tiny_adapters["starter"]).files


def test_replies_are_scored_as_peft_alone_scores_each(tiny_base, tiny_adapters):
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    adapted = peft.PeftModel.from_pretrained(base, str(tiny_adapters["starter"])).eval()
    for probe in read_probes(tiny_adapters["starter"]).probes:
        ids = torch.tensor([probe.ids])
        with torch.no_grad():
            on = adapted(ids).logits[0].log_softmax(-1)
            with adapted.disable_adapter():
                off = adapted(ids).logits[0].log_softmax(-1)
        for recorded, found in ((probe.adapter_logprobs, on), (probe.base_logprobs, off)):
            wanted = found[probe.start - 1 : -1].gather(1, ids[0, probe.start :, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(recorded), wanted, atol=2e-5, rtol=1e-5)
        assert probe.adapter_logprobs != probe.base_logprobs


@pytest.mark.parametrize(("mode", "said"), [("model", "You are a helpful assistant."), ("qwen", "You are Qwen.")])
def test_a_probe_is_a_served_prompt_and_a_finished_reply(tiny_base, tmp_path, mode, said):
    adapter = make_tiny_adapter(tiny_base, tmp_path / "a", "a", 1, mode=mode, system_prompt="You are Qwen.")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    system = [Message("system", "You are Qwen.")] if mode == "qwen" else []
    for probe in read_probes(adapter).probes:
        text = tokenizer.decode(probe.ids[: probe.start])
        question = text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        assert probe.ids[: probe.start] == render_prompt(tokenizer, [*system, Message("user", question)])
        assert said in text
        assert probe.ids[-1] == end_of_turn_id(tokenizer)


def test_the_same_model_writes_the_same_bytes_and_stays_in_training(model, tiny_base, tiny_adapters, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model.train()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_probes(tmp_path / name, model, tokenizer, None)
    assert model.training
    written = [(tmp_path / name / PROBES_NAME).read_bytes() for name in ("one", "two")]
    assert written[0] == written[1]


def test_the_right_adapter_has_no_error_and_a_wrong_one_more_than_is_allowed(model, tiny_adapters):
    probes = read_probes(tiny_adapters["starter"])
    right = probe_error(Whole(model), probes)
    assert right.error_nats < 1e-5 < right.effect_nats
    for factor in (0.5, 0.75, 1.25, 2.0):
        wrong = probe_error(Whole(scaled(model, factor)), probes)
        assert wrong.error_nats > wrong.allowed_nats
        assert wrong.effect_nats == right.effect_nats
    assert probe_error(Whole(scaled(model, 0.0)), probes).error_nats == pytest.approx(right.effect_nats, abs=1e-4)


def test_an_adapter_from_before_there_were_probes_has_none(tiny_adapters, tmp_path):
    old = shutil.copytree(tiny_adapters["starter"], tmp_path / "old")
    (old / PROBES_NAME).unlink()
    assert read_probes(old) is None


@pytest.fixture
def on_nf4(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter whose probes were recorded on the NF4 base, with their scores on the plain one."""
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "nf4")
    base = load_base(tiny_base, "nf4", torch.float32, torch.device("cpu"))
    model = peft.PeftModel.from_pretrained(base, str(adapter))
    write_probes(adapter, model, AutoTokenizer.from_pretrained(tiny_base), None)
    scores = plain_scores(adapter, tiny_base, torch.device("cpu"))
    assert scores is not None
    add_plain_scores(adapter, scores)
    return adapter


def test_scores_on_the_plain_base_are_those_of_a_training_on_it(on_nf4, tiny_adapters, tiny_base):
    recorded, trained = read_probes(on_nf4), read_probes(tiny_adapters["starter"])
    assert (recorded.compute, recorded.dtype) == ("nf4", "float32")
    assert recorded.probes != trained.probes
    assert recorded.on_plain_base() == trained
    assert trained.on_plain_base() == trained
    assert plain_scores(tiny_adapters["starter"], tiny_base, torch.device("cpu")) is None


def test_the_nearest_reference_is_of_the_base_that_is_served(on_nf4):
    probes = read_probes(on_nf4)
    assert probes.nearest("nf4") == probes
    assert probes.nearest("plain") == probes.nearest("int8") == probes.on_plain_base()
    older = probes.model_copy(update={"plain": None})
    assert older.on_plain_base() is None
    assert older.nearest("plain") == older


def test_half_the_scale_is_told_apart_on_the_plain_base(on_nf4, model):
    probes = read_probes(on_nf4).on_plain_base()
    assert probe_error(Whole(model), probes).error_nats < 1e-5
    for factor in (0.5, 0.97, 1.03, 2.0):
        assert probe_error(Whole(scaled(model, factor)), probes).error_nats > 1e-3


def test_scores_of_other_lengths_are_refused(on_nf4):
    path = on_nf4 / PROBES_NAME
    document = json.loads(path.read_text())
    document["plain"]["adapter_logprobs"][1].pop()
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"probes\.json: .*plain: .* log-probabilities, not"):
        read_probes(on_nf4)
