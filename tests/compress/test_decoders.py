"""Decoders as teachers of narrower ones: grouped heads, gated feed-forwards, fused weights."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from potstill.compress.anatomy import along, groups_of, sizes_of, spaces_of
from potstill.compress.importance import block_influence, taylor_importance
from potstill.compress.student import Student
from potstill.validate.checkpoint import Checkpoint
from potstill.validate.errors import InputError
from potstill.validate.examples import Examples
from potstill.validate.task import TASKS, Model

TASK, CPU = TASKS["text-generation"], torch.device("cpu")
SIZES = {
    "vocab_size": 15, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "llama tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, head_dim=12),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**{**GROUPED, "num_key_value_heads": 1}, head_dim=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, query_pre_attn_scalar=8),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=15, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def decoder(kind: str) -> Any:
    """A small untrained one, whose biases and norms matter too."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model.eval()


def teacher_of(core: Any, story_teacher: Path, folder: Path) -> Model:
    """The model with the stories' tokenizer, as it is read from a folder."""
    core.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(story_teacher).save_pretrained(folder)
    return TASK.load(Checkpoint(str(folder)))


def train_of(teacher: Model, story_files: dict[str, Path]) -> Examples:
    return TASK.checked(TASK.examples(str(story_files["train"]), {}), (), encode=teacher.encode).take(range(24), "few")


def logits(core: Any) -> Tensor:
    return logits_of(core, torch.randint(3, 15, (2, 9), generator=torch.Generator().manual_seed(0)))


def logits_of(core: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = core(input_ids=ids).logits
    return found


def shuffle(core: Any) -> None:
    """Permute each space of a model: hidden dimensions, groups of heads with their keys, neurons."""
    sizes, groups, orders = sizes_of(core), groups_of(core.config), dict[str, Tensor]()
    weights = dict(core.named_parameters())
    for name, dimensions in spaces_of(core).items():
        for dim, dimension in enumerate(dimensions if name in weights else ()):
            order = []
            for space, place in along(dimension, weights[name].shape[dim], sizes):
                kind, _, layer = space.partition(".")
                if kind in ("heads", "keys"):
                    of_groups = orders.setdefault(f"groups.{layer}", torch.randperm(groups))
                    unit = sizes[space] // groups
                    found = (of_groups[:, None] * unit + torch.arange(unit)).flatten()
                else:
                    size = sizes[space]
                    same = torch.arange(size) if kind == "vocabulary" else torch.randperm(size)
                    found = orders.setdefault(space, same)
                order.append(place.start + found)
            if order:
                weights[name].data = weights[name].data.index_select(dim, torch.cat(order))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_dimension_is_in_its_space(kind: str) -> None:
    """A permutation of every space, through all the weights that it runs through, leaves the function as it was."""
    core = decoder(kind)
    before, first = logits(core), next(core.parameters()).clone()
    shuffle(core)
    assert not torch.equal(next(core.parameters()), first)
    torch.testing.assert_close(logits(core), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [{}, {"hidden": 16}])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cut_vocabulary_leaves_rows_of_the_embedding_and_of_the_head(
    kind: str, width: dict[str, int], story_teacher: Path, tmp_path: Path
) -> None:
    """Beside a student cut alike whose vocabulary is whole."""
    (tmp_path / "few.jsonl").write_text('{"text": "tom sees the dog ."}\n' * 3)
    teacher = teacher_of(decoder(kind), story_teacher, tmp_path / "t")
    few = TASK.checked(TASK.examples(str(tmp_path / "few.jsonl"), {}), (), encode=teacher.encode)
    whole = Student(layers=2, **width)(teacher, TASK, {}, 0, few)  # type: ignore[arg-type]
    cut = Student(layers=2, vocabulary="used", **width)(teacher, TASK, {}, 0, few)  # type: ignore[arg-type]
    tokenizers = [one.encode.tokenizer for one in (whole, cut)]  # type: ignore[attr-defined]
    left: Any = cut.core.config
    kept = tokenizers[0].convert_tokens_to_ids(tokenizers[1].convert_ids_to_tokens([*range(left.vocab_size)]))
    assert len(kept) < 12
    ids = [tokenizer("tom sees the dog .", return_tensors="pt")["input_ids"] for tokenizer in tokenizers]
    torch.testing.assert_close(logits_of(cut.core, ids[1]), logits_of(whole.core, ids[0])[..., kept])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cut_to_the_full_width_changes_nothing(
    kind: str, story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    teacher = teacher_of(decoder(kind), story_teacher, tmp_path)
    student = Student(hidden=32, neurons=128 if kind == "gpt2" else 48)(
        teacher, TASK, {}, 0, train_of(teacher, story_files)
    )
    assert torch.equal(logits(student.core), logits(teacher.core))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cut_opens_with_transformers(
    kind: str, story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    teacher = teacher_of(decoder(kind), story_teacher, tmp_path / "teacher")
    size = 16 if kind != "mistral" else 24
    student = Student(layers=1, hidden=size, neurons=20)(teacher, TASK, {}, 0, train_of(teacher, story_files))
    student.save(tmp_path / "student")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(logits(opened), logits(student.core), rtol=1e-5, atol=1e-6)
    again = TASK.load(Checkpoint(str(tmp_path / "student")), like=teacher)
    assert again.parameters == student.parameters < teacher.parameters / 2


def test_block_influence_is_of_each_text_by_itself(story_teacher: Path, story_files: dict[str, Path]) -> None:
    teacher = TASK.load(Checkpoint(str(story_teacher)))
    examples, core, turned, tokens = train_of(teacher, story_files), teacher.core, np.zeros(4), 0
    found = block_influence(teacher, examples, 0)
    heard: list[Tensor] = []
    for layer in layers_of(core):
        layer.register_forward_hook(
            lambda _m, inputs, output: heard.append(torch.cosine_similarity(inputs[0], output, -1))
        )
    for text in examples.rows(range(len(examples)))["tokens"]:
        heard.clear()
        logits_of(core, torch.tensor([text]))
        turned += [float((1 - cosine[0, :-1]).sum()) for cosine in heard]
        tokens += len(text) - 1
    assert np.allclose(found, turned / tokens, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_weights_of_low_rank(kind: str, story_teacher: Path, tmp_path: Path) -> None:
    teacher = teacher_of(decoder(kind), story_teacher, tmp_path / "teacher")
    student = Student(rank=0.25)(teacher, TASK, {}, 0)
    assert student.parameters < 0.6 * teacher.parameters
    student.save(tmp_path / "student")
    again = TASK.load(Checkpoint(str(tmp_path / "student")), like=teacher)
    assert torch.equal(logits(again.core), logits(student.core))


def layers_of(core: Any) -> Any:
    return core.model.layers


def test_what_writes_nothing_goes_first_and_nothing_changes(
    story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    """A hidden dimension is never silent under an RMS norm, so heads and neurons: their output weights are zero."""
    teacher = teacher_of(decoder("llama"), story_teacher, tmp_path)
    with torch.no_grad():
        for i, layer in enumerate(layers_of(teacher.core)):
            layer.mlp.down_proj.weight[:, 7 * i : 7 * i + 5] = 0
    before = logits(teacher.core)
    student = Student(neurons=43)(teacher, TASK, {}, 0, train_of(teacher, story_files))
    assert [layer.mlp.down_proj.in_features for layer in layers_of(student.core)] == [43, 43]
    torch.testing.assert_close(logits(student.core), before, rtol=1e-5, atol=1e-5)


def test_query_heads_go_with_the_keys_that_they_share(
    story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    teacher = teacher_of(decoder("qwen3"), story_teacher, tmp_path)
    with torch.no_grad():
        for i, layer in enumerate(layers_of(teacher.core)):  # group i of layer i writes nothing, and so is not kept
            layer.self_attn.o_proj.weight[:, 32 * i : 32 * i + 32] = 0
            layer.self_attn.k_proj.weight[16 * i : 16 * i + 16] = 0
            layer.self_attn.v_proj.weight[16 * i : 16 * i + 16] = 0
    student = Student(hidden=16)(teacher, TASK, {}, 0, train_of(teacher, story_files))
    core: Any = student.core
    config = core.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    stay = where(embedded(student), embedded(teacher))
    for i, (ours, theirs) in enumerate(zip(layers_of(student.core), layers_of(teacher.core), strict=True)):
        whole, half, group = theirs.self_attn, slice(32 - 32 * i, 64 - 32 * i), slice(16 - 16 * i, 32 - 16 * i)
        assert torch.equal(ours.self_attn.q_proj.weight, whole.q_proj.weight[half][:, stay])
        assert torch.equal(ours.self_attn.v_proj.weight, whole.v_proj.weight[group][:, stay])
        assert torch.equal(ours.self_attn.o_proj.weight, whole.o_proj.weight[stay][:, half])
        assert torch.equal(ours.self_attn.q_norm.weight, whole.q_norm.weight)


def embedded(model: Model) -> Tensor:
    core: Any = model.core
    weight: Tensor = core.get_input_embeddings().weight
    return weight


def where(ours: Tensor, theirs: Tensor) -> list[int]:
    """Which columns of one weight the columns of another are."""
    return [next(j for j in range(theirs.shape[1]) if torch.equal(theirs[:, j], column)) for column in ours.T]


@pytest.mark.parametrize("kind", ["llama", "llama tied"])
def test_a_cut_computes_what_the_teacher_does_without_these_parts(
    kind: str, story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    """Against the whole teacher in float64, what was cut set to zero.

    An RMS norm over D dimensions, D − K of them zero, is √(D / K) times that over the K, with ε D / K: so its weight
    times √(K / D), and ε K / D, give the same.
    """
    teacher = teacher_of(decoder(kind), story_teacher, tmp_path)
    student = Student(hidden=16, neurons=20)(teacher, TASK, {}, 0, train_of(teacher, story_files))
    whole: Any = copy.deepcopy(teacher.core).double()
    stay = where(embedded(student), embedded(teacher))
    gone = [i for i in range(32) if i not in stay]
    with torch.no_grad():
        whole.model.embed_tokens.weight[:, gone] = 0
        norms = [whole.model.norm]
        for ours, theirs in zip(layers_of(student.core), layers_of(whole), strict=True):
            norms += [theirs.input_layernorm, theirs.post_attention_layernorm]
            for theirs_out, ours_out in (
                (theirs.self_attn.o_proj, ours.self_attn.o_proj), (theirs.mlp.down_proj, ours.mlp.down_proj)
            ):  # fmt: skip
                inside = where(ours_out.weight, theirs_out.weight[stay].float())
                theirs_out.weight[:, [i for i in range(theirs_out.in_features) if i not in inside]] = 0
                theirs_out.weight[gone] = 0
                if theirs_out.bias is not None:
                    theirs_out.bias[gone] = 0
        for norm in norms:
            norm.weight *= (16 / 32) ** 0.5
            norm.variance_epsilon *= 16 / 32
    torch.testing.assert_close(logits(student.core).double(), logits(whole), rtol=1e-4, atol=1e-4)


def test_heads_shrink_to_whole_groups_at_least_in_proportion(
    story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    teacher = teacher_of(decoder("qwen2"), story_teacher, tmp_path / "teacher")
    student = Student(hidden=24)(teacher, TASK, {}, 0, train_of(teacher, story_files))
    core: Any = student.core
    config = core.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        24,
        4,
        2,
        8,
    )
    student.save(tmp_path / "student")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(logits(opened), logits(student.core))


def test_importance_of_fused_weights_is_that_of_the_same_weights_apart(
    story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    """Phi-3 fuses what Llama has apart: with the same numbers in both, every space has the same importance."""
    sizes = {**GROUPED, "rms_norm_eps": 1e-5}
    apart = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    fused = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))
    state = apart.state_dict()
    for i in range(2):
        for new, olds in {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            parts = [state.pop(f"model.layers.{i}.{old}.weight") for old in olds]
            state[f"model.layers.{i}.{new}.weight"] = torch.cat(parts)
    fused.load_state_dict(state)
    found = []
    for core in (apart, fused):
        teacher = teacher_of(core, story_teacher, tmp_path / core.config.model_type)
        examples = train_of(teacher, story_files)
        found.append(taylor_importance(teacher, examples, spaces_of(teacher.core), 0))
    assert found[0].keys() == found[1].keys() >= {"hidden", "heads.1", "keys.1", "neurons.0"}
    for space in found[0]:
        torch.testing.assert_close(found[0][space], found[1][space], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"hidden": 20}, "hidden=20: a multiple of 8 is needed, for the teacher's head size 8, and at most 32"),
        ({"neurons": 49}, "neurons=49: the teacher's feed-forward is 48 wide"),
    ],
)
def test_cuts_that_do_not_go(
    settings: dict[str, Any], match: str, story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    teacher = teacher_of(decoder("llama"), story_teacher, tmp_path)
    with pytest.raises(InputError, match=match):
        Student(**settings)(teacher, TASK, {}, 0, train_of(teacher, story_files))


def test_a_head_count_that_the_architecture_refuses(
    story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    """Llama's config wants a hidden size that is a multiple of the heads."""
    config = transformers.LlamaConfig(**{**GROUPED, "hidden_size": 30, "num_attention_heads": 6}, head_dim=4)
    teacher = teacher_of(transformers.LlamaForCausalLM(config), story_teacher, tmp_path)
    with pytest.raises(InputError, match=r"(?s)a llama cannot be cut so \(.*multiple of the number of attention heads"):
        Student(hidden=20)(teacher, TASK, {}, 0, train_of(teacher, story_files))


@pytest.mark.parametrize("kind", ["gpt_neox", "olmo2"])
def test_other_layouts_are_refused(
    kind: str, story_teacher: Path, story_files: dict[str, Path], tmp_path: Path
) -> None:
    sizes = SIZES if kind == "gpt_neox" else GROUPED
    config: Any = {"gpt_neox": transformers.GPTNeoXConfig, "olmo2": transformers.Olmo2Config}[kind](**sizes)
    teacher = teacher_of(transformers.AutoModelForCausalLM.from_config(config), story_teacher, tmp_path)
    with pytest.raises(
        InputError, match=f"(?s)a {kind} (is not laid out like BERT|cannot be cut so).*give --student CHECKPOINT"
    ):
        Student(hidden=16)(teacher, TASK, {}, 0, train_of(teacher, story_files))
