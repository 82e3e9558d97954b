"""Training: what the chapter prints, then each part beside PyTorch's own, then a run as a sequence of states.

A reader sees the chapter's loop written out once, with PyTorch's DataLoader, AdamW and global generator, and that a run
is that loop. It goes on from each of its states bit for bit, whatever happens to what it prints and saves.
"""
import math
import re
import signal
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from conftest import (LONG, ROUNDING, SMALL, TINY, Listener, assert_refused, configs, examples, parrot, same,
                      saved_steps, seeded, seeds, tie)
from gpt import Config, calc_loss, distinct, init_params, map_params
from train import (Processes, Run, Settings, clip_gradients, dropout_generator, evaluate_model, get_batch,
                   init_optimizer, learning_rate, log_lines, make_run, make_windows, next_state, plot_losses, read_text,
                   start_state, to_checkpoint, tokenize, train, train_simple, train_step)
from weights import Checkpoint, OptState, load_checkpoint, save_checkpoint

CPU, CHAPTER_RUN = torch.device("cpu"), make_run(read_text(()), Config(), Settings())


# Section 5.1.3: the text, its windows, and the loss of a model that has learned nothing
def test_the_verdict_has_20479_characters_and_5145_tokens():
    assert len(read_text(())) == 20479 and len(tokenize(read_text(()), CHAPTER_RUN.tokenizer)) == 5145


@given(st.integers(0, 300), st.integers(1, 40))
@example(5145, 256)
def test_windows_start_where_the_chapters_do_and_targets_are_one_later(n, length):
    windows = make_windows(np.arange(n, dtype=np.uint16), length)
    assert windows[:, 0].tolist() == list(range(0, n - length, length))
    inputs, targets = get_batch(windows, torch.arange(len(windows)), CPU)
    assert inputs.shape == (len(windows), length) and torch.equal(inputs + 1, targets)


@LONG
def test_the_losses_of_the_untrained_model_are_the_chapters(untrained):
    assert evaluate_model(untrained.params, CHAPTER_RUN, seeded()) == pytest.approx((10.98758, 10.98110), abs=1e-5)


# Section 5.2: training
@pytest.mark.parametrize("eval_iter, train_loss", [(1, r"9\.\d{3}"), pytest.param(5, r"9\.781", marks=LONG)])
def test_the_first_step_prints_the_first_line_of_the_chapters_log(untrained, eval_iter, train_loss):
    run = CHAPTER_RUN._replace(settings=Settings(eval_iter=eval_iter))
    [line] = log_lines(run, next_state(run, deepcopy(untrained)._replace(opt_state=init_optimizer(untrained.params))))
    assert re.fullmatch(rf"Ep 1 \(Step 000000\): Train loss {train_loss}, Val loss 9\.933", line)


class Letters:
    """A tokenizer for TINY's vocabulary: a character is a token, and 11 of the 31 tokens are the end of a line."""
    letters = "\n" * 11 + "abcdefghijklmnopqrst"

    def encode(self, text, allowed_special=()):
        return [ord(character) % 31 for character in text]

    def decode(self, tokens):
        return "".join(self.letters[token] for token in tokens)


def random_run(config, settings, n_train, n_val):
    """A run over so many windows of random tokens."""
    draws = np.random.default_rng(0)
    train_windows, val_windows = (draws.integers(0, config.vocab_size, (n, settings.context_length + 1)).astype("u2")
                                  for n in (n_train, n_val))
    steps = n_train // settings.batch_size
    return Run(config, settings, train_windows, val_windows, steps, settings.epochs * steps, "a hash", Letters())


def small_run(config=TINY, **settings):
    """A run of 6 steps an epoch, each of 2 windows of 4 tokens; one window is left over in every epoch."""
    settings = {"context_length": 4, "epochs": 2, "lr": 0.01, "eval_iter": 2} | settings
    return random_run(config, Settings(**settings), n_train=13, n_val=3)


@st.composite
def runs(draw, **options):
    """Small runs of every kind. An option is the strategy of one more setting."""
    config = draw(configs)
    length = draw(st.integers(1, min(5, config.context_length)))
    numbers = {name: draw(st.integers(1, 3)) for name in ("epochs", "batch_size", "eval_freq", "eval_iter")}
    settings = Settings(context_length=length, seed=draw(seeds), **numbers,
                        **{name: draw(strategy) for name, strategy in options.items()})
    return random_run(config, settings, settings.batch_size + draw(st.integers(0, 4)), draw(st.integers(1, 4)))


def advance(run, state, steps=10**9):
    """The state so many steps later, or at the end of the run."""
    for _ in range(min(steps, run.total_steps - state.opt_state.step)):
        state = next_state(run, state)
    return state


def chapters_loop(params, run):
    """Parameters and losses by the chapter's loop, with appendix D, PyTorch's parts and its global generator."""
    settings, evaluations, step = run.settings, [], 0
    params = map_params(lambda tensor: tensor.clone().requires_grad_(), params)
    optimizer = torch.optim.AdamW(distinct(params), weight_decay=0.1, fused=True)  # bit for bit as ours
    train_loader = DataLoader(run.train_windows.astype(int), settings.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(run.val_windows.astype(int), settings.batch_size)

    @torch.no_grad()
    def mean_loss(loader):
        losses = [calc_loss(params, batch[:, :-1], batch[:, 1:], run.config).item()
                  for batch, _ in zip(loader, range(settings.eval_iter), strict=False)]
        return sum(losses) / len(losses)
    for _ in range(settings.epochs):
        for batch in train_loader:
            optimizer.zero_grad()
            calc_loss(params, batch[:, :-1], batch[:, 1:], run.config, torch.default_generator).backward()
            if settings.max_norm is not None and step >= settings.warmup_steps:
                nn.utils.clip_grad_norm_(distinct(params), settings.max_norm)
            optimizer.param_groups[0]["lr"] = learning_rate(step, run.total_steps, settings)
            optimizer.step()
            if step % settings.eval_freq == 0:
                evaluations.append((step + 1, mean_loss(train_loader), mean_loss(val_loader)))
            step += 1
    return map_params(torch.Tensor.detach, params), evaluations


@given(runs(warmup_steps=st.integers(0, 3), min_lr=st.none() | st.just(1e-5), max_norm=st.none() | st.just(0.5)))
def test_a_run_is_the_chapters_loop(run):
    state = start_state(run)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state.generator_state)
        params, evaluations = chapters_loop(state.params, run)
        random_state = torch.get_rng_state()
    state = advance(run, state)
    assert same(state.params, params) and same(state.generator_state, random_state)
    assert list(state.evaluations[:len(evaluations)]) == evaluations


def test_a_model_learns_one_batch_by_heart():
    params, batch = init_params(TINY, seeded()), examples(TINY, 8)
    opt_state, losses = init_optimizer(params), []
    for _ in range(100):
        params, opt_state, loss = train_step(params, opt_state, *batch, TINY, lr=0.01)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(31), rel=0.1) and losses[-1] < 0.1 and not loss.requires_grad


def by_columns(tensor):
    """An equal tensor, of which a matrix lies in memory column after column."""
    return tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor.clone()


@given(configs, seeds, st.sampled_from([tie, dict]), st.sampled_from([torch.float32, torch.float64]),
       st.sampled_from([0, 1, 1001]), st.sampled_from([{}, {"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.3}]),
       st.sampled_from([torch.float32, torch.bfloat16]), st.lists(st.booleans(), min_size=2, max_size=2))
@example(TINY, 123, tie, torch.float64, 1001, {}, torch.bfloat16, [False, True])  # bfloat16 has no 1001
def test_a_step_is_one_of_pytorchs_adamw(config, seed, tie_or_not, dtype, step, options, default_dtype, are_by_columns):
    lay_params, lay_moments = (by_columns if is_so else torch.clone for is_so in are_by_columns)
    params = map_params(lambda tensor: lay_params(tensor.to(dtype)), tie_or_not(init_params(config, seeded(seed))))
    opt_state = OptState(step, *(map_params(lambda tensor: lay_moments(tensor.abs() + 0.1), params) for _ in range(2)))
    theirs = [nn.Parameter(tensor.clone()) for tensor in distinct(params)]
    optimizer = torch.optim.AdamW(theirs, **{"lr": 0.0004, "weight_decay": 0.1} | options)
    for parameter, mean, squares in zip(theirs, *map(distinct, opt_state[1:]), strict=True):
        state = {"step": torch.tensor(float(step)), "exp_avg": mean, "exp_avg_sq": squares}
        optimizer.state[parameter] = deepcopy(state)

    def step_theirs(gradients):
        """Our step hands over its gradients, and PyTorch's AdamW makes its step with the same ones."""
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return gradients
    torch.set_default_dtype(default_dtype)  # which must not matter
    try:
        for _ in range(3):
            params, opt_state, _ = train_step(params, opt_state, *examples(config, config.context_length), config,
                                              dtype=dtype, change=step_theirs, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(distinct(params), [parameter.detach() for parameter in theirs])
    assert opt_state.step == step + 3


@pytest.mark.parametrize("dtype, score, letter", [("float32", 0.5, "b"), ("bfloat16", 0.0, " ")])
def test_step_evaluation_and_sample_are_computed_in_the_settings_type(dtype, score, letter):
    # Token 12, a b, scores 0.5, or 0 in bfloat16, which has no 256.5. Token 5, a line's end, scores 0.25, all others 0.
    params, seen = parrot(TINY, {12: (256.5, -256), 5: (0.25, 0)}), []
    run = small_run(dtype=dtype, lr=1e-30)
    run = run._replace(train_windows=np.full_like(run.train_windows, 12), val_windows=np.full_like(run.val_windows, 5),
                       processes=Processes(average=lambda gradients: seen.extend(gradients) or gradients),
                       steps_per_epoch=1)  # so that there is a sample after it
    state = next_state(run, start_state(run, Checkpoint(params, TINY)))

    total = math.exp(score) + math.exp(0.25) + 29
    assert state.evaluations[0][1:] == pytest.approx((math.log(total) - score, math.log(total) - 0.25), abs=1e-4)
    gradient = seen[list(params).index("out_head.weight")][12, 0]  # b's probability, less 1 because it is right
    assert gradient.item() == pytest.approx(math.exp(score) / total - 1, abs=0.005)
    assert log_lines(run, state)[1].endswith(letter * 50)
    assert_close(state.params, params)  # they stay in float32


def test_a_step_whose_loss_is_no_number_is_refused_and_writes_nothing():
    params = init_params(TINY, seeded())
    params["final_norm.scale"].fill_(3e38)  # finite, but the logits are not
    opt_state = init_optimizer(params)
    before = deepcopy((params, opt_state))
    with pytest.raises(FloatingPointError, match="after 0 steps"):
        train_step(params, opt_state, *examples(TINY, 8), TINY)
    assert same((params, opt_state), before)


# Appendix D: warm-up, decay along a cosine, clipping
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), seeds, st.sampled_from([0.0, 1e-6, 0.1, 100.0]),
       st.sampled_from([0.01, 1.0, 1000.0]))
def test_gradients_are_clipped_as_pytorch_clips_them(sizes, seed, scale, max_norm):
    generator = seeded(seed)
    gradients = [scale * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    theirs = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(theirs, max_norm)
    assert_close(clip_gradients(gradients, max_norm), [parameter.grad for parameter in theirs])


def test_gradients_are_clipped_after_they_were_averaged():
    inflated = Processes(average=lambda gradients: [1000 * gradient for gradient in gradients])
    run = small_run(max_norm=0.5)._replace(processes=inflated)
    means = next_state(run, start_state(run)).opt_state.exp_avg.values()  # after one step a tenth of the gradients
    assert 10 * torch.cat([mean.flatten() for mean in means]).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("settings, rates", [
    ({}, [0.5] * 6), ({"warmup_steps": 2, "initial_lr": 0.1}, [0.1, 0.3, 0.5, 0.5, 0.5, 0.5]),
    ({"warmup_steps": 3, "initial_lr": 0.2, "min_lr": 0.1}, [0.2, 0.3, 0.4, 0.5, 0.4, 0.2])])  # of 0, 60, 120 degrees
def test_the_learning_rate_grows_in_a_line_and_falls_along_a_cosine(settings, rates):
    assert [learning_rate(step, 6, Settings(lr=0.5, **settings)) for step in range(6)] == pytest.approx(rates)


# The text of a run
def test_files_are_one_text_without_their_byte_order_marks_and_become_its_tokens(tmp_path):
    for name, content in {"1": b"one", "2": "\ufeffzwö\r\n".encode(), "3": "\ntr\rois 中🙂".encode()}.items():
        (tmp_path / name).write_bytes(content)
    text = read_text(sorted(tmp_path.iterdir()))
    assert text == "one<|endoftext|>zwö\n<|endoftext|>\ntr\nois 中🙂"
    tokens = tokenize(text, CHAPTER_RUN.tokenizer)
    assert tokens.dtype == np.uint16 and tokens.tolist() == CHAPTER_RUN.tokenizer.encode(text, allowed_special="all")


def test_a_text_is_split_by_characters_and_each_part_has_its_windows():
    text = read_text(())
    run = make_run(text, SMALL, Settings(context_length=8, train_ratio=0.3, batch_size=3, epochs=2))
    for windows, part in ((run.train_windows, text[:6143]), (run.val_windows, text[6143:])):  # 30 % of 20479
        tokens = CHAPTER_RUN.tokenizer.encode(part)
        assert windows.tolist() == [tokens[i:i + 9] for i in range(0, len(tokens) - 8, 8)]
    assert run.steps_per_epoch == len(run.train_windows) // 3 == run.total_steps / 2


def test_a_run_needs_whole_batches_which_all_processes_can_share():
    settings = Settings(context_length=4, train_ratio=0.65, epochs=7)  # of 14 words 9, two windows with their targets
    assert make_run(" a" * 14, SMALL, settings).total_steps == 7
    assert_refused(lambda: make_run(" a" * 13, SMALL, settings), "1 windows", "short")
    assert_refused(lambda: make_run(" a" * 14, SMALL, replace(settings, train_ratio=0.9)), "0 for validation", "short")
    assert_refused(lambda: make_run(" a" * 14, SMALL, settings, Processes(0, 3)), "batch_size")


# A run is a sequence of states
@given(runs(lr=st.sampled_from([4e-4, 0.01]), warmup_steps=st.integers(0, 3), min_lr=st.sampled_from([None, 1e-5]),
            max_norm=st.sampled_from([None, 0.5]), dtype=st.sampled_from(["float32", "bfloat16"]),
            data=st.just((Path("book.txt"),))), st.booleans(), st.data())
def test_a_saved_state_goes_on_bit_for_bit_as_if_nothing_had_happened(tmp_path_factory, run, is_tied, data):
    path = tmp_path_factory.mktemp("saved") / "model.pth"
    params = init_params(run.config, seeded())
    state = start_state(run, Checkpoint(tie(params) if is_tied else params, run.config))
    whole = advance(run, deepcopy(state))
    # The first part may be a shorter run, whose end is evaluated, unless the learning rate depends on the length.
    epochs = data.draw(st.integers(1, run.settings.epochs)) if run.settings.min_lr is None else run.settings.epochs
    first = run._replace(settings=replace(run.settings, epochs=epochs), total_steps=epochs * run.steps_per_epoch)
    state = advance(first, state, data.draw(st.integers(0, first.total_steps)))
    save_checkpoint(path, to_checkpoint(first, state))
    resumed = start_state(run, load_checkpoint(path))
    assert same(resumed, state)
    assert all(len(distinct(each)) == len(params) - is_tied for each in (resumed.params, *resumed.opt_state[1:]))
    resumed = advance(run, resumed)
    assert same(resumed[:4], whole[:4]) and set(whole.evaluations) <= set(resumed.evaluations)


@pytest.mark.parametrize("has_optimizer", [False, True])
def test_a_run_trains_copies_of_the_model_that_it_starts_from(has_optimizer):
    run = small_run(seed=7)
    donor = advance(run, start_state(run), 4)  # in the middle of an epoch
    lower = map_params(torch.Tensor.bfloat16, donor.params)
    loaded = Checkpoint(lower, TINY, donor.opt_state if has_optimizer else None)
    before, state = deepcopy(loaded), start_state(run, loaded)
    opt_state = donor.opt_state if has_optimizer else init_optimizer(donor.params)
    assert same(state, (map_params(torch.Tensor.float, lower), opt_state, seeded(7).get_state(), None, ()))
    assert advance(run, state).opt_state.step == 12 and same(loaded, before)


@pytest.mark.parametrize("eval_freq, log, evaluated", [
    (4, "1:1 1:5 s 2:9 s", [1, 5, 9, 12]), (5, "1:1 1:6 s 2:11 s", [1, 6, 11, 12]), (11, "1:1 s 2:12 s", [1, 12])])
def test_losses_are_printed_every_eval_freq_steps_and_a_sample_after_an_epoch(eval_freq, log, evaluated, capsys):
    run = small_run(eval_freq=eval_freq)
    for function in (train_simple, train):
        state = function(run, start_state(run))
        assert function(run, state) is state  # nothing is left to do
        marks = [f"{line[3]}:{int(line[11:17]) + 1}" if line.startswith("Ep ") else "s"  # epoch:step or a sample
                 for line in capsys.readouterr().out.splitlines()]
        assert " ".join(marks) == log and [step for step, _, _ in state.evaluations] == evaluated


# What `train` prints and saves, whatever happens
def listening(listen):
    """Standard output that calls a function with the number of steps when their losses are written."""
    return redirect_stdout(Listener(
        lambda text: listen(int(text.split("Step ")[1][:6]) + 1) if "(Step " in text else None))


def test_a_run_saves_every_so_many_steps_and_a_save_that_fails_gives_a_warning(tmp_path):
    run, path, seen = small_run(eval_freq=1, save_every=5), tmp_path / "model.pth", []

    def listen(step):  # a step is printed before it is saved
        seen.append(saved_steps(path) if path.is_file() else None)
        if step == 7:
            path.unlink()
            path.mkdir()  # no file can take its place
        if step == 11:
            path.rmdir()
    with listening(listen), pytest.warns(UserWarning, match=r"model\.pth"):
        state = train(run, start_state(run), str(path))
    assert seen == [0] * 5 + [5] * 2 + [None] * 5 and state.opt_state.step == 12
    assert same(start_state(run, load_checkpoint(path)), state)


def test_the_last_save_must_succeed(tmp_path):
    run, path = small_run(epochs=1, eval_freq=1), tmp_path / "model.pth"
    with listening(lambda step: path.unlink() or path.mkdir() if step == 6 else None):
        assert_refused(lambda: train(run, start_state(run), path), "model.pth")


def test_a_picture_that_can_not_be_drawn_gives_a_warning_at_the_end_of_the_run(tmp_path, monkeypatch):
    run, path = small_run(epochs=1), tmp_path / "model.pth"
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not there
    with pytest.warns(UserWarning, match="matplotlib"):
        train(run, start_state(run), path)
    assert saved_steps(path) == 6 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("save_every, step", [(0, 0), (1, 2)])
def test_a_model_that_computes_nan_ends_the_run_and_is_not_saved(tmp_path, save_every, step):
    factors, path = iter([1, 1, math.nan, 1]), tmp_path / "model.pth"

    def average(tensors):  # also of a flag, which says whether a signal has come
        factor = next(factors) if len(tensors) > 1 else 1
        return [tensor * factor for tensor in tensors]
    run = small_run(save_every=save_every)._replace(processes=Processes(average=average))
    with pytest.raises(FloatingPointError, match="nan"):
        train(run, start_state(run), path)
    assert saved_steps(path) == step and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number, handler, steps, is_default_then", [
    (signal.SIGTERM, signal.SIG_IGN, 12, False),  # ignored, as SIGHUP is under nohup
    (signal.SIGTERM, lambda *_: None, 1, False), (signal.SIGINT, lambda *_: None, 1, True)])
def test_a_signal_ends_a_run_unless_it_is_ignored_and_a_second_ctrl_c_its_process(
        number, handler, steps, is_default_then):
    run, before, then = small_run(eval_freq=1), signal.signal(number, handler), []
    try:
        with listening(lambda step: signal.raise_signal(number) or then.append(signal.getsignal(number))):
            assert train(run, start_state(run)).opt_state.step == len(then) == steps
        assert (then[0] == signal.SIG_DFL) == is_default_then and signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


# Several processes
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_two_processes_agree_and_without_dropout_train_as_one_does(drop_rate):
    run = small_run(replace(TINY, drop_rate=drop_rate), eval_freq=3)

    def next_of_both(state):
        def next_of(rank, average):
            return next_state(run._replace(processes=Processes(rank, 2, average)), deepcopy(state))
        both = []  # first the gradients of each process, then what both do with the mean
        for rank in range(2):
            next_of(rank, lambda gradients: both.append(gradients) or gradients)
        assert not same(*both)  # each is of one half of the batch
        mean = [sum(pair) / 2 for pair in zip(*both, strict=True)]
        return [next_of(rank, lambda _: mean) for rank in range(2)]
    state = start_state(run)
    for _ in range(4):
        one, two = next_of_both(state)
        assert same(one, two) and same([one, two], next_of_both(state))  # the same step draws the same masks
        state = next_state(run, state)
        if drop_rate == 0:  # the moments show the gradients: the same sums in another order
            assert_close(one.opt_state[1:] + one.evaluations, state.opt_state[1:] + state.evaluations, **ROUNDING)
            assert same(one[2:4], state[2:4])


def test_each_process_and_step_has_masks_of_its_own():
    def draw(step, rank, seed):
        run, own = small_run(seed=seed)._replace(processes=Processes(rank, 3)), seeded()
        return torch.rand((), generator=dropout_generator(run, step, own, CPU)).item()
    draws = [draw(step, rank, seed) for step in range(20) for rank in range(3) for seed in (1, 2)]
    assert len(set(draws)) == len(draws) == 120


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_another_process_ends_this_one_and_the_first_saves(tmp_path, capsys, rank):
    flags, path = iter([0.0, 0.0, 0.5]), tmp_path / "model.pth"  # one of two processes has got a signal before step 3
    run = small_run()._replace(processes=Processes(
        rank, 2, lambda tensors: tensors if len(tensors) > 1 else [torch.tensor([next(flags)])]))
    assert train(run, start_state(run), path).opt_state.step == 2
    assert bool(capsys.readouterr().out) == path.exists() == (rank == 0)


# The picture (figure 5.12)
def test_losses_are_drawn_against_epochs_and_tokens_seen(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig

    def seen(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)
    monkeypatch.setattr(Figure, "savefig", seen)
    plot_losses([(1, 9.8, 9.9), (6, 8.5, 9.0), (12, 8.1, 8.3)], small_run(), tmp_path / "a.picture")
    axes, tokens = figures[0].axes[0], figures[0].axes[0].child_axes[0]
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        "Training loss": [[1 / 6, 9.8], [1, 8.5], [2, 8.1]], "Validation loss": [[1 / 6, 9.9], [1, 9.0], [2, 8.3]]}
    assert [axes.get_xlabel(), axes.get_ylabel(), tokens.get_xlabel()] == ["Epochs", "Loss", "Tokens seen"]
    assert tokens.get_xlim() == pytest.approx([6 * 2 * 4 * end for end in axes.get_xlim()])  # an epoch's
    assert all(tick == int(tick) for tick in axes.get_xticks()) and len(axes.get_legend().texts) == 2
    assert (tmp_path / "a.picture").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TypeError):
        plot_losses([(1, 9.8, object())], small_run(), tmp_path / "b.picture")
    assert [path.name for path in tmp_path.iterdir()] == ["a.picture"]  # nothing is left of a picture that fails
