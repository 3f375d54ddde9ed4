"""Which layers are matched, and what is heard of them."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from potstill.compress.layer_losses import Heads
from potstill.compress.layers import Ears, Pair, blocks, check_plain_attention, layer_pairs, map_pairs, maps
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.encoder import ArrayEncoder
from potstill.validate.errors import InputError
from potstill.validate.task import LogitsOf, Model

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def transformer(kind: str, layers: int) -> Any:
    """A tiny one with random weights."""
    configs: dict[str, Any] = {
        "Bert": lambda: transformers.BertConfig(**TEXT, num_hidden_layers=layers),
        "Roberta": lambda: transformers.RobertaConfig(**TEXT, num_hidden_layers=layers),
        "DistilBert": lambda: transformers.DistilBertConfig(
            vocab_size=40, dim=16, n_heads=2, hidden_dim=24, n_layers=layers
        ),
        "ViT": lambda: transformers.ViTConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=layers, image_size=8,
            patch_size=4,
        ),
        "Wav2Vec2": lambda: transformers.Wav2Vec2Config(
            hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=layers, conv_dim=(4, 4),
            conv_kernel=(4, 4), conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embedding_groups=2,
            num_conv_pos_embeddings=4, classifier_proj_size=8,
        ),
        "Llama": lambda: transformers.LlamaConfig(**TEXT, num_hidden_layers=layers),
        "EuroBert": lambda: transformers.EuroBertConfig(**TEXT, pad_token_id=0, num_hidden_layers=layers),
        "ModernBert": lambda: transformers.ModernBertConfig(**TEXT, num_hidden_layers=layers, pad_token_id=0),
    }  # fmt: skip
    what = {"ViT": "ViTForImageClassification"}.get(kind, f"{kind}ForSequenceClassification")
    torch.manual_seed(0)
    return getattr(transformers, what)(configs[kind]()).eval()


INPUTS = {"ViT": torch.randn(2, 3, 8, 8), "Wav2Vec2": torch.randn(2, 64)}
STACKS = {
    "Bert": "bert.encoder.layer", "Roberta": "roberta.encoder.layer", "DistilBert": "distilbert.transformer.layer",
    "ViT": "vit.layers", "Wav2Vec2": "wav2vec2.encoder.layers",
}  # fmt: skip


@pytest.mark.parametrize("kind", STACKS)
def test_layers_are_found_and_heard_in_each_architecture(kind: str) -> None:
    core = transformer(kind, 3)
    names = list(blocks(core))
    assert names == [f"{STACKS[kind]}.{i}" for i in range(3)]
    inputs = INPUTS.get(kind, torch.randint(5, 40, (2, 7)))
    core(inputs, output_hidden_states=True)  # for which transformers sets hooks of its own, that stay
    before = hooks(core)
    ears = Ears(core, [(reads, name) for name in names for reads in ("hidden", "heads")])  # type: ignore[misc]
    assert hooks(core) == before + 3 + 9
    with torch.no_grad(), ears:
        outputs = core(inputs, output_hidden_states=True)
    heard = ears.states()
    for i, name in enumerate(names[:-1]):  # a last norm may follow the last layer
        assert torch.equal(heard["hidden", name], outputs.hidden_states[i + 1])  # type: ignore[arg-type]
    state = heard["heads", names[0]]
    assert isinstance(state, Heads)
    assert state.heads == 2
    assert state.query.shape == state.key.shape == state.value.shape == outputs.hidden_states[0].shape
    ears.close()
    assert hooks(core) == before


def hooks(core: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in core.modules())


def test_ears_keep_nothing_of_runs_outside() -> None:
    core = transformer("Bert", 1)
    ears = Ears(core, [("hidden", "bert.encoder.layer.0")])
    core(torch.tensor([[5, 6]]))
    assert not ears._kept
    with ears:
        core(torch.tensor([[5, 6]]))
    core(torch.tensor([[5, 6, 7]]))
    state = ears.states()["hidden", "bert.encoder.layer.0"]
    assert isinstance(state, torch.Tensor)
    assert state.shape == (1, 2, 16)
    assert not ears._kept


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        (3, 6, {0: 1, 1: 3, 2: 5}),
        (2, 12, {0: 5, 1: 11}),
        (4, 4, {0: 0, 1: 1, 2: 2, 3: 3}),
        (4, 6, {0: 1, 1: 2, 2: 4, 3: 5}),
        (6, 3, {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}),
        (1, 5, {0: 4}),
    ],
)
def test_layers_are_spread_evenly_and_the_last_matches_the_last(ours: int, theirs: int, wanted: dict[int, int]) -> None:
    found = layer_pairs(transformer("Bert", ours), transformer("Bert", theirs), None, False, "hidden")
    assert found == [Pair(f"bert.encoder.layer.{i}", f"bert.encoder.layer.{j}") for i, j in wanted.items()]


def test_the_last_alone_and_layers_that_are_given() -> None:
    student, teacher = transformer("DistilBert", 2), transformer("Bert", 4)
    last = Pair("distilbert.transformer.layer.1", "bert.encoder.layer.3")
    assert layer_pairs(student, teacher, None, True, "relations") == [last]
    given = layer_pairs(student, teacher, {0: 2, 1: 0}, True, "relations")
    assert [(pair.student[-1], pair.teacher[-1]) for pair in given] == [("0", "2"), ("1", "0")]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({2: 0}, "hidden.layers: the student has layers 0 to 1, and 2 was given"),
        ({0: 4}, "hidden.layers: the teacher has layers 0 to 3, and 4 was given"),
        ({-1: 0}, "the student has layers 0 to 1, and -1 was given"),
        ({0: "last"}, "the teacher has layers 0 to 3, and 'last' was given"),
        ({True: 0}, "the student has layers 0 to 1, and True was given"),
    ],
)
def test_layers_that_are_not_there(given: dict[Any, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        layer_pairs(transformer("Bert", 2), transformer("Bert", 4), given, False, "hidden")


def test_what_has_no_layers_heads_or_module_of_that_name() -> None:
    with pytest.raises(InputError, match="Linear has no stack of layers to match; .* features or attention_transfer"):
        blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="has no module 'layer1.9'; did you mean 'layer1.1'"):
        Ears(resnet(2), [("map", "layer1.9")])
    core = transformer("ModernBert", 2)  # query, key and value in one matrix
    with pytest.raises(InputError, match="has not one query, key and value layer .* match hidden states instead"):
        Ears(core, [("heads", next(iter(blocks(core))))])


@pytest.mark.parametrize("kind", ["Llama", "EuroBert"])
def test_attention_that_is_more_than_a_product_is_refused(kind: str) -> None:
    core = transformer(kind, 1)
    with pytest.raises(InputError, match="turns queries and keys by their place or hides later tokens; use relations"):
        check_plain_attention(core, next(iter(blocks(core))))
    plain = transformer("Bert", 1)
    check_plain_attention(plain, next(iter(blocks(plain))))


def resnet(blocks: int, width: int = 4) -> nn.Module:
    """One of the CIFAR-10 example's."""
    path = Path(__file__).parents[2] / "examples" / "cifar10" / "model.py"
    spec = importlib.util.spec_from_file_location("cifar10_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: nn.Module = module.ResNet(blocks, width)
    return made.eval()


def factory(core: nn.Module) -> Model:
    return Model(core, ArrayEncoder(), ("x",), tuple("0123456789"), Checkpoint("a.b:c"), core)


X = {"x": torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3)).astype(np.float32))}


def test_the_last_map_of_each_resolution_is_found() -> None:
    student, teacher = factory(resnet(1)), factory(resnet(2, 8))
    ours, theirs = maps(student, X), maps(teacher, X)
    assert {name: tuple(x.shape[1:]) for name, x in ours.items()} == {
        "layer1": (4, 32, 32), "layer2": (8, 16, 16), "layer3": (16, 8, 8),
    }  # fmt: skip
    assert {name: tuple(x.shape[1:]) for name, x in theirs.items()} == {
        "layer1": (8, 32, 32), "layer2": (16, 16, 16), "layer3": (32, 8, 8),
    }  # fmt: skip
    assert map_pairs(ours, theirs) == [Pair(name, name) for name in ("layer1", "layer2", "layer3")]
    assert hooks(student.core) == 0


def test_maps_of_a_transformers_network_match_a_resnet_of_ones_own() -> None:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10
    )
    core = transformers.ResNetForImageClassification(config).eval()
    model = Model(LogitsOf(core, ("pixel_values",)), ArrayEncoder(), ("pixel_values",), (), Checkpoint("r"), core)
    found = maps(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    sizes = [tuple(x.shape[1:]) for x in found.values()]
    assert sizes == [(4, 16, 16), (4, 8, 8), (8, 4, 4)]
    pairs = map_pairs(maps(factory(resnet(1)), X), found)
    assert [pair.student for pair in pairs] == ["layer2", "layer3"]
    assert [tuple(found[pair.teacher].shape[2:]) for pair in pairs] == [(16, 16), (8, 8)]


def test_where_no_resolution_is_the_same_the_smallest_maps_are_matched() -> None:
    ours, theirs = ({f"m{n}": torch.zeros(1, 1, n, n) for n in sizes} for sizes in ([12, 6], [32, 8]))
    assert map_pairs(ours, theirs) == [Pair("m6", "m8")]
