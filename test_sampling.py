"""Temperature, top-k, drawing and generation: the chapter's figures, and what must hold for any logits."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ACCELERATOR, NEEDS_ACCELERATOR, refused, seeded
from gpt import Config, cast, forward, init_params
from sample import generate, keep_top_k, next_token, softmax_with_temperature, stream
from train import init_optimizer, train_step

TOY = dict(closer=4.51, every=0.89, effort=-1.90, forward=6.75, inches=1.63, moves=-1.62, pizza=-1.89, toward=6.28,
           you=1.79)
WORDS, TOY_LOGITS = list(TOY), torch.tensor([list(TOY.values())])


def draw(probabilities, generator):
    return torch.multinomial(probabilities, 1, generator=generator)


def count_draws(temperature, n=1000):
    """How often each toy word is drawn, in n draws one by one."""
    generator, probabilities = seeded(), softmax_with_temperature(TOY_LOGITS, temperature)
    return torch.bincount(torch.cat([draw(probabilities, generator) for _ in range(n)]).flatten(), minlength=9).tolist()


# Section 5.3.1: temperature

def test_the_likeliest_toy_word_and_the_first_draw_are_forward():
    assert WORDS[next_token(TOY_LOGITS)] == "forward"
    assert WORDS[next_token(TOY_LOGITS, temperature=1.0, generator=seeded())] == "forward"


@pytest.mark.parametrize("temperature, counts", [
    (1, dict(closer=73, forward=582, inches=2, toward=343)),
    (0.1, dict(forward=985, toward=15)),
    (5, dict(zip(WORDS, (165, 75, 42, 239, 71, 46, 32, 227, 103), strict=True))),
])
def test_a_thousand_toy_draws_fall_as_in_the_chapter(temperature, counts):
    assert count_draws(temperature) == [counts.get(word, 0) for word in WORDS]


def test_pizza_has_a_probability_of_0_0430_at_temperature_5():
    assert f"{softmax_with_temperature(TOY_LOGITS, 5)[0, WORDS.index('pizza')]:.4f}" == "0.0430"


# Section 5.3.2: top-k

def test_the_three_largest_toy_logits_are_kept():
    kept = keep_top_k(TOY_LOGITS, 3)
    assert TOY_LOGITS.topk(3).indices.tolist() == [[3, 7, 0]]
    assert kept.tolist() == [[x if word in ("forward", "toward", "closer") else -math.inf
                              for word, x in zip(WORDS, TOY_LOGITS[0].tolist(), strict=True)]]
    assert [f"{p:.4f}" for p in kept.softmax(-1)[0]] == [
        "0.0615", "0.0000", "0.0000", "0.5775", "0.0000", "0.0000", "0.0000", "0.3610", "0.0000"]


# What holds for any logits: ties, infinities, wide ranges

values = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0, -1.0, 3e38, -3e38, -math.inf]))
rows = st.lists(values, min_size=1, max_size=30).filter(lambda row: max(row) > -math.inf)
temperatures = st.floats(0, 1e300, exclude_min=True)


@given(rows, temperatures, st.sampled_from([torch.float32, torch.float64]))
def test_probabilities_sum_to_one_at_every_temperature(row, temperature, dtype):
    probabilities = softmax_with_temperature(torch.tensor([row], dtype=dtype), temperature)
    assert (probabilities >= 0).all() and probabilities.sum() == pytest.approx(1, abs=1e-5)


@given(rows, st.data())
def test_an_infinite_logit_takes_all_of_the_probability(row, data):
    row[data.draw(st.integers(0, len(row) - 1))] = math.inf
    probabilities = softmax_with_temperature(torch.tensor([row]), 1.0)[0]
    assert probabilities[[x == math.inf for x in row]].sum() == pytest.approx(1)


@given(rows, st.integers(1, 40))
def test_exactly_k_tokens_survive_and_they_are_the_largest(row, k):
    logits = torch.tensor([row, row[::-1]])
    untouched = logits.clone()
    kept = keep_top_k(logits, k)
    assert torch.equal(logits, untouched)
    for before, after in zip(logits, kept, strict=True):
        survivors = after[after > -math.inf]
        assert len(survivors) == min(k, len(row), sum(x > -math.inf for x in row))
        assert torch.equal(survivors.sort().values, before[before > -math.inf].sort().values[-len(survivors):])
        assert ((after == before) | (after == -math.inf)).all()


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20), st.integers(1, 25))
def test_exactly_k_survive_among_ties(row, k):
    assert (keep_top_k(torch.tensor([row], dtype=torch.float32), k) > -math.inf).sum() == min(k, len(row))


@given(rows, st.integers(0, 2**31))
def test_a_temperature_near_zero_takes_the_largest(row, seed):
    logits = torch.tensor([row], dtype=torch.float64)
    chosen = next_token(logits, temperature=1e-300, generator=seeded(seed))
    assert logits[0, chosen] == logits.max() == logits[0, next_token(logits)]
    close = torch.tensor([[1e-9, 0.0]])
    assert softmax_with_temperature(close, 1e-300).tolist() == [[1.0, 0.0]]


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30), st.floats(0.01, 100), st.floats(1, 100))
def test_a_higher_temperature_never_lowers_the_entropy(row, temperature, factor):
    logits = torch.tensor(row, dtype=torch.float64)

    def entropy(t):
        return torch.special.entr(softmax_with_temperature(logits, t)).sum()
    assert entropy(temperature * factor) >= entropy(temperature) - 1e-9


@given(rows, st.integers(1, 8), st.floats(0.01, 100), st.integers(0, 2**31))
def test_only_survivors_are_ever_drawn(row, k, temperature, seed):
    logits = torch.tensor([row] * 20)
    drawn = draw(softmax_with_temperature(keep_top_k(logits, k), temperature), seeded(seed))
    assert (keep_top_k(logits, k).gather(1, drawn) > -math.inf).all()


@given(rows, st.integers(1, 40), st.floats(0.01, 100), st.integers(0, 2**31))
def test_a_token_is_drawn_by_top_k_then_temperature_then_draw(row, k, temperature, seed):
    logits = torch.tensor([row, row[::-1]])
    by_steps = draw(softmax_with_temperature(keep_top_k(logits, k), temperature), seeded(seed))
    assert torch.equal(next_token(logits, temperature, k, seeded(seed)), by_steps)


@pytest.mark.parametrize("mistake, word", [
    (dict(temperature=-1), "temperature"),
    (dict(temperature=math.nan), "temperature"),
    (dict(temperature=math.inf), "temperature"),
    (dict(top_k=0), "top-k"),
    (dict(top_k=-3), "top-k"),
])
def test_settings_that_make_no_sense_are_refused(mistake, word):
    refused(lambda: next_token(TOY_LOGITS, **{"generator": seeded()} | mistake), word, error=ValueError)


def test_a_softmax_at_temperature_0_is_refused():
    refused(lambda: softmax_with_temperature(TOY_LOGITS, 0), "temperature", error=ValueError)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_nan_are_refused(temperature):
    logits = torch.tensor([[0.0, 1.0], [0.0, math.nan]])
    refused(lambda: next_token(logits, temperature, generator=seeded()), "nan", error=ValueError)


def test_drawing_without_a_generator_is_refused():
    refused(lambda: next_token(TOY_LOGITS, temperature=1.0), "generator", error=ValueError)


# Section 5.3.3: generation

def naive_generate(params, ids, config, n, temperature, top_k, eos_id, generator):
    """The chapter's loop: the whole window through the model at every step."""
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(n):
        logits = forward(params, ids[:, -config.context_length:], config)[:, -1, :]
        if top_k is not None:
            smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = torch.where(logits < smallest, -torch.inf, logits)
        if temperature > 0:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            new = logits.argmax(-1, keepdim=True)
        if eos_id is not None:
            ended |= new[:, 0] == eos_id
            if ended.all():
                break
            new[ended] = eos_id
        ids = torch.cat([ids, new], dim=1)
    return ids


@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 20), st.integers(0, 2**31),
       st.one_of(st.just(0.0), st.floats(0.05, 5)), st.one_of(st.none(), st.integers(1, 20)),
       st.sampled_from([None, 3]))
def test_generate_returns_the_tokens_of_the_naive_loop(batch, length, n, seed, temperature, top_k, eos_id):
    config = Config(vocab_size=13, context_length=6, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.1, qkv_bias=True)
    params = cast(init_params(config, seeded(seed)), torch.float64)  # roundings that differ must not change a token
    ids = torch.randint(13, (batch, length), generator=seeded(seed))
    untouched, state = ids.clone(), torch.get_rng_state()
    expected = naive_generate(params, ids, config, n, temperature, top_k, eos_id, seeded(seed))
    got = generate(params, ids, config, n, temperature, top_k, eos_id, seeded(seed))
    assert torch.equal(got, expected)
    assert torch.equal(ids, untouched) and torch.equal(torch.get_rng_state(), state)


CONFIG = Config(vocab_size=5, context_length=8, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False)


@given(st.integers(0, 2**31))
def test_a_single_prompt_never_contains_the_end_of_sequence_id(seed):
    prompt = torch.tensor([[1, 2]])
    ids = generate(init_params(CONFIG, seeded(seed)), prompt, CONFIG, 30, 1.0, None, 4, seeded(seed))
    assert 4 not in ids and torch.equal(ids[:, :2], prompt)


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_a_row_that_has_ended_is_filled_until_all_have(seed, batch):
    params, prompts = init_params(CONFIG, seeded(seed)), torch.randint(4, (batch, 3), generator=seeded(seed))
    new = generate(params, prompts, CONFIG, 30, 1.0, None, 4, seeded(seed))[:, 3:]
    for row in new:
        end = (row == 4).nonzero().flatten()[:1]
        assert len(end) == 0 or (row[end:] == 4).all()
    assert new.shape[1] == 0 or (new[:, -1] != 4).any()


def test_an_empty_prompt_is_refused():
    prompt = torch.zeros(1, 0, dtype=torch.long)
    refused(lambda: generate(init_params(CONFIG, seeded()), prompt, CONFIG, 3), "at least one token", error=ValueError)


def test_a_negative_number_of_new_tokens_is_refused():
    prompt = torch.tensor([[1, 2]])
    refused(lambda: generate(init_params(CONFIG, seeded()), prompt, CONFIG, -1), "max_new_tokens", error=ValueError)


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 3)])
def test_a_prompt_that_is_not_batch_and_tokens_is_refused(shape):
    prompt = torch.zeros(shape, dtype=torch.long)
    refused(lambda: generate(init_params(CONFIG, seeded()), prompt, CONFIG, 3),
            f"token_ids must be (batch, tokens), not {shape}", error=ValueError)


def test_the_tokens_come_one_by_one():
    params, prompt = init_params(CONFIG, seeded()), torch.tensor([[1, 2]])
    tokens = stream(params, prompt, CONFIG, 4)
    first = next(tokens)
    assert first.shape == (1, 1)
    assert torch.equal(torch.cat([prompt, first, *tokens], 1), generate(params, prompt, CONFIG, 4))


def test_the_reader_of_a_stream_can_compute_gradients_between_its_tokens():
    params, prompt = init_params(CONFIG, seeded()), torch.tensor([[1, 2]])
    for _ in stream(params, prompt, CONFIG, 3):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_what_was_generated_can_be_trained_on():
    params = init_params(CONFIG, seeded())
    ids = generate(params, torch.tensor([[1, 2]]), CONFIG, 6)
    train_step(params, init_optimizer(params), ids[:, :-1], ids[:, 1:], CONFIG)


@NEEDS_ACCELERATOR
def test_an_accelerator_generates_what_a_cpu_does_and_draws_from_its_generator_alone():
    config = Config(31, context_length=12, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)
    params, prompt = init_params(config, seeded()), torch.tensor([[1, 2, 3], [4, 5, 6]])
    there, prompt_there = cast(params, torch.float32, ACCELERATOR), prompt.to(ACCELERATOR)
    expected = generate(params, prompt, config, 20)  # also past the window
    assert torch.equal(generate(there, prompt_there, config, 20).cpu(), expected)
    drawn = [generate(there, prompt_there, config, 20, 1.0, 5, generator=torch.Generator(ACCELERATOR).manual_seed(seed))
             for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
