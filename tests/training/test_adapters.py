"""Adapters alone are trained, resume exactly, and leave a model that needs none."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from pydantic import ValidationError
from safetensors import safe_open
from sentence_transformers import SentenceTransformer

from bixse.models.encoder import load_model
from bixse.models.reranker import load_reranker
from bixse.training.adapters import adapt, refuse_missing
from bixse.training.gather import World
from bixse.training.objective_settings import LCE
from bixse.training.settings import LoRA, Training
from tests.encoders import save_tiny_decoder, save_tiny_encoder, texts
from tests.training import ranks
from tests.training.rank_process import Ranks

RERANKER: dict[str, Any] = {"objective": LCE(), "docs_per_query": 4}


def start(kind: str, directory: Path) -> Path:
    if kind == "decoder":
        return save_tiny_decoder(directory, "left")
    return save_tiny_encoder(directory)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "reranker"])
def test_only_adapters_and_a_head_are_trained(kind: str, tmp_path: Path) -> None:
    directory = str(start(kind, tmp_path))
    names = ("k_proj", "v_proj") if kind == "decoder" else ("query", "value")
    changes = RERANKER if kind == "reranker" else {}
    lora = LoRA(rank=2, target_modules=names)
    found = ranks.loop(World(), tmp_path, lora=lora, max_steps=6, **changes)
    load = load_reranker if kind == "reranker" else load_model
    before = dict(load(directory, "cpu").named_parameters())
    assert before.keys() == found.keys() - {"curve", "dev"}
    moved = {name for name, value in before.items() if not torch.equal(found[name], value)}
    ends = tuple(f"{name}.weight" for name in names)
    adapted = {name for name in moved if name.endswith(ends)}
    assert len(adapted) == 4
    for name in adapted:
        change = found[name] - before[name].detach()
        assert torch.linalg.matrix_rank(change, rtol=1e-4) in (1, 2), name
    heads = {name.rsplit(".", 2)[-2] for name in moved - adapted}
    assert heads == ({"linear"} if kind == "reranker" else set())


@pytest.mark.parametrize("kind", ["encoder", "reranker"])
def test_resumed_equals_uninterrupted_bit_by_bit(kind: str, tmp_path: Path) -> None:
    changes = {**(RERANKER if kind == "reranker" else {}), "lora": LoRA(rank=4), "max_steps": 7}
    for name in ("whole", "resumed"):
        start(kind, tmp_path / name)
    whole = ranks.loop(World(), tmp_path / "whole", **changes)
    (tmp_path / "resumed" / "stop").write_text("6")
    with pytest.raises(KeyboardInterrupt):
        ranks.loop(World(), tmp_path / "resumed", **changes)
    (tmp_path / "resumed" / "stop").unlink()
    (saved,) = (tmp_path / "resumed" / "checkpoints").glob("step-00000004-*")
    with safe_open(saved, "pt") as file:
        kept = [key for key in file.keys() if key.startswith("model.")]  # noqa: SIM118
    heads = ("2.linear",) if kind == "reranker" else ("model.bias",)
    assert any("lora" in key for key in kept)
    assert all("lora" in key or any(head in key for head in heads) for key in kept)
    resumed = ranks.loop(World(), tmp_path / "resumed", **changes)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.slow
def test_resumed_on_two_ranks_equals_uninterrupted_to_rounding(
    tmp_path: Path, run_ranks: Ranks
) -> None:
    for name in ("whole", "resumed"):
        save_tiny_encoder(tmp_path / name)
    whole = ranks.adapters(World(), tmp_path / "whole")
    (tmp_path / "resumed" / "stop").write_text("7")
    with pytest.raises(KeyboardInterrupt):
        ranks.adapters(World(), tmp_path / "resumed")
    (tmp_path / "resumed" / "stop").unlink()
    resumed = run_ranks("adapters", 2, tmp_path / "resumed")
    # A softmax does not see it (test_reranker).
    for name in whole.keys() - {"2.linear.bias"}:
        torch.testing.assert_close(resumed[name], whole[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_merged_equals_unmerged_and_is_a_plain_directory(kind: str, tmp_path: Path) -> None:
    model, read = load_model(str(start(kind, tmp_path)), "cpu").eval(), texts(30, seed=1)
    names = dict(model.named_parameters()).keys()
    plain = model.encode_query(read, convert_to_tensor=True)
    merge = adapt(model, LoRA(rank=4), seed=0)
    torch.testing.assert_close(model.encode_query(read, convert_to_tensor=True), plain)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    unmerged = model.encode_query(read, convert_to_tensor=True)
    assert (unmerged * plain).sum(dim=1).max() < 0.999
    merge()
    assert dict(model.named_parameters()).keys() == names
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    assert not list((tmp_path / "saved").rglob("adapter*"))
    merged = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found = merged.encode_query(read, convert_to_tensor=True)
    torch.testing.assert_close(found, unmerged, atol=1e-5, rtol=0)


def test_what_is_merged_is_the_product_times_its_scaling(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path)), "cpu")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    merge = adapt(model, LoRA(rank=4, scaling=3.0), seed=0)
    torch.manual_seed(1)
    wanted, halves = dict(before), dict(model.named_parameters())
    for name, a in halves.items():
        if "lora_A" in name:
            b = torch.nn.init.normal_(halves[name.replace("lora_A", "lora_B")])
            layer = name.replace("lora_A.default.", "")
            wanted[layer] = before[layer] + 3 * (b @ a).detach()
    merge()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), wanted[name], atol=1e-5, rtol=1e-5, msg=name)
    assert sum(not torch.equal(wanted[name], before[name]) for name in before) > 4


def test_adapters_begin_alike_at_the_same_seed(tmp_path: Path) -> None:
    directory, drawn = str(save_tiny_encoder(tmp_path)), []
    for seed in (0, 0, 1):
        model = load_model(directory, "cpu")
        adapt(model, LoRA(rank=4), seed)
        drawn.append(next(p for name, p in model.named_parameters() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_adapters_of_rounded_weights_are_not_rounded(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path)), "cpu").bfloat16()
    merge = adapt(model, LoRA(rank=4), 0)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert torch.isfinite(model.encode_query(texts(3, seed=1), convert_to_tensor=True)).all()
    merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_adapters_learn_over_float16_whose_products_are_bfloat16(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path)), "cpu").half()
    merge = adapt(model, LoRA(rank=4), 0)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(model.preprocess(texts(3, seed=1)))["sentence_embedding"]
    made.sum().backward()
    assert torch.isfinite(made).all()
    merge()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_adapters_cannot_stand_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path)), "cpu")
    with pytest.raises(ValueError, match=r"'?no linear layer is called q_proj; this model has qu"):
        adapt(model, LoRA(rank=4, target_modules=("query", "q_proj")), 0)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Training(lora=LoRA(rank=0))
    with pytest.raises(ValidationError, match=r"set training\.lora\.rank"):
        LoRA(target_modules=("query",))
    monkeypatch.setitem(sys.modules, "peft", None)
    refuse_missing(LoRA())
    with pytest.raises(ValueError, match="needs a package: pip install peft"):
        adapt(model, LoRA(rank=4), 0)


@pytest.mark.parametrize("changes", [{}, {"lora": LoRA(rank=2)}])
def test_a_start_that_is_adapters_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(str(save_tiny_encoder(tmp_path / "base")), "cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"]))
    model.save_pretrained(str(tmp_path / "encoder"), create_model_card=False)
    assert (tmp_path / "encoder" / "adapter_config.json").exists()
    with pytest.raises(ValueError, match=r"holds adapters over another model: merge them"):
        ranks.loop(World(), tmp_path, **changes)
