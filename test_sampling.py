"""Temperature, top-k and generation: what holds for any logits, then the chapter's figures, then text and tokens.

A reader learns what each setting does to a draw, and that the fast `generate` writes what the chapter's loop writes.
"""
import io
import math
import runpy
import shutil
from contextlib import redirect_stdout

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import HERE, TINY, assert_refused, configs, noisy_params, random_ids, seeded, seeds
from gpt import calc_loss, forward, init_params
from sample import (generate, generate_simple, gpt2_tokenizer, keep_top_k, next_token, softmax_with_temperature, stream,
                    text_to_token_ids, token_ids_to_text, write)

# Eighths are exact, so that equal ones stay equal; 3e38 is nearly the largest number of float32.
logits = st.integers(-800, 800).map(lambda n: n / 8) | st.sampled_from([0.0, 1.0, 3e38, -3e38])
rows = st.lists(logits, min_size=1, max_size=30) | st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=30)
dtypes = st.sampled_from([torch.float32, torch.float64])


# What holds for any logits, with ties and over wide ranges
@given(rows, st.floats(0, 1e38, exclude_min=True), dtypes)
def test_probabilities_sum_to_one_at_every_temperature(row, temperature, dtype):
    probabilities = softmax_with_temperature(torch.tensor([row, row[::-1]], dtype=dtype), temperature)
    assert (probabilities >= 0).all() and probabilities.sum(-1).tolist() == pytest.approx([1, 1], abs=1e-5)


@given(rows, st.sampled_from([0.001, 0.1, 1, 5, 1e30]), st.sampled_from([1, 1.5, 100]), dtypes)
def test_the_higher_the_temperature_the_less_likely_is_the_likeliest(row, temperature, factor, dtype):
    lower, higher = (softmax_with_temperature(torch.tensor(row, dtype=dtype), each).max()
                     for each in (temperature, factor * temperature))
    assert lower >= higher - 1e-6 and higher >= 1 / len(row) - 1e-6


@given(rows, st.integers(1, 40), dtypes)
@example([1.0, 2.0, 1.0, 1.0], 2, torch.float32)  # three are the second largest
def test_top_k_keeps_exactly_k_of_the_largest_where_they_stand(row, k, dtype):
    before = torch.tensor([row, row[::-1]], dtype=dtype)
    for given_row, after in zip(before.tolist(), keep_top_k(before, k).tolist(), strict=True):
        assert sorted(after)[-k:] == sorted(given_row)[-k:]
        assert sum(x > -math.inf for x in after) == min(k, len(row))
        assert all(x in (y, -math.inf) for x, y in zip(after, given_row, strict=True))


@given(rows, seeds, dtypes, st.sampled_from([0, 1e-300, 1e-4]))
def test_a_temperature_towards_zero_takes_the_largest(row, seed, dtype, temperature):
    before = torch.tensor([row, row[::-1]], dtype=dtype)
    chosen = next_token(before, temperature, generator=seeded(seed))
    assert torch.equal(before.gather(1, chosen), before.amax(1, keepdim=True))


@given(configs, seeds, st.integers(1, 12), st.integers(3, 9), st.sampled_from([0.0, 0.7, 1.4]),
       st.sampled_from([None, 1, 3, 20]), st.none() | st.integers(0, 30))
@example(TINY, 1, 5, 15, 0.0, None, None)  # each of these fails if one setting is ignored
@example(TINY, 1, 5, 15, 0.7, None, None)
@example(TINY, 1, 5, 15, 1.4, 3, None)
@example(TINY, 1, 5, 15, 1.4, None, 3)
def test_the_cached_loop_writes_what_the_chapters_writes(config, seed, length, n, temperature, top_k, eos_id):
    params, prompt, random_state = noisy_params(config, seed=seed), random_ids(config, 1, length), torch.get_rng_state()
    generators = seeded(seed), seeded(seed)
    expected, ids = (function(params, prompt, config, n, temperature, top_k, eos_id, generator)
                     for function, generator in zip((generate_simple, generate), generators, strict=True))
    assert torch.equal(ids, expected) and torch.equal(prompt, random_ids(config, 1, length))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert torch.equal(torch.get_rng_state(), random_state)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30, unique=True), st.integers(1, 5) | st.none(),
       st.sampled_from([0.1, 0.7, 1.0, 1.4, 50.0]), seeds)
def test_draws_are_by_the_exponentials_of_the_k_largest(row, k, temperature, seed):
    logits, generators = torch.tensor([row], dtype=torch.float64), (seeded(seed), seeded(seed))
    smallest_kept = sorted(row)[-min(k or len(row), len(row))]
    weights = torch.tensor([math.exp(x / temperature) if x >= smallest_kept else 0.0 for x in row], dtype=torch.float64)
    for _ in range(20):
        drawn = next_token(logits, temperature, k, generators[0])
        assert drawn == torch.multinomial(weights, 1, generator=generators[1])


@given(configs, seeds, st.integers(1, 4), st.integers(0, 5))
@example(TINY, 1, 4, 3)
def test_rows_that_have_ended_are_filled_until_all_have(config, seed, batch, eos_id):
    params, rows = noisy_params(config, seed=seed), random_ids(config, batch, 3)
    alone = [generate_simple(params, row[None], config, 12, eos_id=eos_id)[0] for row in rows]
    longest = max(map(len, alone))
    expected = torch.stack([F.pad(row, (0, longest - len(row)), value=eos_id) for row in alone])
    assert torch.equal(generate(params, rows, config, 12, eos_id=eos_id), expected)


# Section 5.3: the chapter's figures
TOY = dict(closer=4.51, every=0.89, effort=-1.90, forward=6.75, inches=1.63, moves=-1.62, pizza=-1.89, toward=6.28,
           you=1.79)
WORDS, TOY_LOGITS = list(TOY), torch.tensor([list(TOY.values())])


def test_the_likeliest_toy_word_and_the_first_that_is_drawn_are_forward():
    assert WORDS[next_token(TOY_LOGITS)] == "forward"
    assert WORDS[next_token(TOY_LOGITS, temperature=1.0, generator=seeded())] == "forward"


@pytest.mark.parametrize("temperature, counts", [
    (1, dict(closer=73, forward=582, inches=2, toward=343)),
    (0.1, dict(forward=985, toward=15)),
    (5, dict(zip(WORDS, (165, 75, 42, 239, 71, 46, 32, 227, 103), strict=True))),
])
def test_a_thousand_toy_draws_fall_as_in_the_chapter(temperature, counts):
    generator = seeded()
    drawn = [WORDS[next_token(TOY_LOGITS, temperature, generator=generator)] for _ in range(1000)]
    assert {word: drawn.count(word) for word in set(drawn)} == counts


def test_the_probabilities_of_toy_words_are_the_chapters():
    assert softmax_with_temperature(TOY_LOGITS, 5)[0, WORDS.index("pizza")].item() == pytest.approx(0.0430, abs=5e-5)
    top_3 = [0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0]
    assert keep_top_k(TOY_LOGITS, 3).softmax(-1)[0].tolist() == pytest.approx(top_3, abs=5e-5)


# Generation
def test_the_model_sees_the_last_tokens_that_fit_into_its_context():
    params, ids = noisy_params(TINY), random_ids(TINY, 1, 20)
    expected = forward(params, ids[:, -12:], TINY)[0, -1].argmax()
    assert generate_simple(params, ids, TINY, 1)[0, -1] == generate(params, ids, TINY, 1)[0, -1] == expected


def test_tokens_come_as_they_are_drawn():
    params, prompt, generators = noisy_params(TINY), random_ids(TINY, 2, 3), (seeded(), seeded())
    tokens = stream(params, prompt, TINY, 5, 1.0, generator=generators[0])
    first = next(tokens)
    assert torch.equal(torch.cat([prompt, first], 1), generate(params, prompt, TINY, 1, 1.0, generator=generators[1]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())  # no further one was drawn
    # Between tokens the caller is not in inference mode, though the tokens come from it.
    assert first.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert [token.shape for token in tokens] == [(2, 1)] * 4


def test_what_was_generated_can_be_trained_on():
    params = init_params(TINY, seeded())
    ids = generate(params, random_ids(TINY, 1, 3), TINY, 6)
    gradients = torch.func.grad(calc_loss)(params, ids[:, :-1], ids[:, 1:], TINY)
    assert not ids.is_inference() and gradients["tok_emb.weight"].abs().max() > 0


@pytest.mark.parametrize("row, settings, word", [
    ([0.0, 1.0], dict(temperature=-1.0), "temperature"),
    ([0.0, 1.0], dict(temperature=math.nan), "temperature"),
    ([0.0, 1.0], dict(temperature=math.inf), "temperature"),
    ([0.0, 1.0], dict(temperature=1.0, generator=None), "generator"),
    ([0.0, 1.0], dict(top_k=0), "top-k"),
    ([0.0, math.nan], {}, "nan"),
    ([0.0, math.inf], dict(temperature=1.0), "inf"),
    ([-math.inf, -math.inf], {}, "inf"),
])
def test_settings_and_logits_that_make_no_sense_are_refused(row, settings, word):
    both = torch.tensor([[0.0, 1.0], row])
    assert_refused(lambda: next_token(both, **{"generator": seeded()} | settings), word, error=ValueError)
    assert_refused(lambda: softmax_with_temperature(both, 0), "temperature", error=ValueError)


# Text and tokens
TOKENIZER = gpt2_tokenizer()


def test_gpt2s_tokens_are_the_chapters():
    assert TOKENIZER.n_vocab == 50257
    assert text_to_token_ids("every effort moves you", TOKENIZER).tolist() == [[16833, 3626, 6100, 345]]
    assert text_to_token_ids("a<|endoftext|>b", TOKENIZER).tolist() == [[64, 50256, 65]]
    assert token_ids_to_text(torch.tensor([[1107, 588, 11311]]), TOKENIZER) == " really like chocolate"


@given(st.lists(st.text() | st.sampled_from(["<|endoftext|>", "\r\n", "  ", "中🦆"])).map("".join))
def test_tokens_become_the_text_that_they_were_made_of(text):
    ids = text_to_token_ids(text, TOKENIZER)
    assert ids.dtype == torch.long and ids.shape[0] == 1
    assert token_ids_to_text(ids, TOKENIZER) == token_ids_to_text(ids[0], TOKENIZER) == text


def test_a_vocabulary_with_two_tokens_exchanged_is_refused(tmp_path):
    lines = (HERE / "r50k_base.tiktoken").read_text(encoding="ascii").splitlines(keepends=True)
    tokens, ranks = zip(*map(str.split, lines[300:302]), strict=True)
    lines[300:302] = [f"{token} {rank}\n" for token, rank in zip(tokens, reversed(ranks), strict=True)]
    (tmp_path / "r50k_base.tiktoken").write_text("".join(lines), encoding="ascii", newline="\n")
    beside = runpy.run_path(shutil.copy(HERE / "sample.py", tmp_path))
    assert_refused(beside["gpt2_tokenizer"], "damaged", error=ValueError)


def test_tokens_are_shown_at_once_and_characters_whole():
    out, shown = io.BytesIO(), []
    ids = text_to_token_ids(" a 🦆!", TOKENIZER)

    def tokens():
        for token in ids.split(1, dim=1):
            shown.append(out.getvalue().decode())
            yield token
    with redirect_stdout(io.TextIOWrapper(out, encoding="utf-8", newline="\n")):
        assert write("This is", tokens(), TOKENIZER) == ids.shape[1] == 5
        assert shown[:2] == ["This is", "This is a"]
        assert out.getvalue().decode() == "This is a 🦆!\n"
        write("", iter(ids[:, 1:2]), TOKENIZER)  # a blank and a part of the duck
        assert out.getvalue().decode() == "This is a 🦆!\n \ufffd\n"
