"""The model and its loss: first what the chapter prints, then what holds for every model.

The references are the chapter's figures, GPT-2 written once more in NumPy, PyTorch's modules and finite differences.
"""
import ast
import copy
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import gpt
from conftest import (HERE, LONG, ROUNDING, TINY, assert_refused, configs, examples, noisy_params, parrot, random_ids,
                      same, seeded, seeds, tie)
from gpt import (Config, calc_loss, compute_in, distinct, dropout, empty_cache, extend, forward, init_params, linear,
                 map_params, pack)
from sample import generate, gpt2_tokenizer, text_to_token_ids, token_ids_to_text
from train import Settings

INPUTS = torch.tensor([[16833, 3626, 6100], [40, 1107, 588]])    # "every effort moves", "I really like"
TARGETS = torch.tensor([[3626, 6100, 345], [1107, 588, 11311]])  # " effort moves you", " really like chocolate"
COARSE = {"rtol": 0.02, "atol": 0.1}  # what bfloat16, with its three digits, may differ in
PLAIN = replace(TINY, context_length=20, drop_rate=0.0)
LENGTHS = (1, 5, 20)  # oneDNN may multiply one token and many; a few are always left to PyTorch's choice
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="the inductor needs a C++ compiler")


def leaves_of(params):
    return map_params(lambda tensor: tensor.detach().clone().requires_grad_(), params)


def gradients_of(params, inputs, targets, config, dtype=torch.float32):
    """The gradient of the loss by each parameter, by plain autograd; two names of one tensor have the same one."""
    leaves = leaves_of(params)
    loss = calc_loss(compute_in(leaves, dtype), inputs, targets, config)
    gradients = dict(zip(distinct(leaves), torch.autograd.grad(loss, distinct(leaves)), strict=True))
    return map_params(gradients.get, leaves)


# Section 5.1.1: a model that has learned nothing
def test_the_untrained_model_writes_the_chapters_nonsense(untrained):
    tokenizer = gpt2_tokenizer()
    ids = generate(untrained.params, text_to_token_ids("Every effort moves you", tokenizer), Config(), 10)
    assert token_ids_to_text(ids, tokenizer) == "Every effort moves you rentingetic wasnم refres RexMeCHicular stren"


# Section 5.1.2: the loss, step by step, then by the function that replaces the steps
def test_the_loss_by_hand_is_the_cross_entropy(untrained):
    logits = forward(untrained.params, INPUTS, Config())
    probabilities = logits.softmax(dim=-1)
    assert probabilities.shape == (2, 3, 50257)

    likeliest = probabilities.argmax(dim=-1)
    assert likeliest.tolist() == [[16657, 339, 42826], [49906, 29669, 41751]]
    assert token_ids_to_text(likeliest[0], gpt2_tokenizer()) == " Armed heNetflix"
    assert token_ids_to_text(TARGETS[0], gpt2_tokenizer()) == " effort moves you"

    of_targets = probabilities.gather(2, TARGETS[:, :, None]).flatten()
    assert of_targets.tolist() == pytest.approx(
        [7.4541e-05, 3.1061e-05, 1.1563e-05, 1.0337e-05, 5.6776e-05, 4.7559e-06], abs=1e-8)
    logs = of_targets.log()
    assert logs.tolist() == pytest.approx([-9.5042, -10.3796, -11.3677, -11.4798, -9.7764, -12.2561], abs=1e-4)
    by_hand = -logs.mean()
    assert by_hand.item() == pytest.approx(10.7940, abs=1e-4)

    library = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    ours = calc_loss(untrained.params, INPUTS, TARGETS, Config())
    assert [library.item(), ours.item()] == pytest.approx([by_hand.item()] * 2, abs=1e-5)
    assert ours.exp().item() == pytest.approx(48725.8203, abs=0.1)  # the perplexity


def test_the_perplexity_of_a_model_that_prefers_nothing_is_the_number_of_tokens():
    loss = calc_loss(parrot(TINY, {}), *examples(TINY, 12), TINY)
    assert loss.exp().item() == pytest.approx(TINY.vocab_size, rel=1e-5)


# The parameters
def made_of_modules(config):
    """The parameters of PyTorch's modules, made in the order in which the chapter's model makes them."""
    E, names = config.emb_dim, {"weight": "scale", "bias": "shift"}  # the chapter's names for those of a norm
    modules = {"tok_emb": nn.Embedding(config.vocab_size, E), "pos_emb": nn.Embedding(config.context_length, E)}
    for block in (f"trf_blocks.{i}" for i in range(config.n_layers)):
        modules |= {f"{block}.att.W_{name}": nn.Linear(E, E, config.qkv_bias) for name in ("query", "key", "value")}
        modules[f"{block}.att.out_proj"] = nn.Linear(E, E)
        modules |= {f"{block}.ff.layers.0": nn.Linear(E, 4 * E), f"{block}.ff.layers.2": nn.Linear(4 * E, E)}
        modules |= {f"{block}.norm1": nn.LayerNorm(E), f"{block}.norm2": nn.LayerNorm(E)}
    modules |= {"final_norm": nn.LayerNorm(E), "out_head": nn.Linear(E, config.vocab_size, bias=False)}
    params = {}
    for name, module in modules.items():
        for part, tensor in module.named_parameters():
            params[f"{name}.{names[part] if 'norm' in name else part}"] = tensor.detach()
    return params


@given(configs, seeds, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_parameters_are_drawn_as_pytorchs_modules_draw_them(config, seed, default_dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected, random_state = made_of_modules(config), torch.get_rng_state()
    generator = seeded(seed)
    torch.set_default_dtype(default_dtype)  # which must not matter
    try:
        params = init_params(config, generator)
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(params) == list(expected) and same(params, expected)
    assert all(tensor.dtype == torch.float32 for tensor in params.values())
    assert torch.equal(generator.get_state(), random_state)


def test_tied_parameters_are_mapped_once_and_stay_tied():
    params, seen = tie(init_params(TINY, seeded())), []

    def function(tensor):
        seen.append(id(tensor))
        return tensor.double()
    mapped = map_params(function, params)
    assert list(mapped) == list(params)
    assert mapped["out_head.weight"] is mapped["tok_emb.weight"]
    assert seen == [id(params[name]) for name in params if name != "out_head.weight"]
    equal = params | {"out_head.weight": params["tok_emb.weight"].clone()}  # but not tied
    assert len({id(tensor) for tensor in map_params(torch.clone, equal).values()}) == len(params)


def test_compute_in_converts_all_but_the_embeddings():
    params, ids = tie(noisy_params(TINY, torch.float32)), random_ids(TINY, 2, 12)
    assert all(tensor is params[name] for name, tensor in compute_in(params, torch.float32).items())
    lower = compute_in(params, torch.bfloat16)
    assert lower["tok_emb.weight"] is params["tok_emb.weight"] and lower["pos_emb.weight"] is params["pos_emb.weight"]
    rest = {name: tensor for name, tensor in lower.items() if "emb" not in name}
    assert same(rest, {name: params[name].bfloat16() for name in rest})
    assert not torch.allclose(forward(lower, ids, TINY), forward(params, ids, TINY), **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_gradient_is_the_sum_of_both_uses(dtype):
    params, batch = tie(init_params(PLAIN, seeded())), examples(PLAIN, 12)
    equal = params | {"out_head.weight": params["tok_emb.weight"].clone()}
    tied, apart = (gradients_of(each, *batch, PLAIN, dtype) for each in (params, equal))
    assert_close(tied["tok_emb.weight"], apart["tok_emb.weight"] + apart["out_head.weight"], **ROUNDING)


# The forward pass
def numpy_forward(params, token_ids, config, drop=lambda x: x):
    """GPT-2 as the book describes it, in NumPy; `drop` is its dropout."""
    weights = {name: tensor.numpy() for name, tensor in params.items()}
    ids, T, H = token_ids.numpy(), token_ids.shape[1], config.n_heads

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.scale"] + weights[f"{name}.shift"]

    def layer(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    x = drop(weights["tok_emb.weight"][ids] + weights["pos_emb.weight"][:T])
    for block in (f"trf_blocks.{i}" for i in range(config.n_layers)):
        h = norm(x, f"{block}.norm1")
        query, key, value = (np.stack(np.split(layer(h, f"{block}.att.W_{name}"), H, axis=-1), axis=1)  # (B, H, T, D)
                             for name in ("query", "key", "value"))
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        scores = np.where(np.tri(T), scores, -np.inf)  # no token sees a later one
        attends = np.exp(scores - scores.max(-1, keepdims=True))
        context = drop(attends / attends.sum(-1, keepdims=True)) @ value
        x = x + drop(layer(np.concatenate([context[:, i] for i in range(H)], axis=-1), f"{block}.att.out_proj"))
        h = layer(norm(x, f"{block}.norm2"), f"{block}.ff.layers.0")
        h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # GELU
        x = x + drop(layer(h, f"{block}.ff.layers.2"))
    return torch.tensor(layer(norm(x, "final_norm"), "out_head"))


@given(configs, seeds, st.data())
def test_without_a_generator_logits_are_those_of_numpy(config, seed, data):
    params = noisy_params(config, seed=seed)
    ids = random_ids(config, data.draw(st.integers(1, 3)), data.draw(st.integers(1, config.context_length)))
    assert_close(forward(params, ids, config), numpy_forward(params, ids, config))


def test_dropout_zeroes_a_part_and_keeps_the_mean():
    x = torch.ones(10_000)
    dropped = dropout(x, 0.3, seeded())
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)  # 4.6 standard deviations
    assert dropout(x, 0.3, None) is dropout(x, 0.0, seeded()) is x


@given(configs, seeds)
def test_with_a_generator_there_is_dropout_as_pytorch_draws_it(config, seed):
    params, (ids, targets) = noisy_params(config, seed=seed), examples(config, config.context_length)
    generators = seeded(seed), seeded(seed)

    def drop(x):
        return F.dropout(torch.tensor(x), config.drop_rate).numpy() if config.drop_rate > 0 else x
    logits = forward(params, ids, config, generators[0])
    loss = calc_loss(params, ids, targets, config, generators[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = numpy_forward(params, ids, config, drop)
        assert all(torch.equal(each.get_state(), torch.get_rng_state()) for each in generators)
    assert_close((logits, loss), (expected, F.cross_entropy(expected.flatten(0, 1), targets.flatten())))


@given(configs, seeds, st.booleans(), st.data())
def test_a_token_changes_no_logit_before_it(config, seed, has_dropout, data):
    params, ids = noisy_params(config, seed=seed), random_ids(config, 2, config.context_length)
    t = data.draw(st.integers(0, config.context_length - 1))
    changed = ids.clone()
    changed[:, t:] = (changed[:, t:] + 1) % config.vocab_size
    before, after = (forward(params, each, config, seeded() if has_dropout else None) for each in (ids, changed))
    assert torch.equal(before[:, :t], after[:, :t])


@given(configs, seeds)
def test_calls_change_neither_their_arguments_nor_pytorchs_random_state(config, seed):
    params, (inputs, targets) = tie(init_params(config, seeded(seed))), examples(config, config.context_length)
    arguments, random_state = (params, inputs, targets, config), torch.get_rng_state()
    kept = copy.deepcopy(arguments)

    def results():
        cache = empty_cache(params, 2, config.context_length, config)
        return (forward(params, inputs, config, seeded(7)), calc_loss(params, inputs, targets, config),
                extend(params, inputs, config, cache), pack(params), init_params(config, seeded(3)))
    assert same(results(), results())
    assert same(arguments, kept) and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_the_same_with_gradients_without_and_in_inference_mode(length):
    params, ids = init_params(PLAIN, seeded()), random_ids(PLAIN, 2, length)
    expected, differentiable = forward(params, ids, PLAIN), forward(leaves_of(params), ids, PLAIN)
    assert differentiable.requires_grad and not expected.requires_grad
    with torch.no_grad():
        assert same([differentiable, forward(params, ids, PLAIN)], [expected] * 2)
    with torch.inference_mode():
        assert same(forward(params, ids, PLAIN), expected)


@pytest.mark.parametrize("length", LENGTHS)
@torch.inference_mode()
def test_torch_func_gives_gradients_also_in_inference_mode(length):
    x, weight = torch.ones(1, length, 3), torch.ones(2, 3)
    gradient = torch.func.grad(lambda weight: linear(x, {"layer.weight": weight}, "layer").sum())(weight)
    assert (gradient == length).all()


@pytest.mark.parametrize("dtype, logits_dtype", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_logits_are_float32_at_least_and_a_cache_has_the_models_type(dtype, logits_dtype):
    params, ids = noisy_params(TINY, dtype), random_ids(TINY, 1, 3)
    logits, cache = extend(params, ids, TINY, empty_cache(params, 1, 3, TINY))
    assert cache.buffer.dtype == dtype
    assert logits.dtype == forward(params, ids, TINY).dtype == logits_dtype


# The cache
@given(configs, seeds, st.data())
def test_a_prompt_and_then_single_tokens_give_the_logits_of_all_at_once(config, seed, data):
    params, ids = noisy_params(config, seed=seed), random_ids(config, 2, config.context_length)
    prompt = data.draw(st.integers(1, config.context_length))
    rows, cache = [], empty_cache(params, 2, config.context_length, config)
    for part in ids.split([prompt] + [1] * (config.context_length - prompt), dim=1):
        before, held = cache, cache.buffer[..., :cache.length, :].clone()
        row, cache = extend(params, part, config, before)
        assert cache.length == before.length + part.shape[1]
        assert torch.equal(before.buffer[..., :before.length, :], held)
        rows.append(row)
    assert_close(torch.cat(rows, dim=1), forward(params, ids, config)[:, prompt - 1:])


@pytest.mark.parametrize("room, lengths", [
    (8, [0]), (8, [9]), (8, [8, 1]), (8, [4, 0]), (8, [4, 2]), (20, [13]), (20, [12, 1])])
def test_a_cache_refuses_what_has_no_room_and_several_tokens_after_a_prompt(room, lengths):
    params = init_params(TINY, seeded())
    cache = empty_cache(params, 2, room, TINY)
    for length in lengths[:-1]:
        _, cache = extend(params, random_ids(TINY, 2, length), TINY, cache)
    assert_refused(lambda: extend(params, random_ids(TINY, 2, lengths[-1]), TINY, cache), f"{lengths[-1]} tokens")


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 3), (1, 0), (1, 13)])
def test_tokens_that_are_no_rows_or_do_not_fit_are_refused(shape):
    assert_refused(lambda: forward(init_params(TINY, seeded()), random_ids(TINY, *shape), TINY), error=ValueError)


# PyTorch's transforms
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # where vmap can only loop
@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_of_models_and_examples_by_vmap_are_those_of_each_alone(length):
    models, (inputs, targets) = [init_params(PLAIN, seeded(seed)) for seed in range(3)], examples(PLAIN, length, 3)
    stack = {name: torch.stack([params[name] for params in models]) for name in models[0]}

    def loss(params, inputs, targets):
        return calc_loss(params, inputs[None], targets[None], PLAIN)
    of_examples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    together = torch.func.vmap(of_examples, in_dims=(0, None, None))(stack, inputs, targets)
    for i, params in enumerate(models):
        for j in range(3):
            alone = gradients_of(params, inputs[j:j + 1], targets[j:j + 1], PLAIN)
            assert_close({name: tensor[i, j] for name, tensor in together.items()}, alone, **ROUNDING)


@pytest.mark.parametrize("has_dropout", [False, True])
def test_gradients_are_finite_differences(has_dropout):
    config = replace(TINY, n_layers=1)
    params, batch = noisy_params(config), examples(config, 3)

    def loss(*tensors):
        return calc_loss(dict(zip(params, tensors, strict=True)), *batch, config, seeded() if has_dropout else None)
    assert torch.autograd.gradcheck(loss, tuple(leaves_of(params).values()), fast_mode=True)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[LONG, NEEDS_COMPILER])])
def test_a_compiled_forward_gives_the_same_at_all_lengths(backend):
    torch.compiler.reset()  # else what other tests have compiled would count
    config, compiled = replace(PLAIN, n_layers=1), torch.compile(forward, fullgraph=True, backend=backend)
    params = init_params(config, seeded())
    for length in (5, 20, 1):
        results = []
        for function in (compiled, forward):
            leaves = leaves_of(params)
            logits = function(leaves, random_ids(config, 2, length), config)
            results.append((logits, torch.autograd.grad(logits.square().mean(), list(leaves.values()))))
        assert_close(*results, **ROUNDING)


# The products, by whichever library
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, ROUNDING), (torch.bfloat16, COARSE)])
def test_logits_are_those_of_float64_packed_or_not(dtype, tolerance, qkv_bias):
    config = replace(PLAIN, qkv_bias=qkv_bias)
    params = noisy_params(config, dtype)
    exact, packed = map_params(torch.Tensor.double, params), pack(params)
    assert len(packed) < len(params)
    for batch, length in ((1, 1), (2, 1), (1, 5), (1, 20)):
        ids = random_ids(config, batch, length)
        all_logits = [forward(each, ids, config).float() for each in (params, packed, exact)]
        assert_close(all_logits[:2], [all_logits[2]] * 2, **tolerance)


def derivatives(product, *layer):
    """A product, the gradients of a function of it, and the gradients of a function of those."""
    leaves = [tensor.clone().requires_grad_() for tensor in layer]
    result = product(*leaves)
    first = torch.autograd.grad(result.square().mean(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(each.square().mean() for each in first), leaves)
    return [each.detach().float() for each in (result, *first, *second)]


@pytest.mark.skipif(not gpt.ONEDNN, reason="this build of PyTorch has no oneDNN")
@given(st.sampled_from(LENGTHS), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_onednns_product_and_derivatives_are_those_of_pytorchs_linear(length, fan_in, fan_out, has_bias):
    shapes, generator = [(2, length, fan_in), (fan_out, fan_in), *[(fan_out,)] * has_bias], seeded()
    layer, no_bias = [torch.randn(shape, generator=generator) for shape in shapes], [None] * (not has_bias)
    exact = derivatives(F.linear, *(tensor.double() for tensor in layer))
    assert_close(derivatives(lambda *layer: gpt.OneDNNLinear.apply(*layer, *no_bias), *layer), exact, **ROUNDING)
    assert_close(gpt.onednn_product(*layer, *no_bias), exact[0], **ROUNDING)


@pytest.mark.filterwarnings("ignore:TF32")  # oneDNN's switch also sets one of Intel's GPUs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_multiplies_where_onednns_switch_is_off(dtype):
    weight = torch.randn(300, 300, generator=seeded()).to(dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        for length in LENGTHS:
            x = torch.randn(1, length, 300, generator=seeded(length)).to(dtype)
            assert torch.equal(linear(x, {"layer.weight": weight}, "layer"), F.linear(x, weight))
        assert not any(tensor.is_mkldnn for tensor in pack(noisy_params(PLAIN, dtype)).values())


# Settings
@pytest.mark.parametrize("kind, field, right, wrong", [
    (Config, "vocab_size", [1], [0, -1]), (Config, "context_length", [1], [0]), (Config, "qkv_bias", [True], [1, None]),
    (Config, "n_heads", [1, 768], [0, True]), (Config, "drop_rate", [0, 0.999], [-0.1, 1, math.nan, "0.1"]),
    (Config, "n_layers", [1, 2**16 - 1], [0, 2**16, 1.0, "2", None, [2]]),
    (Config, "emb_dim", [12, 2**16 - 16], [0, 2**16, 769]),  # 769 is no multiple of 12 heads
    (Settings, "train_ratio", [0.01, 0.9], [0, 1]), (Settings, "min_lr", [None, 0], [-1, "0", (1,)]),
    (Settings, "dtype", ["float32", "bfloat16"], ["float16", "", None]),
    (Settings, "data", [("a", Path("b")), ["a"]], ["a", (1,), ("a", "")])])
def test_a_setting_is_kept_if_its_type_and_bounds_are_right_else_refused(kind, field, right, wrong):
    assert [getattr(kind(**{field: value}), field) for value in right] == right
    for value in wrong:
        assert_refused(lambda value=value: kind(**{field: value}), field, error=ValueError)


# The line where the chapter ends
@pytest.mark.parametrize("script", ["gpt.py", "weights.py", "sample.py", "train.py"])
def test_the_chapter_uses_nothing_that_is_defined_below_its_end(script):
    """So one can stop reading a script at the line that says where the chapter ends, but for `outputs`."""
    above, below = re.split("(?m)^# -+ The chapter ends here", (HERE / script).read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(ast.parse(above)) if isinstance(node, ast.Name)}
    starts = re.findall(r"(?m)^(?!if)\w[\w, ]*", below)  # such as `def outputs`, `AMX` or `PROCESSOR, VECTORS`
    assert used & set(re.findall(r"\w+", " ".join(starts))) == ({"outputs"} if script == "gpt.py" else set())
