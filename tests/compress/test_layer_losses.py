"""Each loss on layers against its paper's formula in float64, and the states that it reads against the real model's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from potstill.compress import layer_losses
from potstill.compress.layer_losses import LAYERS, Heads
from potstill.compress.layers import Ears, blocks

Array = NDArray[Any]
RNG = np.random.default_rng(0)
B, T, D = 3, 5, 12
REAL = np.array([5, 3, 1])  # tokens of each example; the others are padding
MASK = (np.arange(T) < REAL[:, None]).astype(np.int64)


def states(width: int = D) -> Array:
    return RNG.normal(0, 2, (B, T, width))


def heads(width: int, count: int) -> tuple[tuple[Array, Array, Array], Heads]:
    """Query, key and value in float64, and as a loss reads them."""
    made = states(width), states(width), states(width)
    return made, Heads(*(torch.from_numpy(x).float() for x in made), count)


def of(array: Array) -> torch.Tensor:
    return torch.from_numpy(array).float()


def relation(ours: tuple[Array, Array], theirs: tuple[Array, Array], heads: tuple[int, int]) -> float:
    """The KL between attention-like distributions, one example, head and query at a time (Wang 2020, equation 7)."""
    divergences = []
    for b, real in enumerate(REAL):
        for query in range(real):
            each = []
            for h in range(heads[0]):
                found = []
                for (left, right), count in ((ours, heads[0]), (theirs, heads[1])):
                    size = left.shape[2] // count
                    part = slice(h * size, (h + 1) * size)
                    found.append(softmax(right[b, :real, part] @ left[b, query, part] / np.sqrt(size)))
                q, p = found
                each.append((p * np.log(p / q)).sum())
            divergences.append(np.mean(each))
    return float(np.mean(divergences))


def test_hidden_is_tinyberts() -> None:
    a, b = states(), states()
    wanted = np.mean([((a[i, t] - b[i, t]) ** 2).mean() for i in range(B) for t in range(REAL[i])])
    assert layer_losses.hidden(of(a), of(b), torch.from_numpy(MASK)).item() == pytest.approx(wanted, rel=1e-5)


def test_pkd_is_suns() -> None:
    a, b = states()[:, 0], states()[:, 0]
    a_one, b_one = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    wanted = np.mean(np.linalg.norm(a_one - b_one, axis=1) ** 2)
    found = layer_losses.pkd(of(a)[:, None], of(b)[:, None], torch.ones(B, 1))
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_attention_is_minilms() -> None:
    (q, k, _), ours = heads(8, 4)
    (tq, tk, _), theirs = heads(D, 4)
    wanted = relation((q, k), (tq, tk), (4, 4))
    assert layer_losses.attention(ours, theirs, torch.from_numpy(MASK)).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("setting", "count"), [({}, 3), ({"heads": 2}, 2)])
def test_relations_are_minilmv2s(setting: dict[str, int], count: int) -> None:
    ours_raw, ours = heads(6, 2)
    theirs_raw, theirs = heads(D, 3)
    each = [relation((a, a), (b, b), (count, count)) for a, b in zip(ours_raw, theirs_raw, strict=True)]
    mask = torch.from_numpy(MASK)
    assert layer_losses.relations(ours, theirs, mask, **setting).item() == pytest.approx(np.mean(each), rel=1e-4)
    assert layer_losses.values(ours, theirs, mask, **setting).item() == pytest.approx(each[2], rel=1e-4)


def test_features_are_fitnets() -> None:
    a, b = RNG.normal(size=(2, B, 4, 6, 6))
    assert layer_losses.features(of(a), of(b)).item() == pytest.approx(0.5 * ((a - b) ** 2).mean(), rel=1e-5)


def test_attention_transfer_is_zagoruykos_and_takes_other_channels() -> None:
    a, b = RNG.normal(size=(B, 4, 6, 6)), RNG.normal(size=(B, 9, 6, 6))
    each = []
    for x, y in zip(a, b, strict=True):
        ours, theirs = ((z**2).sum(axis=0).ravel() for z in (x, y))
        each.append(np.linalg.norm(ours / np.linalg.norm(ours) - theirs / np.linalg.norm(theirs)))
    assert layer_losses.attention_transfer(of(a), of(b)).item() == pytest.approx(np.mean(each) / 2, rel=1e-5)


def test_a_larger_map_is_averaged_to_the_teachers_grid_and_a_smaller_one_interpolated() -> None:
    small, large = RNG.normal(size=(B, 2, 3, 3)), RNG.normal(size=(B, 2, 6, 6))
    pooled = large.reshape(B, 2, 3, 2, 3, 2).mean(axis=(3, 5))
    assert layer_losses.features(of(large), of(small)).item() == pytest.approx(((pooled - small) ** 2).mean() / 2)
    flat = np.full((B, 2, 3, 3), 0.5)
    assert layer_losses.features(of(flat), of(large)).item() == pytest.approx(((0.5 - large) ** 2).mean() / 2)


def random_state(name: str) -> tuple[list[torch.Tensor], Any]:
    """Leaf tensors of a student's or teacher's state, and the state."""
    count = 3 if LAYERS[name].reads == "heads" else 1
    leaves = [of(states()) for _ in range(count)]
    return leaves, Heads(leaves[0], leaves[1], leaves[2], 3) if count == 3 else leaves[0]


TOKENS = [name for name, loss in LAYERS.items() if loss.reads != "map"]


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("huge", [1e4, -1e15])
def test_padding_is_left_out_exactly(name: str, huge: float) -> None:
    (ours, state), (theirs, teacher) = random_state(name), random_state(name)
    results = []
    for garbage in (0.0, huge):
        for leaf in (*ours, *theirs):
            leaf[MASK == 0] = garbage
        for leaf in ours:
            leaf.grad = None
            leaf.requires_grad_()
        loss = LAYERS[name].function(state, teacher, torch.from_numpy(MASK))
        loss.backward()
        results.append([loss.detach(), *(leaf.grad.clone() for leaf in ours if leaf.grad is not None)])
        for leaf in ours:
            leaf.requires_grad_(False)
    assert len(results[0]) > 1
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
    for gradient in results[1][1:]:
        assert not gradient[MASK == 0].any()


@pytest.mark.parametrize("name", TOKENS)
def test_padding_to_a_longer_batch_changes_nothing(name: str) -> None:
    (_, ours), (_, theirs) = random_state(name), random_state(name)

    def longer(state: Any) -> Any:
        pad = torch.nn.functional.pad
        if isinstance(state, Heads):
            return Heads(*(pad(x, (0, 0, 0, 4), value=7.0) for x in (state.query, state.key, state.value)), state.heads)
        return pad(state, (0, 0, 0, 4), value=7.0)

    mask = torch.from_numpy(MASK)
    short = LAYERS[name].function(ours, theirs, mask)
    padded = LAYERS[name].function(longer(ours), longer(theirs), torch.nn.functional.pad(mask, (0, 4)))
    assert padded.item() == pytest.approx(short.item(), rel=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_a_student_that_is_the_same_has_nothing_to_learn(name: str) -> None:
    state = of(RNG.normal(size=(B, 4, 6, 6))) if LAYERS[name].reads == "map" else random_state(name)[1]
    assert LAYERS[name].function(state, state, torch.from_numpy(MASK)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_losses_are_computed_in_float32_whatever_comes_in(name: str) -> None:
    if LAYERS[name].reads == "map":
        ours, theirs = (of(RNG.normal(size=(B, 4, 6, 6))).bfloat16() for _ in range(2))
    else:
        (a, ours), (b, theirs) = random_state(name), random_state(name)
        for leaf in (*a, *b):
            leaf.data = leaf.data.bfloat16()
    loss = LAYERS[name].function(ours, theirs, torch.from_numpy(MASK))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_attention_from_queries_and_keys_is_the_models_own(text_teacher: Path) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    core = BertForSequenceClassification.from_pretrained(text_teacher, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(text_teacher)
    encoded = tokenizer(
        ["the film is very good", "bad", "a plot with some awful scenes and"], padding=True, return_tensors="pt"
    )
    names = list(blocks(core))
    ears = Ears(core, [("heads", name) for name in names])
    with torch.no_grad(), ears:
        theirs = core(**encoded, output_attentions=True).attentions
    heard, mask = ears.states(), encoded["attention_mask"]
    assert len(theirs) == len(names) == 4
    for name, attention in zip(names, theirs, strict=True):
        state = heard["heads", name]
        assert isinstance(state, Heads)
        ours = layer_losses._scores(state.query, state.key, mask, state.heads).exp()
        real = mask.bool()
        assert ours.shape == attention.shape == (3, 4, *mask.shape[1:], *mask.shape[1:])
        assert torch.allclose(ours.transpose(1, 2)[real], attention.transpose(1, 2)[real], atol=1e-6)
