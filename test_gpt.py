"""The model, the loss, the data and the training step, held to the figures that the chapter prints."""
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt
import train
from gpt import GPT_CONFIG_124M, Config, calc_loss, cast, forward, init_params
from sample import generate, gpt2_tokenizer, text_to_token_ids, token_ids_to_text

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")
LONG = pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="takes minutes: set LONG_TESTS=1")
HERE, CPU = Path(__file__).parent, torch.device("cpu")
TINY = Config(vocab_size=31, context_length=12, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.3, qkv_bias=True)
INPUTS = torch.tensor([[16833, 3626, 6100], [40, 1107, 588]])    # "every effort moves", "I really like"
TARGETS = torch.tensor([[3626, 6100, 345], [1107, 588, 11311]])  # " effort moves you", " really like chocolate"

TRAINING_LOG = """\
Ep 1 (Step 000000): Train loss 9.781, Val loss 9.933
Ep 1 (Step 000005): Train loss 8.111, Val loss 8.339
Every effort moves you,,,,,,,,,,,,.                                     
Ep 2 (Step 000010): Train loss 6.661, Val loss 7.048
Ep 2 (Step 000015): Train loss 5.961, Val loss 6.616
Every effort moves you, and, and, and, and, and, and, and, and, and, and, and, and, and, and, and, and, and, and, and, \
and, and, and,, and, and,
Ep 3 (Step 000020): Train loss 5.726, Val loss 6.600
Ep 3 (Step 000025): Train loss 5.201, Val loss 6.348
Every effort moves you, and I had been.                                            
Ep 4 (Step 000030): Train loss 4.417, Val loss 6.278
Ep 4 (Step 000035): Train loss 4.069, Val loss 6.226
Every effort moves you know the                          "I he had the donkey and I had the and I had the donkey and \
down the room, I had
Ep 5 (Step 000040): Train loss 3.732, Val loss 6.160
Every effort moves you know it was not that the picture--I had the fact by the last I had been--his, and in the        \
    "Oh, and he said, and down the room, and in
Ep 6 (Step 000045): Train loss 2.850, Val loss 6.179
Ep 6 (Step 000050): Train loss 2.427, Val loss 6.141
Every effort moves you know," was one of the picture. The--I had a little of a little: "Yes, and in fact, and in the \
picture was, and I had been at my elbow and as his pictures, and down the room, I had
Ep 7 (Step 000055): Train loss 2.104, Val loss 6.134
Ep 7 (Step 000060): Train loss 1.882, Val loss 6.233
Every effort moves you know," was one of the picture for nothing--I told Mrs.  "I was no--as! The women had been, in \
the moment--as Jack himself, as once one had been the donkey, and were, and in his
Ep 8 (Step 000065): Train loss 1.320, Val loss 6.238
Ep 8 (Step 000070): Train loss 0.985, Val loss 6.242
Every effort moves you know," was one of the axioms he had been the tips of a self-confident moustache, I felt to see \
a smile behind his close grayish beard--as if he had the donkey. "strongest," as his
Ep 9 (Step 000075): Train loss 0.717, Val loss 6.293
Ep 9 (Step 000080): Train loss 0.541, Val loss 6.393
Every effort moves you?"  "Yes--quite insensible to the irony. She wanted him vindicated--and by me!"  He laughed \
again, and threw back the window-curtains, I had the donkey. "There were days when I
Ep 10 (Step 000085): Train loss 0.391, Val loss 6.452
Every effort moves you know," was one of the axioms he laid down across the Sevres and silver of an exquisitely \
appointed luncheon-table, when, on a later day, I had again run over from Monte Carlo; and Mrs. Gis
"""
GREEDY_SENTENCE = ('Every effort moves you know," was one of the axioms he laid down across the Sevres and silver '
                   "of an exquisitely appointed lun\n")
SAMPLED_SENTENCE = "Every effort moves you stand to work on surprise, a one of us had gone with random-\n"


def seeded(seed=123):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def untrained():
    """The parameters of the chapter's untrained model; tests must not train them."""
    return init_params(GPT_CONFIG_124M, seeded())


@pytest.fixture(scope="module")
def verdict():
    return (HERE / "the-verdict.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def windows(verdict, tokenizer):
    split = int(0.9 * len(verdict))
    return [train.make_windows(train.tokenize(part, tokenizer), 256) for part in (verdict[:split], verdict[split:])]


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

    of_targets = probabilities.gather(2, TARGETS[:, :, None]).squeeze(2)
    # The book prints the first as 7.4541e-05. It is 7.454047e-05 in double precision, and with the chapter's own code.
    assert [f"{p:.4e}" for p in of_targets.flatten()] == [
        "7.4540e-05", "3.1061e-05", "1.1563e-05", "1.0337e-05", "5.6776e-05", "4.7559e-06"]
    assert of_targets[0, 0] == pytest.approx(7.4541e-05, abs=1e-9)
    logs = of_targets.log().flatten()
    assert [f"{p:.4f}" for p in logs] == ["-9.5042", "-10.3796", "-11.3677", "-11.4798", "-9.7764", "-12.2561"]
    assert f"{logs.mean():.4f}" == "-10.7940"
    by_hand = -logs.mean()
    assert f"{by_hand:.4f}" == "10.7940"

    library = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    ours = calc_loss(untrained, INPUTS, TARGETS, GPT_CONFIG_124M)
    assert f"{library:.4f}" == f"{ours:.4f}" == "10.7940"
    assert f"{ours.exp():.4f}" == "48725.8203"  # the perplexity


# Section 5.1.3: the data

def test_the_verdict_has_20479_characters_and_5145_tokens(verdict, tokenizer):
    assert len(verdict) == 20479
    assert len(train.tokenize(verdict, tokenizer)) == 5145


def test_the_losses_of_the_untrained_model_are_the_chapters(untrained, windows):
    assert len(train.batches(len(windows[0]), 2, seeded(), shuffle=True)) == 9
    assert len(train.batches(len(windows[1]), 2, seeded(), shuffle=False)) == 1
    losses = train.evaluate_model(untrained, *windows, 2, GPT_CONFIG_124M, seeded())
    assert losses == pytest.approx((10.98758, 10.98110), abs=1e-5)


@given(st.integers(0, 300), st.integers(1, 40))
def test_windows_start_where_the_chapters_do_and_targets_are_one_later(n, length):
    tokens = np.arange(n, dtype=np.uint16)
    windows = train.make_windows(tokens, length)
    assert [int(w[0]) for w in windows] == list(range(0, n - length, length))
    if len(windows):
        inputs, targets = train.batch_of(windows, torch.arange(len(windows)), CPU)
        assert torch.equal(inputs + 1, targets) and inputs.shape[1] == length


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 2**31))
def test_a_pass_draws_what_pytorchs_data_loader_draws(n, batch_size, seed):
    for shuffle in (True, False):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(torch.arange(n), batch_size, shuffle=shuffle, drop_last=shuffle)
        generator = seeded(seed)
        expected = [batch.tolist() for batch in loader]
        assert expected == [rows.tolist() for rows in train.batches(n, batch_size, generator, shuffle)]
        assert torch.equal(generator.get_state(), torch.get_rng_state())


@given(st.text(st.sampled_from("ab é中🙂 \n\t\r\x1c\u2003'.1<|endoftext|>"), max_size=300), st.integers(1, 8))
def test_a_text_tokenized_in_pieces_has_the_tokens_of_the_whole(tokenizer, text, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "PIECE", piece)
        assert train.tokenize(text, tokenizer).tolist() == text_to_token_ids(text, tokenizer)[0].tolist()


# The random stream

@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_drawn_as_pytorchs_layers_draw_them(bias):
    config = Config(vocab_size=50, context_length=7, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=bias)
    params = init_params(config, seeded())
    torch.manual_seed(123)
    expected = {"tok_emb": torch.nn.Embedding(50, 12), "pos_emb": torch.nn.Embedding(7, 12)}
    for i in range(2):
        shapes = {"att.W_query": (12, 12, bias), "att.W_key": (12, 12, bias), "att.W_value": (12, 12, bias),
                  "att.out_proj": (12, 12), "ff.layers.0": (12, 48), "ff.layers.2": (48, 12)}
        expected |= {f"trf_blocks.{i}.{name}": torch.nn.Linear(*shape) for name, shape in shapes.items()}
    expected["out_head"] = torch.nn.Linear(12, 50, bias=False)
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

def test_the_first_six_steps_print_the_chapters_losses(windows):
    generator = seeded()
    params = init_params(GPT_CONFIG_124M, generator)
    opt_state, lines = train.init_optimizer(params), []
    for step, rows in enumerate(train.batches(len(windows[0]), 2, generator, shuffle=True)[:6]):
        batch = train.batch_of(windows[0], rows, CPU)
        params, opt_state, _ = train.train_step(params, opt_state, *batch, GPT_CONFIG_124M, generator)
        if step % 5 == 0:
            losses = train.evaluate_model(params, *windows, 2, GPT_CONFIG_124M, generator, eval_iter=5)
            lines.append("Ep 1 (Step {:06d}): Train loss {:.3f}, Val loss {:.3f}".format(step, *losses))
    assert lines == TRAINING_LOG.splitlines()[:2]


@LONG
def test_training_and_sampling_print_the_whole_of_section_5_2_and_5_3(tmp_path):
    def command(script, *arguments):
        done = subprocess.run([sys.executable, str(HERE / script), *arguments], cwd=tmp_path, capture_output=True,
                              encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout
    data = ("--data", str(HERE / "the-verdict.txt"))
    first = command("train.py", *data, "--epochs", "5")
    assert first + command("train.py", *data, "--resume", "--epochs", "10") == TRAINING_LOG
    resumed = torch.load(tmp_path / "model.pth", weights_only=True)["model_state_dict"]
    assert command("train.py", *data) == TRAINING_LOG
    straight = torch.load(tmp_path / "model.pth", weights_only=True)["model_state_dict"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert command("sample.py") == GREEDY_SENTENCE
    sampling = ("--top-k", "25", "--temperature", "1.4", "--seed", "123", "--max-new-tokens", "15")
    assert command("sample.py", *sampling) == SAMPLED_SENTENCE


@LONG
def test_bfloat16_training_stays_within_3_percent_of_float32_up_to_step_40(tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "train.py"), "--data", str(HERE / "the-verdict.txt"), "--dtype",
                           "bfloat16"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr

    def losses(log):
        lines = [line.split() for line in log.splitlines() if line.startswith("Ep ") and "Train loss" in line][:9]
        return [float(words[i].rstrip(",")) for words in lines for i in (6, 9)]
    assert losses(done.stdout) == pytest.approx(losses(TRAINING_LOG), rel=0.03)


def test_a_step_is_one_of_pytorchs_adamw():
    config = replace(TINY, drop_rate=0.0, qkv_bias=False)  # a key's bias has gradient 0, of which AdamW sees the noise
    params = init_params(config, seeded())
    reference = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in params.items()}
    optimizer = torch.optim.AdamW(reference.values(), lr=0.01, weight_decay=0.1)
    opt_state, ids = train.init_optimizer(params), torch.randint(31, (2, 9), generator=seeded())
    for _ in range(3):
        params, opt_state, loss = train.train_step(params, opt_state, ids[:, :-1], ids[:, 1:], config, lr=0.01)
        expected = calc_loss(reference, ids[:, :-1], ids[:, 1:], config)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), abs=1e-6)
    states = optimizer.state_dict()["state"]
    for i, name in enumerate(params):
        torch.testing.assert_close(params[name], reference[name].detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(opt_state[name], states[i], atol=1e-6, rtol=1e-4)


def test_tied_weights_stay_tied_through_a_step():
    params = init_params(TINY, seeded())
    params["out_head.weight"] = params["tok_emb.weight"]
    ids = torch.randint(31, (2, 9), generator=seeded())
    before = params["tok_emb.weight"].clone()
    params, _, _ = train.train_step(params, train.init_optimizer(params), ids[:, :-1], ids[:, 1:], TINY, lr=0.1,
                                    weight_decay=0.0)
    assert params["out_head.weight"] is params["tok_emb.weight"]
    moved = (params["tok_emb.weight"] - before).abs()
    assert 0.09 < moved.max() < 0.11  # AdamW's first step moves by lr: once, not once for each of the two names


# The functions are pure

def configs():
    return st.builds(
        lambda heads, size, layers, context, bias, rate: Config(23, context, heads * size, heads, layers, rate, bias),
        st.integers(1, 3), st.integers(1, 5), st.integers(1, 2), st.integers(1, 9), st.booleans(),
        st.sampled_from([0.0, 0.4]))


@settings(max_examples=40)
@given(configs(), st.integers(1, 3), st.integers(0, 2**31))
def test_calls_change_neither_their_arguments_nor_pytorchs_random_state(config, batch, seed):
    params = init_params(config, seeded(seed))
    ids = torch.randint(23, (batch, config.context_length), generator=seeded(seed))
    targets = ids.roll(1, 1)
    kept = {name: tensor.clone() for name, tensor in params.items()}
    ids_kept, targets_kept, state, settings_kept = ids.clone(), targets.clone(), torch.get_rng_state(), asdict(config)

    def results():
        logits = forward(params, ids, config, cache=gpt.empty_cache(params, batch, config.context_length, config))
        return [forward(params, ids, config), forward(params, ids, config, seeded(7)), logits,
                calc_loss(params, ids, targets, config, seeded(7)), *init_params(config, seeded(3)).values()]
    assert all(torch.equal(one, two) for one, two in zip(results(), results(), strict=True))  # bitwise the same
    copy = {name: tensor.clone() for name, tensor in params.items()}
    train.train_step(copy, train.init_optimizer(copy), ids, targets, config, seeded(7))
    assert torch.equal(ids, ids_kept) and torch.equal(targets, targets_kept)
    assert all(torch.equal(params[name], kept[name]) for name in kept) and asdict(config) == settings_kept
    assert torch.equal(torch.get_rng_state(), state)


def test_growing_a_cache_leaves_what_it_held_as_it_was():
    params, ids = init_params(TINY, seeded()), torch.randint(31, (2, 5), generator=seeded())
    cache = gpt.empty_cache(params, 2, 8, TINY)
    forward(params, ids[:, :4], TINY, cache=cache)
    held = cache[..., :4, :].clone()
    one, two = (forward(params, ids[:, 4:], TINY, cache=cache, start=4) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(held, cache[..., :4, :])


def test_after_the_first_call_a_cache_takes_one_token_at_a_time():
    params, ids = init_params(TINY, seeded()), torch.randint(31, (2, 6), generator=seeded())
    cache = gpt.empty_cache(params, 2, 8, TINY)
    forward(params, ids[:, :4], TINY, cache=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        forward(params, ids[:, 4:], TINY, cache=cache, start=4)


def test_dropout_happens_exactly_when_a_generator_is_passed():
    params, ids = init_params(TINY, seeded()), torch.randint(31, (2, 12), generator=seeded())
    plain = forward(params, ids, TINY)
    assert torch.equal(plain, forward(params, ids, replace(TINY, drop_rate=0.0)))
    assert torch.equal(plain, forward(params, ids, replace(TINY, drop_rate=0.0), seeded()))
    assert not torch.allclose(plain, forward(params, ids, TINY, seeded()), atol=1e-3)


def test_attention_by_hand_equals_the_fused_one():
    params, ids = init_params(TINY, seeded()), torch.randint(31, (2, 12), generator=seeded())
    almost_none = replace(TINY, drop_rate=1e-12)
    torch.testing.assert_close(forward(params, ids, almost_none, seeded()), forward(params, ids, TINY))


@settings(max_examples=40)
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


@settings(max_examples=60)
@given(configs(), st.integers(2, 20))
def test_a_rows_logits_do_not_depend_on_the_other_rows(config, batch):
    params = cast(init_params(config, seeded(1)), torch.float64)  # a norm over 2 near values magnifies any rounding
    ids = torch.randint(23, (batch, config.context_length), generator=seeded(2))
    together = forward(params, ids, config)
    for row in range(batch):
        torch.testing.assert_close(together[row], forward(params, ids[row:row + 1], config)[0], atol=1e-7, rtol=1e-7)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 7, 16, 50, 58, 64, 96, 101]), st.booleans(),
       st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_matmul_is_a_linear_layer_for_every_number_of_rows(rows, fan_in, fan_out, with_bias, dtype):
    shapes = ((rows, fan_in), (fan_out, fan_in), (fan_out,))
    x, weight, bias = (torch.randn(shape, generator=seeded(9)).to(dtype) for shape in shapes)
    bias = bias if with_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    for shape in ((1, rows), (rows, 1)):  # one row of tokens, one token in each row
        product = gpt.matmul(x.view(*shape, fan_in), weight, bias)
        torch.testing.assert_close(product.view(rows, fan_out).double(), exact, atol=tolerance, rtol=tolerance)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_matmul_has_the_gradients_of_a_linear_layer(batch, tokens, fan_in, fan_out, with_bias):
    shapes = ((batch, tokens, fan_in), (fan_out, fan_in), (fan_out,))[:3 if with_bias else 2]
    ours = [torch.randn(shape, generator=seeded(9)).requires_grad_() for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    upstream = torch.randn(batch, tokens, fan_out, generator=seeded(8))
    for product, tensors in ((gpt.matmul, ours), (F.linear, theirs)):
        (product(*tensors) * upstream).sum().backward()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-4)


def test_packed_parameters_give_the_logits_of_those_they_were_made_from():
    params = cast(init_params(TINY, seeded()), torch.bfloat16)
    ids = torch.randint(31, (2, 5), generator=seeded())
    plain, packed = (forward(each, ids, TINY, cache=gpt.empty_cache(each, 2, 8, TINY))
                     for each in (params, gpt.pack(params)))
    torch.testing.assert_close(packed, plain, atol=0.02, rtol=0.02)
    assert gpt.pack(gpt.pack(params)).keys() == params.keys()
    single = init_params(TINY, seeded())
    assert all(gpt.pack(single)[name] is tensor for name, tensor in single.items())


# What makes no sense is refused

@pytest.mark.parametrize("field, value", [
    ("vocab_size", 0), ("context_length", -1), ("emb_dim", 0), ("n_heads", 0), ("n_layers", 0), ("n_layers", 1.5),
    ("n_heads", True), ("emb_dim", 9), ("drop_rate", -0.1), ("drop_rate", 1), ("drop_rate", math.nan),
    ("drop_rate", "0.1"), ("qkv_bias", 1)])
def test_a_config_that_makes_no_sense_is_refused_by_the_fields_name(field, value):
    with pytest.raises(ValueError, match=field):
        replace(TINY, **{field: value})


def test_more_tokens_than_the_context_are_refused():
    params, ids = init_params(TINY, seeded()), torch.zeros(1, 13, dtype=torch.long)
    cache = gpt.empty_cache(params, 1, 13, TINY)
    for arguments in ((ids, TINY), (ids[:, :1], TINY, None, cache, 12)):
        with pytest.raises(ValueError, match="13 tokens are more than context_length 12"):
            forward(params, *arguments)


def test_logits_are_float32_at_least():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        params = cast(init_params(TINY, seeded()), dtype)
        assert forward(params, torch.zeros(1, 3, dtype=torch.long), TINY).dtype == expected
