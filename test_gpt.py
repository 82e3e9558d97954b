"""The model, the loss, the data and the training step, held to the figures that the chapter prints."""
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpt
import train
from conftest import (
    ACCELERATOR,
    HERE,
    LONG,
    NEEDS_ACCELERATOR,
    ROUNDING,
    STORY,
    TINY,
    TRAINING_LOG,
    refused,
    same,
    seeded,
)
from gpt import (
    EMBEDDINGS,
    GPT_CONFIG_124M,
    Config,
    calc_loss,
    cast,
    compute_in,
    distinct,
    extend,
    forward,
    init_params,
    map_params,
)
from sample import generate, gpt2_tokenizer, text_to_token_ids, token_ids_to_text
from train import Settings, adamw_step, init_optimizer, loss_and_gradients, train_step
from weights import load_checkpoint

CPU = torch.device("cpu")
INPUTS = torch.tensor([[16833, 3626, 6100], [40, 1107, 588]])    # "every effort moves", "I really like"
TARGETS = torch.tensor([[3626, 6100, 345], [1107, 588, 11311]])  # " effort moves you", " really like chocolate"
GREEDY_SENTENCE = ('Every effort moves you know," was one of the axioms he laid down across the Sevres and silver '
                   "of an exquisitely appointed lun\n")
SAMPLED_SENTENCE = "Every effort moves you stand to work on surprise, a one of us had gone with random-\n"
# One token and many may be multiplied by oneDNN, a few always are by PyTorch's own choice.
LENGTHS = [1, 7, 19, 40]
SMALL = Config(vocab_size=61, context_length=48, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=True)
NEEDS_ONEDNN = pytest.mark.skipif(not gpt.ONEDNN, reason="this build of PyTorch has no oneDNN")
QUIET_VMAP = pytest.mark.filterwarnings("ignore:There is a performance drop")  # it loops over some products


def prints_as(value, printed):
    """Whether a float32 value is the printed one: within half a unit of its last digit and 8 roundings of its own."""
    mantissa, _, exponent = printed.partition("e")
    half_unit = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(value) - float(printed)) <= half_unit + 8 * ROUNDING * abs(float(value))


def near(one, two, roundings):
    """Whether two dicts of tensors differ by at most so many roundings of their largest value.

    Where a small value is what is left of large ones, nothing smaller could be asked for.
    """
    largest = max(float(tensor.abs().max()) for tensor in two.values())
    eps = max(torch.finfo(tensor.dtype).eps for tensor in one.values())
    return one.keys() == two.keys() and all(
        float((one[name].detach() - two[name]).abs().max()) <= roundings * eps * largest for name in one)


def close(one, exact, largest, roundings):
    """Whether tensors are as exact as sums can be, whatever their order.

    `largest` are the sums of the absolute values of what is added up. Each addend may be rounded so many times.
    """
    return all(((a.double() - b).abs() <= roundings * torch.finfo(a.dtype).eps * c).all()
               for a, b, c in zip(one, exact, largest, strict=True))


def copied(params):
    return map_params(torch.clone, params)


def tied(params):
    return params | {"out_head.weight": params["tok_emb.weight"]}


def examples(config, length, batch=2, seed=2):
    """Inputs and targets (batch, length)."""
    ids = torch.randint(config.vocab_size, (batch, length + 1), generator=seeded(seed))
    return ids[:, :-1], ids[:, 1:]


def gradients_of(params, inputs, targets, config):
    """The gradient of the loss by each parameter, by plain autograd."""
    leaves = map_params(lambda tensor: tensor.detach().clone().requires_grad_(), params)
    return dict(zip(params, torch.autograd.grad(calc_loss(leaves, inputs, targets, config), leaves.values()),
                    strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def untrained():
    """The parameters of the chapter's untrained model; tests must not train them."""
    return init_params(GPT_CONFIG_124M, seeded())


@pytest.fixture(scope="module")
def verdict():
    return STORY.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(verdict):
    """The chapter's run."""
    return train.make_run(verdict, GPT_CONFIG_124M, Settings())


# Section 5.1.1: the untrained model

def test_the_untrained_model_writes_the_chapters_nonsense(untrained, tokenizer):
    ids = generate(untrained, text_to_token_ids("Every effort moves you", tokenizer), GPT_CONFIG_124M, 10)
    assert token_ids_to_text(ids, tokenizer) == "Every effort moves you rentingetic wasnم refres RexMeCHicular stren"


def test_end_of_text_in_a_prompt_is_token_50256(tokenizer):
    assert text_to_token_ids("a<|endoftext|>b", tokenizer).tolist() == [[64, 50256, 65]]


# Section 5.1.2: the loss, step by step, then by the function that replaces the steps

def test_the_loss_by_hand_is_the_cross_entropy(untrained, tokenizer):
    logits = forward(untrained, INPUTS, GPT_CONFIG_124M)
    probabilities = logits.softmax(dim=-1)
    assert probabilities.shape == (2, 3, 50257)

    likeliest = probabilities.argmax(dim=-1)
    assert likeliest.tolist() == [[16657, 339, 42826], [49906, 29669, 41751]]
    assert token_ids_to_text(likeliest[0], tokenizer) == " Armed heNetflix"
    assert token_ids_to_text(TARGETS[0], tokenizer) == " effort moves you"

    of_targets = probabilities.gather(2, TARGETS[:, :, None]).flatten()
    printed = ("7.4541e-05", "3.1061e-05", "1.1563e-05", "1.0337e-05", "5.6776e-05", "4.7559e-06")
    assert all(map(prints_as, of_targets, printed))
    logs = of_targets.log()
    printed = ("-9.5042", "-10.3796", "-11.3677", "-11.4798", "-9.7764", "-12.2561")
    assert all(map(prints_as, logs, printed))
    assert f"{logs.mean():.4f}" == "-10.7940"
    by_hand = -logs.mean()
    assert f"{by_hand:.4f}" == "10.7940"

    library = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    ours = calc_loss(untrained, INPUTS, TARGETS, GPT_CONFIG_124M)
    assert f"{library:.4f}" == f"{ours:.4f}" == "10.7940"
    # The perplexity. exp makes a relative error of what is an absolute one in the loss: two roundings of the loss.
    assert ours.exp().item() == pytest.approx(48725.8203, rel=2 * ROUNDING * 10.7940)


# Section 5.1.3: the data

def test_the_verdict_has_20479_characters_and_5145_tokens(verdict, tokenizer):
    assert len(verdict) == 20479
    assert len(train.tokenize(verdict, tokenizer)) == 5145


@LONG  # a quick test runs exercise 5.5, which prints them
def test_the_losses_of_the_untrained_model_are_the_chapters(untrained, run):
    assert len(train.draw_batches(len(run.train_windows), 2, seeded(), shuffle=True)) == 9
    assert len(train.draw_batches(len(run.val_windows), 2, seeded(), shuffle=False)) == 1
    losses = train.evaluate_model(untrained, run, seeded())
    assert losses == pytest.approx((10.98758, 10.98110), abs=1e-5)  # the chapter's figures are cut, not rounded


@given(st.integers(0, 300), st.integers(1, 40))
def test_windows_start_where_the_chapters_do_and_targets_are_one_later(n, length):
    tokens = np.arange(n, dtype=np.uint16)
    windows = train.make_windows(tokens, length)
    assert [int(window[0]) for window in windows] == list(range(0, n - length, length))
    if len(windows):
        inputs, targets = train.get_batch(windows, torch.arange(len(windows)), CPU)
        assert torch.equal(inputs + 1, targets) and inputs.shape[1] == length


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 2**31))
def test_a_pass_draws_what_pytorchs_data_loader_draws(n, batch_size, seed):
    for shuffle in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loader = torch.utils.data.DataLoader(torch.arange(n), batch_size, shuffle=shuffle, drop_last=shuffle)
            generator = seeded(seed)
            expected = [batch.tolist() for batch in loader]
            drawn = train.draw_batches(n, batch_size, generator, shuffle)
            assert expected == [numbers.tolist() for numbers in drawn]
            assert torch.equal(generator.get_state(), torch.get_rng_state())


PIECES = st.sampled_from([*"ab é中🙂 \n\t\r\x1c\u2003'.1<|", "  ", "\n\n", "\n\n\na", "endoftext", "<|endoftext|>"])


@given(st.lists(PIECES, max_size=200).map("".join), st.integers(1, 8))
def test_a_text_tokenized_in_pieces_has_the_tokens_of_the_whole(tokenizer, text, piece):
    tokens = train.tokenize(text, tokenizer, piece=piece)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == text_to_token_ids(text, tokenizer)[0].tolist()


# The random stream

@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_drawn_as_pytorchs_layers_draw_them(bias):
    config = Config(vocab_size=50, context_length=7, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=bias)
    generator = seeded()
    params = init_params(config, generator)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        expected = {"tok_emb": torch.nn.Embedding(50, 12), "pos_emb": torch.nn.Embedding(7, 12)}
        for i in range(2):
            shapes = {"att.W_query": (12, 12, bias), "att.W_key": (12, 12, bias), "att.W_value": (12, 12, bias),
                      "att.out_proj": (12, 12), "ff.layers.0": (12, 48), "ff.layers.2": (48, 12)}
            expected |= {f"trf_blocks.{i}.{name}": torch.nn.Linear(*shape) for name, shape in shapes.items()}
        expected["out_head"] = torch.nn.Linear(12, 50, bias=False)
        assert torch.equal(generator.get_state(), torch.get_rng_state())
    drawn = {f"{name}.{part}": value for name, layer in expected.items() for part, value in layer.named_parameters()}
    assert drawn.keys() | {name for name in params if "norm" in name} == params.keys()
    assert all(torch.equal(params[name], value) for name, value in drawn.items())
    assert all((params[name] == name.endswith("scale")).all() for name in params if "norm" in name)


@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.25, 0.5, 0.9]), st.integers(1, 200))
def test_dropout_draws_what_pytorchs_dropout_draws(seed, rate, n):
    x = torch.randn(n, generator=seeded())
    generator = seeded(seed)
    ours = gpt.dropout(x, rate, generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        assert torch.equal(ours, F.dropout(x, rate))
        assert torch.equal(generator.get_state(), torch.get_rng_state())


# Section 5.2: training

@pytest.mark.parametrize("lines", [1, pytest.param(2, marks=LONG)])
def test_the_first_steps_print_the_first_lines_of_the_chapters_log(run, lines):
    state, printed = train.start_state(run), []
    while len(printed) < lines:
        state = train.next_state(run, state)
        printed += train.log_lines(run, state)
    assert state.opt_state.step == 1 + 5 * (lines - 1)
    assert printed == TRAINING_LOG.splitlines()[:lines]


@LONG
def test_training_and_sampling_print_the_whole_of_section_5_2_and_5_3(tmp_path):
    def command(script, *arguments):
        done = subprocess.run([sys.executable, str(HERE / script), *arguments], cwd=tmp_path, capture_output=True,
                              encoding="utf-8", timeout=4 * 3600)
        assert done.returncode == 0, done.stderr
        return done.stdout
    data = ("--data", str(STORY))
    first = command("train.py", *data, "--epochs", "5")
    assert first + command("train.py", "--resume", "--epochs", "10") == TRAINING_LOG
    assert command("train.py", *data, "--checkpoint", "straight.pth") == TRAINING_LOG
    resumed, straight = (load_checkpoint(tmp_path / name) for name in ("model.pth", "straight.pth"))
    assert same(resumed.params, straight.params) and same(tuple(resumed.opt_state), tuple(straight.opt_state))
    assert all(same(resumed.run[name], straight.run[name]) for name in ("generator_state", "order", "settings"))
    assert command("sample.py") == GREEDY_SENTENCE
    sampling = ("--top-k", "25", "--temperature", "1.4", "--seed", "123", "--max-new-tokens", "15")
    assert command("sample.py", *sampling) == SAMPLED_SENTENCE


def logged_losses(lines):
    """The training and validation losses of each line of a log that has them."""
    lines = [line.replace(",", "").split() for line in lines if line.startswith("Ep ")]
    return [(float(words[6]), float(words[9])) for words in lines]


@LONG
@pytest.mark.skipif(not {"avx512_bf16", "amx_bf16"} & {name for name, there in torch.cpu.get_capabilities().items()
                                                       if there is True},
                    reason="this processor has no units for bfloat16, and would take hours to imitate them")
def test_bfloat16_training_stays_within_3_percent_of_float32_up_to_step_40(run):
    run = run._replace(settings=replace(run.settings, dtype="bfloat16"))
    state = train.start_state(run)
    while len(state.evaluations) < 9:  # after steps 0, 5, ..., 40
        state = train.next_state(run, state)
    for (_, *ours), theirs in zip(state.evaluations, logged_losses(TRAINING_LOG.splitlines())[:9], strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_is_one_of_pytorchs_adamw(dtype):
    params = cast(init_params(TINY, seeded()), dtype)
    reference = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in params.items()}
    optimizer = torch.optim.AdamW(reference.values(), lr=0.01, weight_decay=0.1)
    opt_state, (inputs, targets) = init_optimizer(params), examples(TINY, 8)
    for step in range(3):
        expected = calc_loss(params, inputs, targets, TINY)
        right = gradients_of(params, inputs, targets, TINY)
        loss, gradients = loss_and_gradients(params, inputs, targets, TINY, dtype=dtype)
        assert loss.item() == pytest.approx(expected.item(), rel=4 * ROUNDING)
        assert near(dict(zip(params, gradients, strict=True)), right, 50)
        # AdamW makes a step of any gradient, also of a rounding error. So both optimizers get the same gradients.
        for parameter, gradient in zip(reference.values(), gradients, strict=True):
            parameter.grad = gradient.clone()
        params, opt_state = adamw_step(params, opt_state, gradients, lr=0.01, weight_decay=0.1)
        optimizer.step()
        states = optimizer.state_dict()["state"]
        assert opt_state.step == step + 1 == states[0]["step"]
        for i, name in enumerate(params):
            ours = {"param": params[name], "mean": opt_state.exp_avg[name], "squares": opt_state.exp_avg_sq[name]}
            theirs = {"param": reference[name].detach(), "mean": states[i]["exp_avg"],
                      "squares": states[i]["exp_avg_sq"]}
            assert all(near({key: ours[key]}, {key: theirs[key]}, 4 * (step + 1)) for key in ours), name


def test_a_step_writes_into_the_tensors_that_were_passed_and_returns_them():
    params = init_params(TINY, seeded())
    before, opt_state = copied(params), init_optimizer(params)
    new_params, new_opt_state, _ = train_step(params, opt_state, *examples(TINY, 8), TINY)
    assert all(new_params[name] is params[name] and not torch.equal(params[name], before[name]) for name in params)
    assert all(new_opt_state.exp_avg[name] is opt_state.exp_avg[name] for name in params)
    assert all(new_opt_state.exp_avg_sq[name] is opt_state.exp_avg_sq[name] for name in params)
    assert not any(tensor.requires_grad for tensor in new_params.values())


def test_a_step_in_bfloat16_leaves_the_parameters_and_moments_in_float32():
    params = init_params(TINY, seeded())
    exact, _, _ = train_step(copied(params), init_optimizer(params), *examples(TINY, 8), TINY, lr=0.01)
    params, opt_state, loss = train_step(params, init_optimizer(params), *examples(TINY, 8), TINY, lr=0.01,
                                         dtype=torch.bfloat16)
    for tensors in (params, opt_state.exp_avg, opt_state.exp_avg_sq):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert loss.dtype == torch.float32
    assert not same(params, exact)  # it was computed in bfloat16


def test_a_step_whose_loss_is_nan_is_refused_and_changes_nothing():
    params = init_params(TINY, seeded())
    params, opt_state, _ = train_step(params, init_optimizer(params), *examples(TINY, 8), TINY)
    params["final_norm.scale"].fill_(3e38)  # finite, but the logits are not
    before = copied(params), opt_state.step, copied(opt_state.exp_avg), copied(opt_state.exp_avg_sq)
    message = refused(lambda: train_step(params, opt_state, *examples(TINY, 8), TINY), error=FloatingPointError)
    assert message in ("the loss is nan", "the loss is inf")
    assert same((params, *opt_state), before)
    assert not any(tensor.requires_grad for tensor in params.values())


def test_tied_parameters_have_one_gradient_and_one_mean_of_it():
    params = tied(init_params(TINY, seeded()))
    _, gradients = loss_and_gradients(params, *examples(TINY, 8), TINY)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in distinct(params)]
    expected = {str(i): 0.1 * gradient for i, gradient in enumerate(gradients)}  # the mean starts with 1 - 0.9 of it
    _, opt_state = adamw_step(params, init_optimizer(params), gradients)
    assert near({str(i): mean for i, mean in enumerate(distinct(opt_state.exp_avg))}, expected, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_its_two_halves(dtype):
    params, (inputs, targets) = init_params(TINY, seeded()), examples(TINY, 8)
    whole = train_step(copied(params), init_optimizer(params), inputs, targets, TINY, seeded(), lr=0.01,
                       weight_decay=0.3, dtype=dtype)
    loss, gradients = loss_and_gradients(params, inputs, targets, TINY, seeded(), dtype)
    assert same(whole, (*adamw_step(params, init_optimizer(params), gradients, 0.01, 0.3), loss))


# Tied weights

@pytest.mark.parametrize("function", [
    torch.clone,
    torch.zeros_like,
    lambda tensor: tensor.double(),
    lambda tensor: tensor.detach().requires_grad_(),
    lambda tensor: tensor.shape,
])
def test_what_is_done_to_tied_parameters_is_done_once_and_they_stay_tied(function):
    params, calls = tied(init_params(TINY, seeded())), []

    def counted(tensor):
        calls.append(tensor)
        return function(tensor)
    mapped = map_params(counted, params)
    assert list(mapped) == list(params)
    assert mapped["out_head.weight"] is mapped["tok_emb.weight"]
    assert len(calls) == len(params) - 1 == len(distinct(params))
    assert [id(tensor) for tensor in calls] == [id(params[name]) for name in params if name != "out_head.weight"]


def test_parameters_that_are_equal_but_not_tied_stay_apart():
    params = init_params(TINY, seeded())
    params["out_head.weight"] = params["tok_emb.weight"].clone()
    mapped = map_params(torch.clone, params)
    assert mapped["out_head.weight"] is not mapped["tok_emb.weight"]
    assert len(distinct(params)) == len(params)


def test_a_cast_keeps_ties_and_copies_nothing_that_has_the_type_already():
    params = tied(init_params(TINY, seeded()))
    other = cast(params, torch.float64)
    assert other["out_head.weight"] is other["tok_emb.weight"]
    assert {tensor.dtype for tensor in other.values()} == {torch.float64}
    assert all(tensor is params[name] for name, tensor in cast(params, torch.float32, CPU).items())


def test_to_compute_in_another_type_casts_all_but_the_embeddings():
    params = tied(init_params(TINY, seeded()))
    lower = compute_in(params, torch.bfloat16)
    assert list(lower) == list(params)
    assert all(lower[name] is params[name] for name in EMBEDDINGS)
    others = {name: tensor.bfloat16() for name, tensor in params.items() if name not in EMBEDDINGS}
    assert same({name: lower[name] for name in others}, others)  # also the head, although it is tied to an embedding
    assert all(tensor is params[name] for name, tensor in compute_in(params, torch.float32).items())


def test_tied_weights_have_one_pair_of_moments_and_stay_tied_through_steps():
    params = tied(init_params(TINY, seeded()))
    opt_state, before = init_optimizer(params), params["tok_emb.weight"].clone()
    assert len(distinct(opt_state.exp_avg)) == len(distinct(opt_state.exp_avg_sq)) == len(params) - 1
    for step in range(2):
        params, opt_state, _ = train_step(params, opt_state, *examples(TINY, 8), TINY, seeded(), lr=0.1,
                                          weight_decay=0.0)
        for tensors in (params, opt_state.exp_avg, opt_state.exp_avg_sq):
            assert tensors["out_head.weight"] is tensors["tok_emb.weight"]
        if step == 0:
            moved = (params["tok_emb.weight"] - before).abs()
            assert 0.09 < moved.max() < 0.11  # AdamW's first step moves by lr: once, not once for each of the two names


# The learning rate and the length of the gradients

def chapters_learning_rates(total_steps, warmup_steps, initial_lr, peak_lr, min_lr):
    """The learning rates of all steps, by the loop of appendix D."""
    lr_increment = (peak_lr - initial_lr) / warmup_steps if warmup_steps else 0.0
    global_step, rates = -1, []
    for _ in range(total_steps):
        global_step += 1
        if global_step < warmup_steps:
            lr = initial_lr + global_step * lr_increment
        else:
            progress = (global_step - warmup_steps) / (total_steps - warmup_steps)
            lr = min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        rates.append(lr)
    return rates


RATES = st.floats(1e-6, 1.0)


@given(st.integers(1, 60), st.integers(0, 70), RATES, RATES, RATES)
def test_the_learning_rate_is_that_of_appendix_d_at_every_step(total_steps, warmup_steps, initial_lr, lr, min_lr):
    options = Settings(lr=lr, warmup_steps=warmup_steps, initial_lr=initial_lr, min_lr=min_lr)
    rates = [train.learning_rate(step, total_steps, options) for step in range(total_steps)]
    assert rates == pytest.approx(chapters_learning_rates(total_steps, warmup_steps, initial_lr, lr, min_lr), rel=1e-12)


def test_the_learning_rate_starts_at_initial_lr_peaks_after_the_warm_up_and_ends_at_min_lr():
    options = Settings(lr=4e-3, warmup_steps=10, initial_lr=1e-3, min_lr=1e-4)
    assert train.learning_rate(0, 50, options) == 1e-3
    assert train.learning_rate(5, 50, options) == pytest.approx(2.5e-3)
    assert train.learning_rate(9, 50, options) == pytest.approx(3.7e-3)
    assert train.learning_rate(10, 50, options) == 4e-3
    assert train.learning_rate(30, 50, options) == pytest.approx((4e-3 + 1e-4) / 2)
    assert train.learning_rate(50, 50, options) == pytest.approx(1e-4)


def test_without_a_warm_up_or_an_end_the_learning_rate_is_the_same_at_every_step():
    assert {train.learning_rate(step, 50, Settings(lr=0.5)) for step in range(51)} == {0.5}
    options = Settings(lr=0.5, warmup_steps=3, initial_lr=0.125)
    assert [train.learning_rate(step, 5, options) for step in range(5)] == [0.125, 0.25, 0.375, 0.5, 0.5]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_gradients_are_clipped_as_pytorch_clips_them(sizes, size, max_norm):
    gradients = [size * torch.randn(n, generator=seeded(n)) for n in sizes]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clipped = train.clip_gradients(gradients, max_norm)
    assert all(ours is given for ours, given in zip(clipped, gradients, strict=True))  # they are written into
    ours = {str(i): gradient for i, gradient in enumerate(clipped)}
    assert near(ours, {str(i): parameter.grad for i, parameter in enumerate(parameters)}, 8)
    assert torch.cat(clipped).norm() <= max_norm * (1 + 8 * ROUNDING)


def test_gradients_shorter_than_the_limit_stay_as_they_are():
    gradients = [torch.randn(5, generator=seeded()), torch.randn(3, generator=seeded(1))]
    before = [gradient.clone() for gradient in gradients]
    assert same(tuple(train.clip_gradients(gradients, 100.0)), tuple(before))


def test_the_gradient_of_tied_weights_counts_once_when_it_is_clipped():
    params = tied(cast(init_params(TINY, seeded()), torch.float64))
    reference = map_params(lambda tensor: torch.nn.Parameter(tensor.clone()), params)
    model = torch.nn.Module()
    for name, parameter in reference.items():
        model.register_parameter(name.replace(".", "_"), parameter)
    calc_loss(reference, *examples(TINY, 8), TINY).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.2
    _, gradients = loss_and_gradients(params, *examples(TINY, 8), TINY, dtype=torch.float64)
    ours = {str(i): gradient for i, gradient in enumerate(train.clip_gradients(gradients, 0.1))}
    assert near(ours, {str(i): parameter.grad for i, parameter in enumerate(model.parameters())}, 100)


# The functions are pure

def configs():
    return st.builds(
        lambda heads, size, layers, context, bias, rate: Config(23, context, heads * size, heads, layers, rate, bias),
        st.integers(1, 3), st.integers(1, 5), st.integers(1, 2), st.integers(1, 9), st.booleans(),
        st.sampled_from([0.0, 0.4]))


@given(configs(), st.integers(1, 3), st.integers(0, 2**31))
def test_calls_change_neither_their_arguments_nor_pytorchs_random_state(config, batch, seed):
    params = init_params(config, seeded(seed))
    ids = torch.randint(23, (batch, config.context_length), generator=seeded(seed))
    targets = ids.roll(1, 1)
    kept, ids_kept, targets_kept = copied(params), ids.clone(), targets.clone()
    random_state, config_kept = torch.get_rng_state(), asdict(config)

    def results():
        cache = gpt.empty_cache(params, batch, config.context_length, config)
        return (forward(params, ids, config), forward(params, ids, config, seeded(7)),
                *extend(params, ids, config, cache), calc_loss(params, ids, targets, config, seeded(7)),
                init_params(config, seeded(3)), cast(params, torch.bfloat16), gpt.param_shapes(config))
    assert same(results(), results())  # bitwise
    copy = copied(params)
    train_step(copy, init_optimizer(copy), ids, targets, config, seeded(7))
    assert same((ids, targets, params, asdict(config)), (ids_kept, targets_kept, kept, config_kept))
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_bitwise_the_same_with_gradients_without_and_in_inference_mode(length):
    params, (ids, _) = init_params(SMALL, seeded()), examples(SMALL, length)
    leaves = map_params(lambda tensor: tensor.clone().requires_grad_(), params)
    with torch.enable_grad():
        differentiable = forward(leaves, ids, SMALL)
        plain = forward(params, ids, SMALL)
    with torch.no_grad():
        without = forward(params, ids, SMALL)
    with torch.inference_mode():
        inference = forward(params, ids, SMALL)
    assert differentiable.requires_grad and not plain.requires_grad and inference.is_inference()
    assert same((differentiable.detach(), without, inference.clone()), (plain,) * 3)


def test_dropout_happens_exactly_when_a_generator_is_passed():
    params, (ids, _) = init_params(TINY, seeded()), examples(TINY, 12)
    plain = forward(params, ids, TINY)
    assert torch.equal(plain, forward(params, ids, replace(TINY, drop_rate=0.0)))
    assert torch.equal(plain, forward(params, ids, replace(TINY, drop_rate=0.0), seeded()))
    assert not torch.allclose(plain, forward(params, ids, TINY, seeded()), atol=1e-3)


def test_attention_by_hand_equals_the_fused_one():
    params, (ids, _) = init_params(TINY, seeded()), examples(TINY, 12)
    almost_none = replace(TINY, drop_rate=1e-12)
    torch.testing.assert_close(forward(params, ids, almost_none, seeded()), forward(params, ids, TINY))


@given(configs())
def test_changing_a_token_never_changes_a_logit_before_it(config):
    params = init_params(config, seeded(1))
    ids = torch.randint(23, (2, config.context_length), generator=seeded(2))
    for t in range(config.context_length):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 23
        for generator in (lambda: None, lambda: seeded(5)):
            before, after = forward(params, ids, config, generator()), forward(params, changed, config, generator())
            assert torch.equal(before[:, :t], after[:, :t])


@given(configs(), st.integers(2, 20))
def test_a_rows_logits_do_not_depend_on_the_other_rows(config, batch):
    params = cast(init_params(config, seeded(1)), torch.float64)  # a norm over 2 near values magnifies any rounding
    ids = torch.randint(23, (batch, config.context_length), generator=seeded(2))
    together = forward(params, ids, config)
    for row in range(batch):
        torch.testing.assert_close(together[row], forward(params, ids[row:row + 1], config)[0], atol=1e-7, rtol=1e-7)


def test_logits_are_float32_at_least():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        params = cast(init_params(TINY, seeded()), dtype)
        assert forward(params, torch.zeros(1, 3, dtype=torch.long), TINY).dtype == expected


# The cache

@given(configs(), st.integers(1, 3), st.data())
def test_a_prompt_and_then_single_tokens_give_the_logits_of_all_at_once(config, batch, data):
    params = cast(init_params(config, seeded(1)), torch.float64)  # a norm over 2 near values magnifies any rounding
    ids = torch.randint(23, (batch, config.context_length), generator=seeded(2))
    prompt = data.draw(st.integers(1, config.context_length))
    expected = forward(params, ids, config)
    logits, cache = extend(params, ids[:, :prompt], config, gpt.empty_cache(params, batch, ids.shape[1], config))
    for t in range(prompt, config.context_length + 1):
        assert cache.length == t and logits.shape == (batch, 1, 23)
        torch.testing.assert_close(logits, expected[:, t - 1:t], atol=1e-7, rtol=1e-7)
        if t < config.context_length:
            logits, cache = extend(params, ids[:, t:t + 1], config, cache)


@pytest.mark.parametrize("prompt", LENGTHS)
def test_the_cache_gives_the_logits_of_all_at_once_in_float32_too(prompt):
    params, (ids, _) = init_params(SMALL, seeded()), examples(SMALL, 48)
    logits, cache = extend(params, ids[:, :prompt], SMALL, gpt.empty_cache(params, 2, 48, SMALL))
    rows = [logits]
    for t in range(prompt, 48):
        logits, cache = extend(params, ids[:, t:t + 1], SMALL, cache)
        rows.append(logits)
    assert near({"": torch.cat(rows, 1)}, {"": forward(params, ids, SMALL)[:, prompt - 1:]}, 50)


def test_growing_a_cache_leaves_what_it_held_as_it_was():
    params, (ids, _) = init_params(TINY, seeded()), examples(TINY, 5)
    _, cache = extend(params, ids[:, :4], TINY, gpt.empty_cache(params, 2, 8, TINY))
    held = cache.buffer[..., :4, :].clone()
    one, two = (extend(params, ids[:, 4:], TINY, cache) for _ in range(2))
    assert same(one[0], two[0])
    assert cache.length == 4 and one[1].length == two[1].length == 5
    assert torch.equal(held, cache.buffer[..., :4, :])


def test_after_the_first_call_a_cache_takes_one_token_at_a_time():
    params, (ids, _) = init_params(TINY, seeded()), examples(TINY, 6)
    _, cache = extend(params, ids[:, :4], TINY, gpt.empty_cache(params, 2, 8, TINY))
    refused(lambda: extend(params, ids[:, 4:], TINY, cache), "one token at a time")


def test_a_cache_refuses_more_tokens_than_its_room_and_than_the_context():
    params, (ids, _) = init_params(TINY, seeded()), examples(TINY, 13)
    for room, limit in ((8, 8), (20, 12)):
        empty = gpt.empty_cache(params, 2, room, TINY)
        words = (f"{limit + 1} tokens", "context_length 12", f"room for {room}")
        refused(lambda empty=empty, limit=limit: extend(params, ids[:, :limit + 1], TINY, empty), *words)
        _, full = extend(params, ids[:, :limit], TINY, empty)
        refused(lambda full=full: extend(params, ids[:, :1], TINY, full), *words)


# Transformations of the functions

@pytest.mark.parametrize("length", LENGTHS)
def test_the_gradient_by_torch_func_is_that_of_autograd(length):
    params, batch = init_params(SMALL, seeded()), examples(SMALL, length)
    ours = torch.func.grad(calc_loss)(params, *batch, SMALL)
    assert near(ours, gradients_of(params, *batch, SMALL), 10)


@QUIET_VMAP
@pytest.mark.parametrize("length", LENGTHS)
def test_the_gradient_of_each_example_by_vmap_is_that_of_the_example_alone(length):
    params, (inputs, targets) = init_params(SMALL, seeded()), examples(SMALL, length, batch=3)

    def loss(params, inputs, targets):
        return calc_loss(params, inputs[None], targets[None], SMALL)
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, inputs, targets)
    for i in range(3):
        alone = gradients_of(params, inputs[i:i + 1], targets[i:i + 1], SMALL)
        assert near({name: tensor[i] for name, tensor in gradients.items()}, alone, 100)


@QUIET_VMAP
@pytest.mark.parametrize("length", LENGTHS)
def test_a_stack_of_models_by_vmap_gives_the_logits_of_each_alone(length):
    models, (ids, _) = [init_params(SMALL, seeded(seed)) for seed in range(3)], examples(SMALL, length)
    stack = {name: torch.stack([params[name] for params in models]) for name in models[0]}
    logits = torch.func.vmap(lambda params: forward(params, ids, SMALL))(stack)
    for ours, params in zip(logits, models, strict=True):
        assert near({"": ours}, {"": forward(params, ids, SMALL)}, 50)


def compiled_is_near(backend):
    """Whether one compiled function gives the logits and gradients of the plain one, for all lengths in turn."""
    torch.compiler.reset()  # else what other tests have compiled would count
    config, compiled = replace(SMALL, n_layers=1), torch.compile(forward, fullgraph=True, backend=backend)
    params = init_params(config, seeded())
    for length in (*LENGTHS, 7, 1):
        inputs, targets = examples(config, length)
        leaves = map_params(lambda tensor: tensor.clone().requires_grad_(), params)
        logits = compiled(leaves, inputs, config)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        gradients = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
        if not (near({"": logits}, {"": forward(params, inputs, config)}, 50)
                and near(gradients, gradients_of(params, inputs, targets, config), 100)):
            return False
    return True


def test_one_compiled_function_serves_all_lengths():
    assert compiled_is_near("aot_eager")


@LONG
@pytest.mark.skipif(not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))),
                    reason="the inductor needs a C++ compiler")
def test_one_function_compiled_by_the_inductor_serves_all_lengths(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert compiled_is_near("inductor")


def second_derivative(params, direction, batch):
    """How the gradient of the loss changes along a direction: reverse mode, twice."""
    def slope(params):
        gradients = torch.func.grad(calc_loss)(params, *batch, SMALL)
        return sum((gradients[name] * direction[name]).sum() for name in gradients)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        return torch.func.grad(slope)(params)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_second_derivative_is_the_change_of_the_gradient(length):
    params, direction, batch = init_params(SMALL, seeded(1)), init_params(SMALL, seeded(2)), examples(SMALL, length)
    exact_params, exact_direction = cast(params, torch.float64), cast(direction, torch.float64)
    exact = second_derivative(exact_params, exact_direction, batch)
    step = 1e-4
    after, before = (
        gradients_of({name: tensor + sign * step * exact_direction[name] for name, tensor in exact_params.items()},
                     *batch, SMALL) for sign in (1, -1))
    measured = {name: (after[name] - before[name]) / (2 * step) for name in after}
    largest = max(float(tensor.abs().max()) for tensor in measured.values())
    for name, tensor in exact.items():
        torch.testing.assert_close(tensor, measured[name], atol=1e-6 * largest, rtol=0)
    # In float32, where oneDNN may take part.
    assert near(second_derivative(params, direction, batch), exact, 100)


# Another device

@NEEDS_ACCELERATOR
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_an_accelerator_computes_the_logits_and_gradients_of_a_cpu(dtype, tolerance):
    params, batch = init_params(SMALL, seeded()), examples(SMALL, 19)
    there, batch_there = cast(params, dtype, ACCELERATOR), [ids.to(ACCELERATOR) for ids in batch]
    torch.testing.assert_close(forward(there, batch_there[0], SMALL).cpu(), forward(params, batch[0], SMALL),
                               atol=10 * tolerance, rtol=tolerance)
    expected = gradients_of(params, *batch, SMALL)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in gradients_of(there, *batch_there, SMALL).items():
        torch.testing.assert_close(gradient.cpu().float(), expected[name], atol=tolerance * largest, rtol=0)


@NEEDS_ACCELERATOR
def test_dropout_on_an_accelerator_draws_from_its_generator_alone():
    def draw(seed):
        return gpt.dropout(torch.ones(10000, device=ACCELERATOR), 0.1, torch.Generator(ACCELERATOR).manual_seed(seed))
    values, counts = draw(1).unique(return_counts=True)
    torch.testing.assert_close(values.cpu(), torch.tensor([0, 1 / 0.9]))
    assert 850 < counts[0] < 1150  # 5 standard deviations
    assert same(draw(1), draw(1)) and not same(draw(1), draw(2))


# The products

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def randoms(shapes, dtype=torch.float32, seed=9):
    return [torch.randn(shape, generator=seeded(seed + i)).to(dtype) for i, shape in enumerate(shapes)]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 7, 16, 50, 58, 64, 96, 101]), st.booleans(),
       st.sampled_from(DTYPES))
def test_linear_is_a_linear_layer_for_every_number_of_rows(rows, fan_in, fan_out, with_bias, dtype):
    x, weight, bias = randoms(((rows, fan_in), (fan_out, fan_in), (fan_out,)), dtype)
    params = {"layer.weight": weight} | ({"layer.bias": bias} if with_bias else {})
    wide = [tensor.double() for tensor in (x, *params.values())]
    exact, largest = F.linear(*wide), F.linear(*(tensor.abs() for tensor in wide))
    roundings = 3 if dtype == torch.bfloat16 else fan_in + 2  # bfloat16 is added up in float32, and then rounded
    for shape in ((1, rows), (rows, 1)):  # one row of tokens, one token in each row
        product = gpt.linear(x.view(*shape, fan_in), params, "layer")
        assert product.shape == (*shape, fan_out) and product.dtype == dtype
        assert close([product.view(rows, fan_out)], [exact], [largest], roundings)


SIZES = (st.integers(1, 3), st.one_of(st.sampled_from(LENGTHS), st.integers(1, 40)), st.integers(1, 40),
         st.integers(1, 40), st.booleans())


def shapes_of(batch, tokens, fan_in, fan_out, with_bias):
    """The shapes of x, weight and, perhaps, bias."""
    return ((batch, tokens, fan_in), (fan_out, fan_in), (fan_out,))[:3 if with_bias else 2]


def onednn_linear(x, weight, bias=None):
    return gpt.onednn_linear(x, weight, bias)


def is_as_exact_as_linear(function, tensors, roundings, product=onednn_linear):
    """Whether function(product, *tensors) is what it is with F.linear as the product.

    It must consist of sums of products of the tensors. Those of their absolute values give the bound.
    """
    wide = [tensor.double() for tensor in tensors]
    return close(function(product, *tensors), function(F.linear, *wide),
                 function(F.linear, *(tensor.abs() for tensor in wide)), roundings)


def value(product, *tensors):
    return [product(*tensors)]


def first_derivatives(product, upstream, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(product(*leaves), leaves, upstream)


def second_derivatives(product, upstream, *tensors):
    """How the slope along a direction, the second half of the tensors, changes with upstream, x and weight."""
    half = len(tensors) // 2
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (upstream, *tensors[:half])]
    gradients = torch.autograd.grad(product(*leaves[1:]), leaves[1:], leaves[0], create_graph=True)
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, tensors[half:], strict=True))
    return torch.autograd.grad(slope, leaves[:3])


@NEEDS_ONEDNN
@given(*SIZES, st.booleans(), st.booleans())
def test_onednns_product_is_a_linear_layer(batch, tokens, fan_in, fan_out, with_bias, x_turned, weight_turned):
    x, weight, *bias = randoms(shapes_of(batch, tokens, fan_in, fan_out, with_bias))
    x = x.mT.contiguous().mT if x_turned else x  # the same values in another order of memory
    weight = weight.t().contiguous().t() if weight_turned else weight
    assert is_as_exact_as_linear(value, (x, weight, *bias), fan_in + 2)


@NEEDS_ONEDNN
@given(*SIZES)
def test_onednns_product_has_the_gradients_of_a_linear_layer(batch, tokens, fan_in, fan_out, with_bias):
    shapes = shapes_of(batch, tokens, fan_in, fan_out, with_bias)
    tensors = randoms(((batch, tokens, fan_out), *shapes))
    assert is_as_exact_as_linear(first_derivatives, tensors, batch * tokens + fan_out)


@NEEDS_ONEDNN
@given(*SIZES)
def test_onednns_product_has_the_second_derivatives_of_a_linear_layer(batch, tokens, fan_in, fan_out, with_bias):
    shapes = shapes_of(batch, tokens, fan_in, fan_out, with_bias)
    tensors = randoms(((batch, tokens, fan_out), *shapes, *shapes))
    assert is_as_exact_as_linear(second_derivatives, tensors, batch * tokens + fan_in + fan_out + 2)


@NEEDS_ONEDNN
@QUIET_VMAP
@given(*SIZES, st.tuples(*[st.sampled_from([None, 0, 1, -1])] * 3))
def test_onednns_product_by_vmap_is_that_of_each_alone(batch, tokens, fan_in, fan_out, with_bias, dims):
    shapes = shapes_of(batch, tokens, fan_in, fan_out, with_bias)
    dims = dims[:len(shapes)] if any(dim is not None for dim in dims[:len(shapes)]) else (0,) * len(shapes)
    tensors = [tensor.select(0, 0) if dim is None else tensor.movedim(0, dim)
               for tensor, dim in zip(randoms([(3, *shape) for shape in shapes]), dims, strict=True)]

    def mapped(product, *tensors):
        return [torch.func.vmap(product, in_dims=dims)(*tensors)]

    def mapped_derivatives(product, *tensors):
        slope = torch.func.grad(lambda *tensors: product(*tensors).sum(), argnums=tuple(range(len(tensors))))
        return torch.func.vmap(slope, in_dims=dims)(*tensors)
    assert is_as_exact_as_linear(mapped, tensors, fan_in + 2)
    assert is_as_exact_as_linear(mapped_derivatives, tensors, batch * tokens + fan_out)


@NEEDS_ONEDNN
@QUIET_VMAP
def test_onednns_product_has_the_jacobian_of_a_linear_layer():
    def jacobians(product, *tensors):
        return torch.func.jacrev(product, argnums=(0, 1, 2))(*tensors)
    assert is_as_exact_as_linear(jacobians, randoms(shapes_of(2, 5, 3, 4, True)), 12)


@NEEDS_ONEDNN
@given(*SIZES)
def test_onednns_product_is_bitwise_the_same_with_gradients_without_and_in_inference_mode(
        batch, tokens, fan_in, fan_out, with_bias):
    x, weight, *bias = randoms(shapes_of(batch, tokens, fan_in, fan_out, with_bias))
    differentiable = onednn_linear(x, weight.clone().requires_grad_(), *bias)
    with torch.no_grad():
        without = onednn_linear(x, weight, *bias)
    with torch.inference_mode():
        inference = onednn_linear(x.clone(), weight, *bias)
    assert differentiable.requires_grad and inference.is_inference()
    assert same((without, inference.clone()), (differentiable.detach(),) * 2)


@NEEDS_ONEDNN
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_onednns_product_has_its_gradients_also_within_inference_mode(argument):
    tensors = randoms(shapes_of(2, 1, 5, 3, True))

    def slope(product, *tensors):
        with torch.inference_mode():
            tensors = [tensor.clone() for tensor in tensors]
            # The others are not arguments of what is differentiated, so that they stay tensors of inference mode.
            before, (tensor, *after) = tensors[:argument], tensors[argument:]
            return [torch.func.grad(lambda tensor: product(*before, tensor, *after).sum())(tensor).clone()]
    assert is_as_exact_as_linear(slope, tensors, 8)


def test_two_to_fifteen_tokens_other_types_and_other_devices_are_left_to_pytorchs_choice():
    weight = torch.zeros(3, 4)
    for length in range(1, 41):
        for dtype in DTYPES:
            if dtype != torch.float32 or 2 <= length <= 15:
                assert gpt.fastest_product(torch.zeros(2, length, 4, dtype=dtype), weight) is F.linear
    assert gpt.fastest_product(torch.zeros(1, 1, 4, device="meta"), weight) is F.linear


@given(*SIZES)
def test_a_padded_product_is_a_linear_layer(batch, tokens, fan_in, fan_out, with_bias):
    def padded(x, weight, bias=None):
        return gpt.padded(x, weight, bias)
    shapes = shapes_of(batch, tokens, fan_in, fan_out, with_bias)
    assert is_as_exact_as_linear(value, randoms(shapes), fan_in + 2, padded)
    slopes = randoms(((batch, tokens, fan_out), *shapes))
    assert is_as_exact_as_linear(first_derivatives, slopes, batch * tokens + fan_out, padded)


@given(st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_one_row_is_multiplied_as_a_linear_layer_does(fan_in, fan_out, with_bias):
    def one_row(x, weight, bias=None):
        return gpt.one_row(x, weight, bias)
    shapes = shapes_of(1, 1, fan_in, fan_out, with_bias)
    assert is_as_exact_as_linear(value, randoms(shapes), fan_in + 2, one_row)
    assert is_as_exact_as_linear(first_derivatives, randoms(((1, 1, fan_out), *shapes)), fan_out + 1, one_row)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5),  # a joined product may add in another order
    (torch.bfloat16, 0.02),
])
def test_packed_parameters_give_the_logits_of_those_they_were_made_from(dtype, tolerance, qkv_bias):
    config = replace(TINY, qkv_bias=qkv_bias)
    params, (ids, _) = cast(init_params(config, seeded()), dtype), examples(config, 5)
    names, packed = list(params), gpt.pack(params)
    for length in (1, 5):
        plain, joined = (extend(each, ids[:, :length], config, gpt.empty_cache(each, 2, 8, config))[0]
                         for each in (params, packed))
        torch.testing.assert_close(joined, plain, atol=tolerance, rtol=tolerance)
    assert list(params) == names  # pack leaves what it gets as it was
    assert gpt.pack(packed).keys() == packed.keys()
    assert not any("W_query." in name for name in packed)


# What makes no sense is refused

@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0),
    ("context_length", -1),
    ("emb_dim", 0),
    ("n_heads", 0),
    ("n_layers", 0),
    ("n_layers", 1.5),
    ("n_heads", True),
    ("emb_dim", 9),
    ("drop_rate", -0.1),
    ("drop_rate", 1),
    ("drop_rate", math.nan),
    ("drop_rate", "0.1"),
    ("qkv_bias", 1),
])
def test_a_config_that_makes_no_sense_is_refused_by_the_fields_name(field, value):
    refused(lambda: replace(TINY, **{field: value}), field)


def test_more_tokens_than_the_context_are_refused():
    params, (ids, targets) = init_params(TINY, seeded()), examples(TINY, 13)
    for call in (lambda: forward(params, ids, TINY), lambda: calc_loss(params, ids, targets, TINY)):
        refused(call, "13 tokens are more than context_length 12")


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 3)])
def test_token_ids_that_are_not_batch_and_tokens_are_refused(shape):
    params, ids = init_params(TINY, seeded()), torch.zeros(shape, dtype=torch.long)
    for call in (lambda: forward(params, ids, TINY),
                 lambda: calc_loss(params, ids, ids, TINY),
                 lambda: extend(params, ids, TINY, gpt.empty_cache(params, 1, 8, TINY)),
                 lambda: train_step(params, init_optimizer(params), ids, ids, TINY)):
        refused(call, f"token_ids must be (batch, tokens), not {shape}", error=ValueError)
