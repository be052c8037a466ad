"""Prepacked layers multiply as those that they stand for."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel, T5Config, T5EncoderModel

from bixse.models.prepacking import PrepackedLinear, prepack, prepacks

pytestmark = pytest.mark.skipif(not prepacks(), reason="oneDNN has no bfloat16 here")


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    cosine = torch.nn.functional.cosine_similarity(found.float(), wanted.float(), dim=-1)
    return float(cosine.min()) > 0.999


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_the_product_is_that_of_linear(bias: bool, turned: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 80, bias).bfloat16()
    if turned:
        linear.weight.data = linear.weight.data.t().contiguous().t()
    packed = copy.deepcopy(PrepackedLinear(linear))
    with torch.inference_mode():
        for shape in ((1, 48), (7, 48), (3, 5, 48), (0, 48)):
            read = torch.randn(shape)
            found, wanted = packed(read), linear(read.bfloat16())
            assert found.dtype == torch.bfloat16
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def bert(activation: str) -> BertModel:
    torch.manual_seed(0)
    # Weights so large that each layer shows in what comes out.
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, hidden_act=activation, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config)


def t5() -> T5EncoderModel:
    """Asks a layer for the type of its weight."""
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_ff=64, d_kv=16, num_layers=2))


@pytest.mark.parametrize(
    ("plain", "layers", "gelus"),
    [(bert("gelu"), 13, 2), (bert("gelu_new"), 13, 0), (bert("relu"), 13, 0), (t5(), 12, 0)],
    ids=["bert", "gelu_new", "relu", "t5"],
)
def test_a_transformer_gives_what_it_gave(plain: PreTrainedModel, layers: int, gelus: int) -> None:
    plain = plain.bfloat16().eval()
    packed = copy.deepcopy(plain)
    prepack(packed)
    found = [one for one in packed.modules() if isinstance(one, PrepackedLinear)]
    assert len(found) == layers
    assert sum(one.activation == "gelu" for one in found) == gelus
    ids = torch.randint(50, (3, 9))
    with torch.inference_mode():
        wanted = plain(input_ids=ids).last_hidden_state
        assert near(packed(input_ids=ids).last_hidden_state, wanted)
        assert near(copy.deepcopy(packed)(input_ids=ids).last_hidden_state, wanted)


def test_other_layers_are_left_alone() -> None:
    class Scaled(torch.nn.Linear):
        pass

    model = bert("gelu").bfloat16()
    model.encoder.layer[0].output.dense = Scaled(64, 32, dtype=torch.bfloat16)
    model.encoder.layer[1].float()
    outside = torch.nn.Sequential(model, torch.nn.Linear(32, 8, dtype=torch.bfloat16))
    prepack(outside)
    assert isinstance(model.encoder.layer[0].output.dense, Scaled)
    assert isinstance(model.encoder.layer[0].attention.output.dense, PrepackedLinear)
    assert not any(isinstance(one, PrepackedLinear) for one in model.encoder.layer[1].modules())
    assert type(outside[1]) is torch.nn.Linear
