"""The run as a sequence of states: how it goes on, what it prints and saves, where it begins and what it refuses."""
import io
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ACCELERATOR, HERE, NEEDS_ACCELERATOR, ROUNDING, STORY, TINY, refused, same, seeded
from gpt import Config, calc_loss, distinct, init_params
from sample import flag, generate, gpt2_tokenizer
from train import (
    ONE_PROCESS,
    Files,
    Processes,
    Run,
    Settings,
    State,
    build_parser,
    check_room,
    choose,
    draw_batches,
    dropout_generator,
    get_batch,
    is_best,
    is_evaluation_due,
    is_finished,
    is_save_due,
    learning_rate,
    log_lines,
    make_run,
    make_windows,
    mean_loss,
    next_state,
    plot_losses,
    prepare,
    read_text,
    save_state,
    start_lines,
    start_state,
    to_checkpoint,
    train,
)
from weights import Checkpoint, OptState, from_fields, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")
WITHOUT_DROPOUT = replace(TINY, drop_rate=0.0)
NO_KEY_BIAS = replace(WITHOUT_DROPOUT, qkv_bias=False)  # its gradient is 0 but for rounding, which AdamW makes large


class Letters:
    """A tokenizer of TINY's vocabulary: each character is a token, and many a token is the end of a line."""
    letters = "\n" * 11 + "abcdefghijklmnopqrst"

    def encode(self, text, allowed_special=()):
        return [ord(character) % len(self.letters) for character in text]

    def decode(self, tokens):
        return "".join(self.letters[token] for token in tokens)


class Asked:
    """Signals of which one has come when they are asked for the k-th time, counted from 0. `look` may look around."""
    def __init__(self, k=10**9, look=lambda: None):
        self.k, self.look, self.seen = k, look, []

    def __bool__(self):
        self.seen.append(self.look())
        return len(self.seen) > self.k


def random_windows(n, length, vocab_size=31, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, (n, length + 1)).astype(np.uint16)


def small_run(config=TINY, processes=ONE_PROCESS, **settings):
    """A run of 6 steps an epoch, each of 2 windows of 4 tokens; one window is left over in every epoch."""
    settings = Settings(**{"context_length": 4, "epochs": 2, "lr": 0.01, "eval_iter": 2} | settings)
    return Run(config, settings, random_windows(13, 4), random_windows(3, 4, seed=1), "a hash", Letters(), processes)


def tie(params):
    return params | {"out_head.weight": params["tok_emb.weight"]}


def advance(run, state, n=10**9):
    """The state after n more, or at the end of the run."""
    for _ in range(n):
        if is_finished(run, state):
            break
        state = next_state(run, state)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the examples of a property share; each writes its file anew."""
    return tmp_path_factory.mktemp("states")


@st.composite
def beginnings(draw):
    """A small run and its first state, with tied weights or without."""
    heads, length = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    config = Config(
        vocab_size=draw(st.integers(2, 31)), context_length=draw(st.integers(length, 6)), emb_dim=4 * heads,
        n_heads=heads, n_layers=draw(st.integers(1, 2)), drop_rate=draw(st.sampled_from([0.0, 0.3])),
        qkv_bias=draw(st.booleans()))
    settings = Settings(
        context_length=length, epochs=draw(st.integers(1, 3)), batch_size=draw(st.integers(1, 3)),
        lr=draw(st.sampled_from([4e-4, 0.01])), warmup_steps=draw(st.integers(0, 3)),
        min_lr=draw(st.sampled_from([None, 1e-5])), max_norm=draw(st.sampled_from([None, 0.5])),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])), seed=draw(st.integers(0, 2**63 - 1)),
        eval_freq=draw(st.integers(1, 4)), eval_iter=draw(st.integers(1, 3)))
    n_train = settings.batch_size * draw(st.integers(1, 3)) + draw(st.integers(0, settings.batch_size - 1))
    run = Run(config, settings, random_windows(n_train, length, config.vocab_size),
              random_windows(draw(st.integers(1, 4)), length, config.vocab_size, seed=1), "a hash", Letters())
    tied = draw(st.booleans())
    return run, start_state(run, Checkpoint(tie(init_params(config, seeded())), config) if tied else None)


# A state and the next

@given(beginnings(), st.integers(0, 12), st.integers(0, 6))
def test_a_state_that_was_saved_goes_on_bit_for_bit_as_if_nothing_had_happened(folder, beginning, before, after):
    run, state = beginning
    state = advance(run, state, before)
    save_checkpoint(folder / "state.pth", to_checkpoint(run, state))
    loaded = start_state(run, load_checkpoint(folder / "state.pth"))
    assert same(loaded, state)
    for now, then in zip((loaded.params, *loaded.opt_state[1:]), (state.params, *state.opt_state[1:]), strict=True):
        assert len(distinct(now)) == len(distinct(then))  # tied is what was tied
    assert same(advance(run, loaded, after), advance(run, state, after))


@given(beginnings(), st.integers(0, 12))
def test_a_state_stays_as_it_was_but_for_the_tensors_that_are_trained(beginning, n):
    run, state = beginning
    state = advance(run, state, n)
    if is_finished(run, state):
        return
    before, windows = deepcopy(state), deepcopy(run[2:4])
    elsewhere = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    after = next_state(run, state)
    assert same(elsewhere, (torch.get_rng_state(), random.getstate(), repr(np.random.get_state())))
    assert state.opt_state.step == before.opt_state.step and same(state[2:], before[2:])
    if is_evaluation_due(run, before):
        assert same(state, before)
    assert all(map(np.array_equal, run[2:4], windows))
    assert same(next_state(run, before), after)  # the same state has the same next


@pytest.mark.parametrize("n, broken_windows, words", [
    (0, "train_windows", "the loss is nan"),
    (1, "train_windows", "the training loss is nan and the validation loss [0-9]"),
    (1, "val_windows", "the training loss is [0-9.]+ and the validation loss nan"),
])
def test_a_loss_that_is_no_number_leaves_the_state_as_it_was(n, broken_windows, words):
    run = small_run()
    state = advance(run, start_state(run), n)  # after 1 step comes an evaluation
    run = run._replace(train_windows=run.train_windows % 30, val_windows=run.val_windows % 30)
    run = run._replace(**{broken_windows: np.full_like(getattr(run, broken_windows), 30)})
    state.params["tok_emb.weight"][30] = math.inf  # of a token that only these windows have
    before = deepcopy(state)
    with pytest.raises(FloatingPointError, match=words):
        next_state(run, state)
    assert same(state, before)


@pytest.mark.parametrize("n", [0, 1, 7])
def test_tied_weights_stay_tied_through_a_run_and_its_files(folder, n):
    run = small_run()
    state = advance(run, start_state(run, Checkpoint(tie(init_params(TINY, seeded())), TINY)), n)
    save_checkpoint(folder / "tied.pth", to_checkpoint(run, state))
    for each in (state, start_state(run, load_checkpoint(folder / "tied.pth"))):
        for tensors in (each.params, *each.opt_state[1:]):
            assert tensors["out_head.weight"] is tensors["tok_emb.weight"]


def test_processes_that_lose_each_other_leave_the_state_as_it_was():
    def average(gradients):
        for gradient in gradients:
            gradient.zero_()
        raise ConnectionError
    run = small_run(processes=Processes(average=average))
    state = start_state(run)
    before = deepcopy(state)
    with pytest.raises(ConnectionError):
        next_state(run, state)
    assert same(state, before)


def test_every_window_but_those_left_over_is_seen_once_in_an_epoch():
    run = small_run()
    state = start_state(run)
    orders = []
    while not is_finished(run, state):
        state = next_state(run, state)
        orders.append(state.order)
    first, second = orders[0], orders[-1]
    for order in (first, second):
        assert order.shape == (6, 2) and len(set(order.flatten().tolist())) == 12
    assert not torch.equal(first, second)
    assert all(torch.equal(order, first) or torch.equal(order, second) for order in orders)


def test_each_step_has_the_learning_rate_of_the_schedule_and_the_weight_decay_of_the_settings():
    run = small_run(lr=0.1, warmup_steps=3, initial_lr=0.02, min_lr=0.01, weight_decay=0.5)
    run = run._replace(train_windows=run.train_windows % 30)  # without token 30: its embedding decays, and that is all
    state = start_state(run)
    while not is_finished(run, state):
        step, row = state.opt_state.step, state.params["tok_emb.weight"][30].clone()
        state = next_state(run, state)
        factor = 1 - 0.5 * learning_rate(step, run.total_steps, run.settings) if state.opt_state.step > step else 1
        assert torch.allclose(state.params["tok_emb.weight"][30], row * factor, rtol=4 * ROUNDING, atol=0)


# The log

@pytest.mark.parametrize("eval_freq, expected", [
    (5, {1: "loss", 6: "loss, sample", 11: "loss", 12: "sample"}),
    (4, {1: "loss", 5: "loss", 6: "sample", 9: "loss", 12: "sample"}),
    (9, {1: "loss", 6: "sample", 10: "loss", 12: "sample"}),
    (11, {1: "loss", 6: "sample", 12: "loss, sample"}),
])
def test_losses_are_logged_every_so_many_steps_and_a_sample_after_each_epoch(eval_freq, expected):
    run = small_run(eval_freq=eval_freq)
    state = start_state(run)
    assert log_lines(run, state) == []
    found = {}
    while not is_finished(run, state):
        state = next_state(run, state)
        step, lines = state.opt_state.step, log_lines(run, state)
        if is_evaluation_due(run, state):
            assert lines == []
        for line in lines:
            found.setdefault(step, []).append("loss" if line.startswith("Ep ") else "sample")
            if line.startswith("Ep "):
                tokens, train_loss, val_loss = state.evaluations[-1]
                assert tokens == 8 * step
                assert line == (f"Ep {1 if step <= 6 else 2} (Step {step - 1:06d}): "
                                f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
            else:
                prompt = torch.tensor([Letters().encode("Every effort moves you")])
                text = Letters().decode(generate(state.params, prompt, TINY, 50)[0].tolist())
                assert line == text.replace("\n", " ") and "\n" in text and len(text) == 22 + 50
    assert {step: ", ".join(kinds) for step, kinds in found.items()} == expected


def test_the_last_losses_are_known_and_drawn_but_not_logged():
    run = small_run(eval_freq=4)
    state = advance(run, start_state(run))
    assert [tokens for tokens, _, _ in state.evaluations] == [8 * steps for steps in (1, 5, 9, 12)]
    assert not any(line.startswith("Ep ") for line in log_lines(run, state))


@pytest.mark.parametrize("eval_freq, epochs", [
    (4, (1, 2)),
    (5, (1, 3)),
    (4, (1, 2, 3)),
])
def test_epochs_are_the_total_and_going_on_is_as_if_all_had_been_asked_for_at_once(capsys, eval_freq, epochs):
    at_once = small_run(eval_freq=eval_freq, epochs=epochs[-1])
    whole = train(at_once, start_state(at_once))
    log, _ = capsys.readouterr()
    state = start_state(at_once)
    for total in epochs:
        state = train(small_run(eval_freq=eval_freq, epochs=total), state)
    assert same(state._replace(evaluations=()), whole._replace(evaluations=()))
    assert set(whole.evaluations) <= set(state.evaluations)
    assert capsys.readouterr().out == log != ""


def test_a_finished_run_prints_nothing_and_draws_its_picture_again(tmp_path, capsys):
    run = small_run(epochs=1, plot=str(tmp_path / "loss.png"))
    state = train(run, start_state(run))
    capsys.readouterr()
    assert any("all 1 epochs are done: --epochs asks for more" in line for line in start_lines(run, state))
    assert same(train(run, state, str(tmp_path / "model.pth")), state)
    output, errors = capsys.readouterr()
    assert output == "" and "goes on" not in errors
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# What is due. The run has 6 steps an epoch and 8 tokens a step.

def numbers(step, *evaluated):
    """A state after so many steps, with evaluations after these."""
    return State({}, OptState(step, {}, {}), torch.empty(0), None, tuple((8 * each, 1.0, 2.0) for each in evaluated))


@pytest.mark.parametrize("epochs, state, due, finished", [
    (2, numbers(0), False, False),
    (2, numbers(1), True, False),
    (2, numbers(1, 1), False, False),
    (2, numbers(2, 1), False, False),
    (2, numbers(5, 1), False, False),
    (2, numbers(6, 1), True, False),
    (2, numbers(6, 1, 6), False, False),
    (2, numbers(11, 1, 6), True, False),
    (2, numbers(12, 1, 6, 11), True, False),
    (2, numbers(12, 1, 6, 11, 12), False, True),
    (2, numbers(13), False, True),
    (1, numbers(7, 1, 6), False, True),
    (3, numbers(12, 1, 6, 11, 12), False, False),
    (3, numbers(12, 1, 6, 11), False, False),
    (0, numbers(0), True, False),
    (0, numbers(0, 0), False, True),
])
def test_an_evaluation_is_due_after_the_first_step_every_eval_freq_and_at_the_end(epochs, state, due, finished):
    run = small_run(epochs=epochs, eval_freq=5)
    assert is_evaluation_due(run, state) is due
    assert is_finished(run, state) is finished


@pytest.mark.parametrize("save_every, state, due", [
    (0, numbers(0), False),
    (0, numbers(6, 6), False),
    (1, numbers(1), False),
    (1, numbers(1, 1), True),
    (1, numbers(2, 1), True),
    (3, numbers(2, 1), False),
    (3, numbers(3, 1), True),
    (3, numbers(6, 1), False),
    (3, numbers(6, 1, 6), True),
    (5, numbers(6, 1, 6), False),
    (5, numbers(12, 1, 6, 11, 12), False),
    (4, numbers(12, 1, 6, 11), False),
    (4, numbers(12, 1, 6, 11, 12), True),
])
def test_a_save_is_due_every_save_every_steps_with_the_evaluation_if_there_is_one(save_every, state, due):
    assert is_save_due(small_run(save_every=save_every, eval_freq=5), state) is due


@pytest.mark.parametrize("step, losses, best", [
    (0, {}, False),
    (3, {}, False),
    (1, {1: 5.0}, True),
    (2, {1: 5.0}, False),
    (6, {1: 5.0, 6: 4.9}, True),
    (6, {1: 5.0, 6: 5.0}, False),
    (6, {1: 5.0, 6: 5.1}, False),
    (7, {1: 5.0, 6: 4.9}, False),
    (11, {1: 5.0, 6: 4.0, 11: 4.5}, False),
    (11, {1: 5.0, 6: 4.0, 11: 3.9}, True),
])
def test_a_state_is_the_best_right_after_an_evaluation_with_the_lowest_validation_loss(step, losses, best):
    evaluations = tuple((8 * steps, 1.0 / steps, val_loss) for steps, val_loss in losses.items())
    assert is_best(small_run(), numbers(step)._replace(evaluations=evaluations)) is best


# The whole of a run: what it prints and saves, and where it stops

def test_train_prints_the_log_of_its_states_and_returns_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = small_run()
    state, lines = start_state(run), []
    while not is_finished(run, state):
        state = next_state(run, state)
        lines += log_lines(run, state)
    assert same(train(run, start_state(run)), state)
    output, errors = capsys.readouterr()
    assert output == "".join(f"{line}\n" for line in lines) and "saved" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save_every, saved", [
    (0, [(0, ())]),
    (3, [(0, ()), (3, (1, 3))]),
    (4, [(0, ()), (4, (1, 3))]),
])
def test_a_run_is_saved_at_its_start_every_save_every_steps_and_at_its_end(tmp_path, save_every, saved):
    path = str(tmp_path / "model.pth")
    run = small_run(epochs=1, eval_freq=2, save_every=save_every, plot=str(tmp_path / "loss.svg"))
    signals = Asked(look=partial(run_of, path))
    state = train(run, start_state(run), path, signals)
    assert list(dict.fromkeys(signals.seen)) == saved
    assert run_of(path) == (6, (1, 3, 5, 6))
    assert same(start_state(run, load_checkpoint(path)), state)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["loss.svg", "model.pth"]


def run_of(path):
    """The number of steps in a file, and after which of them there was an evaluation."""
    state = start_state(small_run(), load_checkpoint(path))
    return state.opt_state.step, tuple(tokens // 8 for tokens, _, _ in state.evaluations)


@pytest.mark.parametrize("k", [1, 7, 15])
def test_a_run_that_was_stopped_and_resumed_is_bitwise_the_run_straight_through(tmp_path, capsys, k):
    run = small_run(eval_freq=5, plot=str(tmp_path / "loss.svg"))
    straight = train(run, start_state(run))
    log, _ = capsys.readouterr()
    path = str(tmp_path / "my model.pth")
    stopped = train(run, start_state(run), path, Asked(k))
    first, errors = capsys.readouterr()
    step = stopped.opt_state.step
    assert same(stopped, advance(run, start_state(run), k)) and not is_finished(run, stopped)
    assert f"stopped after {step} steps: `python train.py --resume --checkpoint '{path}'` goes on" in errors
    assert same(train(run, start_state(run, load_checkpoint(path)), path), straight)
    rest, errors = capsys.readouterr()
    assert first + rest == log and "goes on" not in errors
    assert same(start_state(run, load_checkpoint(path)), straight)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_what_a_stopped_run_says_is_so(tmp_path, capsys, k):
    run = small_run(plot=str(tmp_path / "loss.svg"))
    train(run, start_state(run), str(tmp_path / "model.pth"), Asked(k))
    _, errors = capsys.readouterr()
    assert run_of(tmp_path / "model.pth") == (min(k, 1), () if k < 2 else (1,))
    assert ("loss.svg" in errors) == (tmp_path / "loss.svg").exists()  # without losses there is no picture
    assert "step -1" not in errors and "--resume" in errors


class Broken(io.StringIO):
    """A standard output whose reader has gone."""
    def write(self, _text):
        raise BrokenPipeError


def test_a_log_that_can_not_be_written_ends_the_run_and_the_work_is_saved(tmp_path, capsys):
    path = str(tmp_path / "model.pth")
    run = small_run(plot=str(tmp_path / "loss.svg"))
    with redirect_stdout(Broken()), pytest.raises(BrokenPipeError):
        train(run, start_state(run), path)
    assert "goes on" in capsys.readouterr().err
    assert run_of(path) == (1, (1,))
    resumed = train(run, start_state(run, load_checkpoint(path)))
    assert same(resumed, advance(run, start_state(run)))


def test_a_checkpoint_that_can_not_be_written_is_noticed_before_the_first_step(tmp_path, capsys):
    run = small_run(plot=str(tmp_path / "loss.svg"))
    state = start_state(run)
    with pytest.raises(OSError, match="absent"):
        train(run, state, str(tmp_path / "absent" / "model.pth"))
    assert capsys.readouterr().out == "" and same(state, start_state(run))


def test_a_picture_that_can_not_be_written_is_told_and_the_run_goes_on(tmp_path, capsys):
    path = str(tmp_path / "model.pth")
    run = small_run(epochs=1, save_every=2, plot=str(tmp_path / "absent" / "loss.svg"))
    state = train(run, start_state(run), path)
    assert is_finished(run, state) and same(start_state(run, load_checkpoint(path)), state)
    told = capsys.readouterr().err
    assert f"{run.settings.plot} could not be written: No such file or directory\n" in told
    assert "saved" in told and "loss.svg\n" not in told  # as if it were there


def test_a_run_without_a_list_of_signals_catches_them_and_gives_them_back():
    def average(gradients):
        signal.raise_signal(signal.SIGTERM)
        return gradients
    run, ours = small_run(processes=Processes(average=average)), lambda *_: None
    before = signal.signal(signal.SIGTERM, ours)  # so that one that is not caught does no harm
    try:
        assert train(run, start_state(run)).opt_state.step == 1
        assert signal.getsignal(signal.SIGTERM) == ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("n", [1, 4])
def test_a_run_that_begins_with_an_evaluation_prints_its_losses(capsys, n):
    # A file of the chapter's has an optimizer and no run. Such a one may end where losses are due.
    run = small_run(eval_freq=2)
    state = advance(run, start_state(run), n)
    loaded = Checkpoint(state.params, run.config, state.opt_state)
    state = start_state(run, loaded)
    assert is_evaluation_due(run, state) and state.loss is None
    train(run, state, None, Asked(1))
    step = loaded.opt_state.step
    assert capsys.readouterr().out.startswith(f"Ep 1 (Step {step - 1:06d}): Train loss")


def test_a_run_of_no_epochs_computes_the_losses_and_is_at_its_end(capsys):
    run = small_run(epochs=0)
    state = train(run, start_state(run))
    assert state.opt_state.step == 0 and len(state.evaluations) == 1
    assert same(state.params, start_state(run).params) and capsys.readouterr().out == ""


# A model that computes nan

def test_a_rate_that_is_far_too_high_ends_the_run_and_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "model.pth"
    run = small_run(plot=str(tmp_path / "loss.svg"))
    save_checkpoint(path, to_checkpoint(run, advance(run, start_state(run), 5)))
    before = path.read_bytes()
    wild = small_run(plot=str(tmp_path / "loss.svg"), lr=1e9)
    with pytest.raises(FloatingPointError, match=r"nan|inf"):
        train(wild, start_state(wild, load_checkpoint(path)), str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("start", [0, 3])
def test_a_model_that_computes_nan_is_not_trained_and_not_saved_over_a_good_one(tmp_path, start):
    path = tmp_path / "model.pth"
    run = small_run(plot=str(tmp_path / "loss.svg"))
    state = advance(run, start_state(run), start)
    save_checkpoint(path, to_checkpoint(run, state))
    before = path.read_bytes()
    state.params["final_norm.scale"][0] = math.nan
    for action in (partial(train, run, state, str(path)), partial(save_state, run, state, str(path))):
        with pytest.raises(FloatingPointError, match="nan"):
            action()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_after_a_loss_that_is_no_number_nothing_more_is_saved(tmp_path):
    calls = []

    def average(gradients):
        calls.append(1)
        if len(calls) == 3:
            raise FloatingPointError
        return gradients
    path = tmp_path / "model.pth"
    run = small_run(processes=Processes(average=average), plot=str(tmp_path / "loss.svg"))
    with pytest.raises(FloatingPointError):
        train(run, start_state(run), str(path))
    assert run_of(path) == (0, ()) and list(tmp_path.iterdir()) == [path]


def test_a_step_that_makes_nan_is_not_saved_over_the_one_before(tmp_path):
    calls = []

    def average(gradients):
        calls.append(1)
        return [gradient * (math.nan if len(calls) == 3 else 1) for gradient in gradients]
    path = tmp_path / "model.pth"
    run = small_run(processes=Processes(average=average), save_every=1, plot=str(tmp_path / "loss.svg"))
    with pytest.raises(FloatingPointError, match="after 3 steps the model computes nan"):
        train(run, start_state(run), str(path))
    good = small_run()
    assert same(start_state(good, load_checkpoint(path)), advance(good, start_state(good), 3))  # 2 steps, 1 evaluation


# The best model

def test_the_model_with_the_lowest_validation_loss_is_kept(tmp_path):
    best = tmp_path / "best.pth"
    run = small_run(lr=0.02, seed=2, eval_freq=2, best=str(best), plot=str(tmp_path / "loss.svg"))
    state = train(run, start_state(run))
    val_losses = [val_loss for _, _, val_loss in state.evaluations]
    lowest = val_losses.index(min(val_losses))
    assert 0 < lowest < len(val_losses) - 1  # it falls and then it rises
    kept = start_state(run, load_checkpoint(best))
    assert kept.evaluations == state.evaluations[:lowest + 1]
    batches = draw_batches(3, 2, seeded(), shuffle=False)
    val_loss = mean_loss(kept.params, TINY, run.val_windows, batches)
    assert val_loss == pytest.approx(min(val_losses), rel=8 * ROUNDING)


@pytest.mark.parametrize("val_loss, is_kept", [
    (0.0, True),
    (99.0, False),
])
def test_a_resumed_run_replaces_the_best_of_before_by_a_better_one_alone(tmp_path, val_loss, is_kept):
    best = tmp_path / "best.pth"
    run = small_run(epochs=1, eval_freq=5, best=str(best), plot=str(tmp_path / "loss.svg"))
    state = advance(run, start_state(run), 6)  # what is left is the last step and its evaluation
    best.write_bytes(b"the best of before")
    train(run, state._replace(evaluations=((8, 1.0, val_loss),)))
    assert (best.read_bytes() == b"the best of before") is is_kept


# Several processes: here they are threads, or one alone that is told what the others had

def in_two_processes(action):
    """What action(processes) returns in each of two processes that exchange their values."""
    barrier, values = threading.Barrier(2, timeout=60), [None, None]

    def process(rank):
        def gather(value):
            values[rank] = value
            barrier.wait()
            everyone = list(values)
            barrier.wait()
            return everyone

        def average(gradients):
            return [(one + two) / 2 for one, two in zip(*gather(gradients), strict=True)]
        try:
            return action(Processes(rank, 2, gather, average))
        except BaseException:
            barrier.abort()
            raise
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, (0, 1)))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in distinct(tensors)])


@pytest.mark.parametrize("options", [
    {},
    {"max_norm": 0.5, "warmup_steps": 3, "min_lr": 1e-5},
])
def test_two_processes_train_as_one_does(options):
    run = small_run(NO_KEY_BIAS, lr=1e-4, eval_freq=4, **options)
    one = advance(run, start_state(run))
    two, other = in_two_processes(
        lambda processes: advance(run._replace(processes=processes), start_state(run)))
    assert same(two[:5], other[:5])  # all but the loss, which each has of its own half
    assert same(one.order, two.order) and same(one.generator_state, two.generator_state)
    # Each step adds up gradients in another order. Those that nearly cancel out move a parameter by up to the rate.
    for ours, theirs in zip((two.params, *two.opt_state[1:]), (one.params, *one.opt_state[1:]), strict=True):
        assert (flat(ours) - flat(theirs)).norm() <= 8 * 12 * ROUNDING * flat(theirs).norm()
    for ours, theirs in zip(two.evaluations, one.evaluations, strict=True):
        assert ours == pytest.approx(theirs, rel=8 * 12 * ROUNDING)


def test_with_dropout_too_all_processes_have_the_same_parameters_and_the_first_ones_order():
    run = small_run()

    def steps(processes):
        here = run._replace(processes=processes)
        state, seen = start_state(here), []
        while not is_finished(here, state):
            state = next_state(here, state)
            seen.append((state.order.clone(), state.opt_state.step, deepcopy(state.params), state.generator_state))
        return seen
    one, two = in_two_processes(steps)
    assert same(tuple(each[:3] for each in one), tuple(each[:3] for each in two))
    assert not torch.equal(one[-1][3], two[-1][3])  # the first alone draws dropout from the run's own generator


def test_a_run_of_two_processes_is_bitwise_repeatable_and_goes_on_from_the_first_ones_file(tmp_path):
    path, run = tmp_path / "model.pth", small_run()

    def whole(processes):
        here = run._replace(processes=processes)
        return advance(here, start_state(here))
    straight, _ = in_two_processes(whole)
    again, _ = in_two_processes(whole)
    assert same(again, straight)
    for k in (1, 8):
        stopped, _ = in_two_processes(
            lambda processes, k=k: advance(run._replace(processes=processes), start_state(run), k))
        save_checkpoint(path, to_checkpoint(run, stopped))
        resumed, _ = in_two_processes(
            lambda processes: advance(run._replace(processes=processes), start_state(run, load_checkpoint(path))))
        assert same(resumed, straight)


@pytest.mark.parametrize("size", [2, 3])
def test_a_process_trains_on_its_part_of_the_first_processs_order(size):
    order = torch.arange(12).flip(0).view(2, 6)
    for rank in range(size):
        processes = Processes(rank, size, gather=lambda value: [order, *[value] * (size - 1)])
        run = small_run(WITHOUT_DROPOUT, processes, batch_size=6)
        state = start_state(run)
        own = order[0][rank * 6 // size:(rank + 1) * 6 // size]
        loss = calc_loss(state.params, *get_batch(run.train_windows, own, CPU), WITHOUT_DROPOUT).item()
        state = next_state(run, state)
        assert state.loss == pytest.approx(loss, rel=8 * ROUNDING)  # with a gradient another kernel computes it
        assert torch.equal(state.order, order)


@pytest.mark.parametrize("warmup_steps, is_clipped", [
    (0, True),
    (1, False),
])
def test_the_average_of_tied_gradients_is_clipped_as_pytorch_clips_it_once_the_warm_up_is_over(
        warmup_steps, is_clipped):
    averaged = []

    def average(gradients):
        theirs = [torch.randn(gradient.shape, generator=seeded(i)) for i, gradient in enumerate(gradients)]
        averaged.extend((one + two) / 2 for one, two in zip(gradients, theirs, strict=True))
        return [gradient.clone() for gradient in averaged]
    run = small_run(TINY, Processes(0, 2, lambda value: [value, value], average), lr=0.01, max_norm=0.7,
                    warmup_steps=warmup_steps, initial_lr=0.01)
    state = start_state(run, Checkpoint(tie(init_params(TINY, seeded())), TINY))
    expected = [torch.nn.Parameter(tensor.clone()) for tensor in distinct(state.params)]
    optimizer = torch.optim.AdamW(expected, lr=0.01, weight_decay=run.settings.weight_decay)
    state = next_state(run, state)
    for parameter, gradient in zip(expected, averaged, strict=True):
        parameter.grad = gradient.clone()
    assert len(averaged) == len(init_params(TINY, seeded())) - 1  # the tied one counts once
    if is_clipped:
        assert torch.nn.utils.clip_grad_norm_(expected, 0.7) > 0.7
    optimizer.step()
    moments = zip(distinct(state.opt_state.exp_avg), expected, strict=True)
    assert all(torch.allclose(mean, 0.1 * parameter.grad, rtol=8 * ROUNDING, atol=0) for mean, parameter in moments)
    for ours, theirs in zip(distinct(state.params), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=8 * ROUNDING, atol=8 * ROUNDING * 0.01)  # of what a step adds


def test_each_process_and_step_has_masks_of_its_own():
    def first_draw(step, rank, seed=1):
        run, own = small_run(processes=Processes(rank, 4), seed=seed), seeded(seed)
        generator = dropout_generator(run, step, own, CPU)
        assert (generator is own) == (rank == 0)  # the first goes on with the run's own stream
        return torch.rand((), generator=generator).item()
    draws = [first_draw(step, rank, seed) for step in range(20) for rank in (1, 2, 3) for seed in (1, 2)]
    assert len({*draws, first_draw(0, rank=0)}) == len(draws) + 1
    assert draws[0] == first_draw(0, 1)


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_first_alone_prints_and_saves(
        tmp_path, capsys, signalled):
    path, run = str(tmp_path / "model.pth"), small_run(plot=str(tmp_path / "loss.svg"))

    def action(processes):
        here = run._replace(processes=processes)
        return train(here, start_state(here), path, Asked(4 if processes.rank == signalled else 10**9))
    one, two = in_two_processes(action)
    assert one.opt_state.step == two.opt_state.step == 3
    assert same(start_state(run, load_checkpoint(path)), one)
    output, errors = capsys.readouterr()
    assert output.count("Ep 1 (Step 000000)") == len(output.splitlines()) == 1
    assert errors.count("stopped after 3 steps") == errors.count("saved") == 1


def of_the_others(change):
    """gather for the first of two processes, of which the other has changed what a run is known by."""
    return lambda value: [value, value if value is None else change(*value)]


@pytest.mark.parametrize("change", [
    lambda config, step, text_hash: (replace(config, n_layers=2), step, text_hash),
    lambda config, step, text_hash: (config, step + 1, text_hash),
    lambda config, step, text_hash: (config, step, text_hash[::-1]),
])
def test_processes_that_have_not_the_same_model_step_and_text_are_refused(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    typed = {"data": (str(STORY),), "emb_dim": 8, "n_layers": 1, "context_length": 16, "train_ratio": 0.2}
    for each, gather in enumerate((of_the_others(change), of_the_others(lambda *value: value))):
        action = partial(prepare, Files(), typed, CPU, Processes(0, 2, gather))
        if each == 0:
            refused(action, "the processes do not have the same checkpoint and data")
        else:
            run, state = action()
            assert run.processes.size == 2 and state.opt_state.step == 0


def test_a_batch_that_can_not_be_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = {"data": (str(STORY),), "emb_dim": 8, "n_layers": 1, "context_length": 16, "batch_size": 10}
    action = partial(prepare, Files(), typed, CPU, Processes(0, 3, lambda value: [value] * 3))
    refused(action, "--batch-size 10 can't be split evenly over 3 processes")


# Appendix D

def test_warm_up_cosine_decay_and_clipping_give_the_losses_of_appendix_d():
    pytest.importorskip("llms_from_scratch")
    from llms_from_scratch.appendix_d import train_model
    from llms_from_scratch.ch02 import GPTDatasetV1
    from llms_from_scratch.ch04 import GPTModel
    tokenizer, text = Letters(), STORY.read_text(encoding="utf-8")[:500]
    parts = text[:450], text[450:]
    config = Config(31, context_length=8, emb_dim=32, n_heads=2, n_layers=2, drop_rate=0.1, qkv_bias=False)
    settings = Settings(context_length=8, epochs=3, batch_size=4, lr=5e-3, warmup_steps=7, initial_lr=3e-5,
                        min_lr=1e-6, max_norm=1.0, eval_freq=2, eval_iter=2)
    windows = (make_windows(np.array(tokenizer.encode(part)), 8) for part in parts)
    run = Run(config, settings, *windows, "a hash", tokenizer)
    state = advance(run, start_state(run))
    with torch.random.fork_rng():
        torch.manual_seed(123)
        model = GPTModel(asdict(config))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
        loaders = [torch.utils.data.DataLoader(GPTDatasetV1(part, tokenizer, 8, 8), 4, shuffle, drop_last=shuffle)
                   for part, shuffle in zip(parts, (True, False), strict=True)]
        train_losses, val_losses, tokens_seen, _ = train_model(
            model, *loaders, optimizer, CPU, 3, 2, 2, "Every effort moves you", tokenizer, warmup_steps=7,
            initial_lr=3e-5, min_lr=1e-6)
    theirs = list(zip(tokens_seen, train_losses, val_losses, strict=True))
    ours = state.evaluations[:-1]  # they have none at the end
    assert len(theirs) >= 20 and val_losses[0] - val_losses[-1] > 0.5  # they fall
    tolerance = 8 * run.total_steps * ROUNDING  # each step adds up in another order
    assert ours == tuple(pytest.approx(each, rel=tolerance) for each in theirs)
    assert tolerance * max(train_losses) < 0.0005  # it is below the third decimal


# Where a run begins

def test_a_fresh_run_begins_with_the_parameters_that_its_seed_draws():
    run, generator = small_run(seed=7), seeded(7)
    state = start_state(run)
    assert same(state.params, init_params(TINY, generator))
    assert same(state.generator_state, generator.get_state())
    assert state.opt_state.step == 0 and not any(moment.any() for moment in state.opt_state.exp_avg.values())
    assert state[3:] == (None, (), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_optimizer", [False, True])
def test_a_run_from_a_model_has_copies_of_its_parameters_and_leaves_them_as_they_are(dtype, has_optimizer):
    run = small_run(seed=7)
    donor = advance(run, start_state(run), 5)
    params = {name: tensor.to(dtype) for name, tensor in donor.params.items()}
    loaded = Checkpoint(params, TINY, donor.opt_state if has_optimizer else None)
    before = deepcopy(loaded)
    state = start_state(run, loaded)
    assert all(torch.equal(state.params[name], params[name].float()) for name in params)
    assert all(tensor.dtype == torch.float32 for tensor in state.params.values())
    assert state.opt_state.step == (donor.opt_state.step if has_optimizer else 0)
    assert same(state.generator_state, seeded(7).get_state()) and state[3:] == (None, (), None)
    advance(run, state)
    assert same(loaded, before)


@pytest.mark.parametrize("place", [0, 2700])
def test_a_run_goes_on_with_its_own_text_alone(place):
    story, settings = STORY.read_text(encoding="utf-8")[:3000], Settings(context_length=16, data=("a.txt",))
    changed = story[:place] + story[place:].replace(" the ", " one ", 1)  # in the training part or in the other one
    run = make_run(story, TINY, settings)
    other = make_run(changed, TINY, replace(settings, data=("b.txt",)))
    assert [windows.shape for windows in run[2:4]] == [windows.shape for windows in other[2:4]]
    saved = to_checkpoint(run, start_state(run))
    words = ("made with other data than b.txt", "--weights", "--checkpoint")
    refused(lambda: start_state(other, saved), *words, error=ValueError)
    again = make_run(story, TINY, replace(settings, data=("renamed.txt",)))
    assert same(start_state(again, saved), start_state(run))


def saved_progress():
    """A run, and the checkpoint of its state after a step and an evaluation."""
    run = small_run()
    return run, to_checkpoint(run, advance(run, start_state(run), 2))


@pytest.mark.parametrize("name, damage", [
    ("generator_state", lambda value: None),
    ("generator_state", lambda value: value.float()),
    ("generator_state", lambda value: value[:-1]),
    ("generator_state", lambda value: torch.zeros_like(value)),
    ("generator_state", lambda value: value.tolist()),
    ("order", lambda value: value.float()),
    ("order", lambda value: value.to(torch.int32)),
    ("order", lambda value: value[:-1]),
    ("order", lambda value: value.flatten()),
    ("order", lambda value: value.tolist()),
    ("order", lambda value: value - 13),
    ("order", lambda value: value + 13),
    ("order", lambda value: 5),
    ("evaluations", lambda value: None),
    ("evaluations", lambda value: 5),
    ("evaluations", lambda value: ((8, 1.0),)),
    ("evaluations", lambda value: ((8, 1.0, 2.0, 3.0),)),
    ("evaluations", lambda value: ((8, 1.0, "low"),)),
    ("evaluations", lambda value: ((8, 1.0, None),)),
    ("evaluations", lambda value: ((math.nan, 1.0, 2.0),)),
    ("evaluations", lambda value: ((math.inf, 1.0, 2.0),)),
    ("evaluations", lambda value: ((8, 1.0, 10**400),)),
    ("loss", lambda value: "low"),
    ("loss", lambda value: torch.zeros(3)),
])
def test_damaged_progress_is_refused_in_one_line(name, damage):
    run, checkpoint = saved_progress()
    damaged = checkpoint._replace(run=checkpoint.run | {name: damage(checkpoint.run[name])})
    assert refused(lambda: start_state(run, damaged), error=ValueError) == "the state of the run in it is damaged"


@pytest.mark.parametrize("name", ["generator_state", "order", "evaluations", "loss"])
def test_progress_that_is_missing_is_refused_in_one_line(name):
    run, checkpoint = saved_progress()
    rest = {key: value for key, value in checkpoint.run.items() if key != name}
    refused(lambda: start_state(run, checkpoint._replace(run=rest)), "damaged", error=ValueError)


# The text

@pytest.mark.parametrize("contents, text", [
    ([b"one"], "one"),
    ([b"one", "zwö\r\n".encode()], "one<|endoftext|>zwö\n"),
    ([b"\xef\xbb\xbfone", b"\xef\xbb\xbftwo", b"three"], "one<|endoftext|>two<|endoftext|>three"),
])
def test_several_files_are_one_text_with_end_of_text_between_and_no_byte_order_marks(tmp_path, contents, text):
    paths = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert read_text(paths) == text


@pytest.mark.parametrize("content, words", [
    (b"", ("is empty",)),
    (b" \n\t", ("is empty",)),
    (b"\xef\xbb\xbf", ("is empty",)),
    (b"a\0b", ("is not text", "NUL")),
    ("a naïve one".encode("latin-1"), ("is not UTF-8", "byte 4", "iconv -f latin1 -t utf-8")),
])
def test_what_is_no_text_is_refused_by_its_name(tmp_path, content, words):
    (tmp_path / "good.txt").write_bytes(b"good")
    (tmp_path / "bad.txt").write_bytes(content)
    refused(lambda: read_text([tmp_path / "good.txt", tmp_path / "bad.txt"]), str(tmp_path / "bad.txt"), *words)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        read_text([tmp_path / "absent.txt"])


def test_the_story_is_found_beside_the_script_unless_there_is_one_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_text(Settings().data) == STORY.read_text(encoding="utf-8")
    Path(STORY.name).write_text("another", encoding="utf-8")
    assert read_text(Settings().data) == "another"


@pytest.mark.parametrize("text, settings, words", [
    ("word " * 30, {"context_length": 256}, ("training part has 0 windows of 256 tokens, 2 or more",)),
    ("word " * 300, {"context_length": 16, "batch_size": 100}, ("training part has 16 windows", "100 or more")),
    ("word " * 300, {"context_length": 16, "train_ratio": 0.99}, ("validation part has 0 windows", "1 or more")),
    ("word", {"context_length": 4}, ("training part has 0 windows",)),
])
def test_a_text_that_is_too_short_is_refused_with_the_flags_that_help(text, settings, words):
    action = partial(make_run, text, TINY, Settings(**settings))
    refused(action, "the text is too short", "--context-length", "--batch-size", *words, error=ValueError)


@pytest.mark.parametrize("blank", [" ", "\n"])
def test_a_million_blanks_in_a_row_are_refused_with_the_names_of_the_files(blank):
    settings = Settings(data=("book.txt", "letters.txt"), train_ratio=0.999)
    refused(partial(make_run, f"a{blank * 1_100_000}b" * 2, TINY, settings), "book.txt letters.txt", error=ValueError)


def test_a_text_is_split_by_characters_and_its_parts_are_windows_of_their_own():
    tokenizer, text = gpt2_tokenizer(), STORY.read_text(encoding="utf-8")
    run = make_run(text, TINY, Settings(context_length=8, train_ratio=0.3))
    split = int(0.3 * len(text))
    for windows, part in ((run.train_windows, text[:split]), (run.val_windows, text[split:])):
        tokens = tokenizer.encode(part)
        assert windows.tolist() == [tokens[i:i + 9] for i in range(0, len(tokens) - 8, 8)]
    assert (run.steps_per_epoch, run.tokens_per_step) == (len(run.train_windows) // 2, 16)


# The settings

MISTAKES = [
    ("train_ratio", 0.0),
    ("train_ratio", 1.0),
    ("train_ratio", math.nan),
    ("context_length", 0),
    ("context_length", 2**31),
    ("epochs", -1),
    ("epochs", 10**20),
    ("batch_size", 0),
    ("batch_size", -2),
    ("lr", 0.0),
    ("lr", -1.0),
    ("lr", math.nan),
    ("lr", math.inf),
    ("weight_decay", -0.1),
    ("weight_decay", math.nan),
    ("warmup_steps", -1),
    ("initial_lr", -1e-5),
    ("initial_lr", math.inf),
    ("min_lr", -1e-5),
    ("min_lr", math.nan),
    ("max_norm", 0.0),
    ("max_norm", -1.0),
    ("dtype", "float16"),
    ("seed", -1),
    ("seed", 2**63),
    ("eval_freq", 0),
    ("eval_iter", 0),
    ("start_context", ""),
    ("save_every", -1),
    ("plot", ""),
    ("best", ""),
]
WRONG_TYPES = [
    ("data", ()),
    ("data", ("",)),
    ("data", ("book.txt", 5)),
    ("data", "book.txt"),
    ("data", None),
    ("train_ratio", "0.5"),
    ("context_length", 16.0),
    ("epochs", "2"),
    ("epochs", 1.5),
    ("epochs", None),
    ("batch_size", "2"),
    ("lr", "fast"),
    ("lr", None),
    ("dtype", torch.bfloat16),
    ("seed", None),
    ("start_context", None),
    ("plot", None),
    ("best", 5),
    ("min_lr", "0"),
]


def test_the_tables_of_mistakes_have_every_setting():
    assert {name for name, _ in MISTAKES + WRONG_TYPES} == asdict(Settings()).keys()


@pytest.mark.parametrize("name, value", MISTAKES)
def test_a_setting_against_its_rule_is_refused_alike_in_python_and_on_the_command_line(name, value):
    message = refused(lambda: Settings(**{name: value}), f"{flag(name)} must be ", f"not {value!r}", error=ValueError)
    typed = vars(build_parser().parse_args([f"{flag(name)}={value}"]))
    assert refused(lambda: choose(typed, None, None), error=ValueError) == message


@pytest.mark.parametrize("name, value", WRONG_TYPES)
def test_a_setting_of_the_wrong_type_is_refused_by_its_flags_name(name, value):
    words = (f"{flag(name)} must be ", f"not {value!r}")
    refused(lambda: Settings(**{name: value}), *words, error=ValueError)
    refused(lambda: from_fields(Settings, {name: value}), *words, error=ValueError)


def test_settings_at_the_ends_of_their_ranges_are_allowed():
    ends = Settings(data=("a", "b"), train_ratio=0.999, epochs=0, warmup_steps=0, initial_lr=0.0, min_lr=0.0,
                    weight_decay=0.0, seed=2**63 - 1, eval_freq=2**31 - 1, max_norm=1, best="best.pth")
    assert from_fields(Settings, asdict(ends)) == ends


def test_a_setting_that_is_unknown_is_named():
    refused(lambda: from_fields(Settings, {"lr": 0.1, "frobnicate": 1}), "Settings", "'frobnicate'", error=ValueError)


# The picture

def read_picture(path):
    """The axes of an SVG picture, its curves, their marks and the names in its legend.

    An axis is a list of its ticks (place, figure), a curve and its marks are lists of places (x, y).
    """
    tree = ElementTree.parse(path, ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True)))
    groups = {group.get("id"): group for group in tree.iterfind(".//{*}g[@id]")}
    axes = {}
    for name, axis in groups.items():
        if name.startswith("matplotlib.axis_") and len(axis):
            *ticks, title = [each for each in axis if each.get("id").startswith(("xtick", "ytick", "text"))]
            along = "x" if ticks[0].get("id").startswith("x") else "y"
            axes[comment(title)] = [(float(tick.find(".//{*}use").get(along)), float(comment(tick))) for tick in ticks]
    lines = [each for each in groups["axes_1"] if each.get("id", "").startswith("line2d")]
    drawn = ["".join(path.get("d") for path in line.iterfind("{*}path")) for line in lines]
    curves = [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in drawn]
    marks = [[(float(use.get("x")), float(use.get("y"))) for use in line.iterfind(".//{*}use")] for line in lines]
    legend = [comment(each) for each in groups["legend_1"] if each.get("id", "").startswith("text")]
    return axes, curves, marks, legend


def comment(element):
    """The text that is written out in an element's first comment."""
    return next(each.text.strip() for each in element.iter() if each.tag is ElementTree.Comment)


def test_the_losses_are_drawn_against_epochs_and_tokens_seen(tmp_path):
    plot_losses([(512, 9.8, 9.9), (4608, 8.5, 9.0), (9216, 8.1, 8.3)], 4608, tmp_path / "loss.svg")
    axes, curves, marks, legend = read_picture(tmp_path / "loss.svg")
    assert axes.keys() == {"Epochs", "Loss", "Tokens seen"} and legend == ["Training loss", "Validation loss"]
    to_epochs, to_loss, to_tokens = (np.poly1d(np.polyfit(*zip(*axes[name], strict=True), 1))
                                     for name in ("Epochs", "Loss", "Tokens seen"))
    expected = [[(512 / 4608, 9.8), (1, 8.5), (2, 8.1)], [(512 / 4608, 9.9), (1, 9.0), (2, 8.3)]]
    for curve, points in zip(curves, expected, strict=True):
        for (x, y), (epochs, loss) in zip(curve, points, strict=True):
            assert (to_epochs(x), to_loss(y)) == pytest.approx((epochs, loss), rel=1e-4)
            assert to_tokens(x) == pytest.approx(epochs * 4608, rel=1e-4)
    assert all(figure == int(figure) for _, figure in axes["Epochs"]) and marks == [[], []]


def test_a_single_evaluation_is_a_point_that_can_be_seen(tmp_path):
    plot_losses([(512, 9.8, 9.9)], 4608, tmp_path / "loss.svg")
    _, curves, marks, _ = read_picture(tmp_path / "loss.svg")
    assert [len(each) for each in marks] == [1, 1] and marks == curves  # a curve of one point is no line
    assert all(0 < x < 360 and 0 < y < 216 for each in marks for x, y in each)


@pytest.mark.parametrize("suffix, start", [
    ("png", b"\x89PNG"),
    ("pdf", b"%PDF"),
    ("svg", b"<?xml"),
])
def test_the_picture_has_the_format_that_its_name_tells(tmp_path, suffix, start):
    path = tmp_path / f"my.loss.{suffix}"
    plot_losses([(512, 9.8, 9.9), (9216, 8.1, 8.3)], 4608, path)
    assert path.read_bytes().startswith(start) and list(tmp_path.iterdir()) == [path]


# Another device

@NEEDS_ACCELERATOR
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("config", [TINY, WITHOUT_DROPOUT])
def test_a_run_on_an_accelerator_goes_on_from_its_file_as_if_nothing_had_happened(tmp_path, config, dtype, tolerance):
    run = small_run(config, dtype=dtype)
    whole = advance(run, start_state(run, device=ACCELERATOR))
    save_checkpoint(tmp_path / "half.pth", to_checkpoint(run, advance(run, start_state(run, device=ACCELERATOR), 7)))
    loaded = load_checkpoint(tmp_path / "half.pth")
    resumed = advance(run, start_state(run, loaded, ACCELERATOR))
    assert all(tensor.device.type == ACCELERATOR.type for tensor in resumed.params.values())
    losses = [torch.tensor(state.evaluations) for state in (resumed, whole)]
    torch.testing.assert_close(*losses, atol=0, rtol=tolerance)
    if config is WITHOUT_DROPOUT:  # the dropout of a CPU is another
        on_cpu = torch.tensor(advance(run, start_state(run, loaded)).evaluations)
        torch.testing.assert_close(losses[0], on_cpu, atol=0, rtol=tolerance)


# The disk

def test_a_run_starts_where_the_disk_has_room_for_a_checkpoint_and_the_next_one_beside_it(tmp_path):
    path, free = tmp_path / "a.pth", shutil.disk_usage(tmp_path).free
    for is_there in (False, True):
        files = 1 if is_there else 2
        for share, fits in ((0.5, True), (2.0, False)):  # of what is free; nothing is allocated
            params = {"weight": torch.empty(int(share * free / files / 3), dtype=torch.uint8, device="meta")}
            action = partial(check_room, str(path), params)
            if fits:
                action()
            else:
                refused(action, str(path), "MB are free", error=ValueError)
        path.touch()


def test_tied_parameters_need_their_room_once(tmp_path):
    weight = torch.empty(int(0.8 * shutil.disk_usage(tmp_path).free / 6), dtype=torch.uint8, device="meta")
    check_room(str(tmp_path / "a.pth"), {"tok_emb.weight": weight, "out_head.weight": weight})
    refused(partial(check_room, str(tmp_path / "a.pth"), {"one": weight, "another": weight.clone()}), "MB are free",
            error=ValueError)


# A notebook

def test_a_run_of_a_few_lines_of_python_is_resumed_by_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(STORY.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    settings = Settings(data=("book.txt",), context_length=16, epochs=1, batch_size=4, train_ratio=0.5, eval_iter=1)
    config = Config(50257, context_length=16, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.1, qkv_bias=False)
    run = make_run(read_text(settings.data), config, settings)
    state = train(run, start_state(run), "model.pth")

    first = capsys.readouterr().out.splitlines()
    assert first[0].startswith("Ep 1 (Step 000000)") and first[-1].startswith("Every effort moves you")
    further = subprocess.run([sys.executable, HERE / "train.py", "--resume", "--epochs", "2", "--device", "cpu"],
                             timeout=120, capture_output=True, text=True, encoding="utf-8")
    assert further.returncode == 0, further.stderr
    train(make_run(read_text(settings.data), config, replace(settings, epochs=2)), state)
    assert further.stdout == capsys.readouterr().out != ""
    assert load_checkpoint("model.pth").opt_state.step == 2 * run.steps_per_epoch == 10
    assert Path("loss.png").exists()
