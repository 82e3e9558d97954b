"""Pretraining: windows of text, the loss over a set, the training step, the run. `python train.py --help`

A run is a sequence of states. What stays the same is a `Run`, what changes is a `State`, and `next_state` makes the
next from the last: it prints nothing and saves nothing. `train` calls it again and again, prints, and saves. The
chapter's loops, over epochs and the batches of each, are in the number of steps that a state has behind it: the epoch
is that number // steps_per_epoch, and the batch what remains. A step after which the chapter prints the losses makes
two states, one after the training and one with the losses.

The random numbers of a run come from one generator. Its state is part of the run's state, so a run that was saved goes
on as if nothing had happened. On a CPU they are drawn in the chapter's order:

    once         the parameters, in the order of `param_shapes`
    an epoch     two seeds; the second one gives the order of the windows
    a step       dropout: of the embeddings; in each block of the attention weights, its output, the feed-forward output
    evaluation   two seeds for the training windows, one for the validation windows

With several processes, or on another device, dropout has generators of its own.

Axes: B batch, T tokens.
"""
import argparse
import ctypes
import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # For speed on a busy machine: see sample.py.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw
from tqdm import tqdm

import sample
from gpt import GPT_CONFIG_124M, Config, Params, calc_loss, compute_in, distinct, init_params, map_params
from sample import (
    END_OF_TEXT,
    PICTURE,
    TEXT,
    TEXTS,
    generate,
    number,
    one_of,
    option,
    say,
    text_to_token_ids,
    token_ids_to_text,
    whole,
)
from weights import (
    BETAS,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Checkpoint,
    OptState,
    from_fields,
    load_checkpoint,
    load_model,
    save_checkpoint,
    usual_heads,
    write_atomically,
)

STORY = "the-verdict.txt"
PIECE = 2**20  # characters that are tokenized at a time


@dataclass(frozen=True)
class Settings(sample.Checked):
    """The options of a run, besides the model's. The defaults are the chapter's.

    Each line is `name: type = option(default, what it may be, what it is)`. `option` and what may stand in it are about
    command lines and come late in sample.py. The options after start_context are not the chapter's.
    """
    data: tuple[str, ...] = option((STORY,), TEXTS, "UTF-8 text files")
    train_ratio: float = option(0.9, number(0, 1, above=True), "the part of the text to train on")
    context_length: int = option(256, whole(1), "tokens in a window, and the most that a fresh model can see")
    epochs: int = option(10, whole(0), "in all, also with --resume; 0 prints the losses of the model and ends")
    batch_size: int = option(2, whole(1), "windows in a step, over all processes")
    lr: float = option(LEARNING_RATE, number(0, above=True), "AdamW's learning rate")
    weight_decay: float = option(WEIGHT_DECAY, number(0), "AdamW's weight decay")
    warmup_steps: int = option(0, whole(0), "steps in which the learning rate grows up to --lr")
    initial_lr: float = option(3e-5, number(0), "the learning rate at the first of these steps")
    min_lr: float | None = option(None, number(0), "what the rate falls to, along a cosine, until the last step")
    max_norm: float | None = option(None, number(0, above=True), "the length to which the gradient is clipped, "
                                    "after the warm-up")
    seed: int = option(123, whole(0, 2**63 - 1), "of every random draw")
    eval_freq: int = option(5, whole(1), "steps between evaluations")
    eval_iter: int = option(5, whole(1), "batches of each set in an evaluation")
    start_context: str = option("Every effort moves you", TEXT, "what the samples continue")
    dtype: str = option("float32", one_of("float32", "bfloat16"), "of the computation: float32, which is exact, or "
                        "bfloat16, which is faster on processors that have units for it")
    save_every: int = option(0, whole(0), "steps between saves, besides those at the start and the end; 0: none")
    plot: str = option("loss.png", PICTURE, "the picture of the losses: .png, .pdf or .svg")
    best: str | None = option(None, TEXT, "where the model with the lowest validation loss is kept, if anywhere")


class Processes(NamedTuple):
    """For torchrun: this process among those that train together, each on its part of every batch.

    The default is one process, for which gather and average do nothing. gather(value) is the list of every process's
    value. average(gradients) may write into the gradients. launcher is the process id of torchrun, by which a restarted
    run knows its own file.
    """
    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    average: Callable[[list[Tensor]], list[Tensor]] = lambda gradients: gradients
    launcher: int = 0


ONE_PROCESS = Processes()


class Run(NamedTuple):
    """What stays the same through a run. Windows are (n, T + 1) tokens: T inputs, and T targets one token later."""
    config: Config
    settings: Settings
    train_windows: np.ndarray
    val_windows: np.ndarray
    text_hash: str  # of the windows, so that a saved run does not go on with others
    tokenizer: tiktoken.Encoding
    processes: Processes = ONE_PROCESS

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_windows) // self.settings.batch_size

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch_size * self.settings.context_length


class State(NamedTuple):
    """What changes through a run. With this and its `Run`, a run can go on as if it had never stopped."""
    params: Params
    opt_state: OptState
    generator_state: Tensor
    order: Tensor | None = None   # the indices of the windows in each batch of this epoch: (steps_per_epoch, B)
    evaluations: tuple[tuple[int, float, float], ...] = ()  # tokens seen, training loss, validation loss
    loss: float | None = None     # of the last batch


# The text

def read_text(paths: Sequence[str | Path]) -> str:
    """The text of UTF-8 files, `<|endoftext|>` between them; ValueError for one that is empty or no text."""
    texts = []
    for path in paths:
        if path == STORY and not Path(path).exists():
            path = Path(__file__).with_name(STORY)  # the story came with this file
        try:
            texts.append(Path(path).read_text(encoding="utf-8-sig"))  # -sig: a byte-order mark is no part of the text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: see its byte {error.start}. If it is in Latin-1, "
                             f"`iconv -f latin1 -t utf-8 {path}` converts it") from None
        if not texts[-1].strip() or "\0" in texts[-1]:
            kind = "not text: it contains NUL characters" if texts[-1].strip() else "empty"
            raise ValueError(f"{path} is {kind}")
    return END_OF_TEXT.join(texts)


def tokenize(text: str, tokenizer: tiktoken.Encoding, piece: int = PIECE) -> np.ndarray:
    """The token ids of a text, as 16-bit integers: those of `text_to_token_ids`, by all processors (section 5.1.3)."""
    # To GPT-2 a blank is part of the word after it, so a text can be cut after a word and gives the same tokens. It is
    # cut into pieces of `piece` characters and the rest of a word.
    pieces = re.findall(rf"(?s).{{{piece}}}.*?\S(?=[ \n])|.*", text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tokens = pool.map(
            lambda part: tokenizer.encode_to_numpy(part, allowed_special={END_OF_TEXT}).astype(np.uint16), pieces)
        return np.concatenate(list(tqdm(tokens, "tokenizing", len(pieces), delay=1, leave=False, disable=None)))


def make_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Views of length + 1 tokens (n, length + 1), one every `length` tokens: inputs, and targets shifted by one."""
    if len(tokens) <= length:
        return np.empty((0, length + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


def make_run(text: str, config: Config, settings: Settings, processes: Processes = ONE_PROCESS) -> Run:
    """A run over this text: its first part is for training, the rest for validation (section 5.1.3).

    The text should be that of settings.data, where --resume looks for it. ValueError if it is too short.
    """
    tokenizer, length = sample.gpt2_tokenizer(), settings.context_length
    split = int(settings.train_ratio * len(text))
    try:
        train_windows, val_windows = (
            make_windows(tokenize(part, tokenizer), length) for part in (text[:split], text[split:]))
    except ValueError as error:  # the tokenizer's: it takes a few hundred thousand blanks in a row, not a million
        raise ValueError(f"{' '.join(settings.data)}: {error}") from None
    for part, windows, needed in (("training", train_windows, settings.batch_size), ("validation", val_windows, 1)):
        if len(windows) < needed:
            raise ValueError(f"the text is too short: its {part} part has {len(windows)} windows of {length} tokens, "
                             f"{needed} or more are needed: a smaller --context-length or --batch-size needs less text")
    text_hash = hashlib.sha256(train_windows.tobytes())
    text_hash.update(val_windows.tobytes())
    return Run(config, settings, train_windows, val_windows, text_hash.hexdigest(), tokenizer, processes)


def draw_batches(n: int, batch_size: int, generator: torch.Generator, shuffle: bool) -> tuple[Tensor, ...]:
    """For each batch of a pass over n windows, the indices of its windows (B,): as DataLoader draws them (5.1.3).

    A shuffled pass, for training, drops the last batch if it is not full.
    """
    # DataLoader draws a seed for its worker processes, even without any, and, if it shuffles, a seed for the order.
    seeds = torch.empty(2 if shuffle else 1, dtype=torch.int64).random_(generator=generator)
    if not shuffle:
        return torch.split(torch.arange(n), batch_size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(int(seeds[1])))
    return torch.split(order, batch_size)[:n // batch_size]


def get_batch(windows: np.ndarray, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of the windows with these indices."""
    tokens = torch.from_numpy(windows[indices.numpy()].astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


# The loss over a set

@torch.no_grad()
def mean_loss(params: Params, config: Config, windows: np.ndarray, batches: Sequence[Tensor]) -> float:
    """The mean loss, without dropout, over batches, each given by the indices of its windows (section 5.1.3)."""
    device = params["tok_emb.weight"].device
    losses = [calc_loss(params, *get_batch(windows, indices, device), config).item() for indices in batches]
    return sum(losses) / len(losses)


def evaluate_model(params: Params, run: Run, generator: torch.Generator,
                   eval_iter: int | None = None) -> tuple[float, float]:
    """The mean training and validation loss without dropout, over eval_iter batches of each; None is all (section 5.2).

    The generator, moved on, gives the order of the training batches. FloatingPointError if a loss is infinite or nan.
    """
    batch_size = run.settings.batch_size
    params = compute_in(params, getattr(torch, run.settings.dtype))
    train_batches = draw_batches(len(run.train_windows), batch_size, generator, shuffle=True)[:eval_iter]
    val_batches = draw_batches(len(run.val_windows), batch_size, generator, shuffle=False)[:eval_iter]
    losses = (mean_loss(params, run.config, run.train_windows, train_batches),
              mean_loss(params, run.config, run.val_windows, val_batches))
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError("the training loss is {} and the validation loss {}".format(*losses))
    return losses


# The training step

def init_optimizer(params: Params) -> OptState:
    """AdamW's state before the first step: both running means of each gradient are 0 (section 5.2)."""
    return OptState(0, map_params(torch.zeros_like, params), map_params(torch.zeros_like, params))


def loss_and_gradients(params: Params, inputs: Tensor, targets: Tensor, config: Config,
                       generator: torch.Generator | None = None,
                       dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch, a scalar, and its gradient with respect to each distinct tensor of the parameters.

    inputs and targets are (B, T). Without a generator there is no dropout. The model computes in `dtype`; the gradients
    have the type of the parameters. FloatingPointError if the loss is infinite or nan.
    """
    leaves = map_params(lambda tensor: tensor.detach().requires_grad_(), params)
    loss = calc_loss(compute_in(leaves, dtype), inputs, targets, config, generator)
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}")
    # Contiguous, as AdamW's fused kernel and an average over processes need them.
    return loss.detach(), [gradient.contiguous() for gradient in torch.autograd.grad(loss, distinct(leaves))]


@torch.no_grad()
def adamw_step(params: Params, opt_state: OptState, gradients: list[Tensor], lr: float = LEARNING_RATE,
               weight_decay: float = WEIGHT_DECAY) -> tuple[Params, OptState]:
    """Parameters and optimizer state after one step of AdamW, from one gradient for each distinct tensor.

    To save memory, the new values are written into the tensors that were passed: use only what is returned.
    """
    # The function behind torch.optim.AdamW, which wants the number of steps as a tensor for each parameter.
    steps = list(torch.full((len(gradients),), float(opt_state.step), device=gradients[0].device))
    adamw(distinct(params), gradients, distinct(opt_state.exp_avg), distinct(opt_state.exp_avg_sq),
          max_exp_avg_sqs=[], state_steps=steps, fused=True, amsgrad=False, maximize=False,
          beta1=BETAS[0], beta2=BETAS[1], eps=EPS, lr=lr, weight_decay=weight_decay)
    return params, opt_state._replace(step=opt_state.step + 1)


def train_step(params: Params, opt_state: OptState, inputs: Tensor, targets: Tensor, config: Config,
               generator: torch.Generator | None = None, *, lr: float = LEARNING_RATE,
               weight_decay: float = WEIGHT_DECAY,
               dtype: torch.dtype = torch.float32) -> tuple[Params, OptState, Tensor]:
    """Parameters and optimizer state after one step of training, and what the loss of this batch was (section 5.2).

    Arguments and errors are those of its two halves, `loss_and_gradients` and `adamw_step`. After an error nothing was
    written; else use only what is returned.
    """
    loss, gradients = loss_and_gradients(params, inputs, targets, config, generator, dtype)
    params, opt_state = adamw_step(params, opt_state, gradients, lr, weight_decay)
    return params, opt_state, loss


def learning_rate(step: int, total_steps: int, settings: Settings) -> float:
    """The learning rate of a step, counted from 0 (section 5.2 and appendix D).

    The chapter's is constant. With warmup_steps it first grows up to that, with min_lr it then falls along a cosine.
    """
    warmup, peak = settings.warmup_steps, settings.lr
    if step < warmup:
        return settings.initial_lr + step * (peak - settings.initial_lr) / warmup
    if settings.min_lr is None:
        return peak
    progress = (step - warmup) / (total_steps - warmup)
    return settings.min_lr + (peak - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """The gradients; if all of them together are longer than max_norm, shortened to it (appendix D). In place."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    return [gradient.mul_(scale) for gradient in gradients]


# The run

def start_state(run: Run, loaded: Checkpoint | None = None, device: torch.device | str = "cpu") -> State:
    """The first state of a run, or the one that was saved; ValueError if that is of another text, or damaged.

    Without a run in the checkpoint, a new one starts from its parameters and, if it has one, its optimizer's state.
    """
    generator = torch.Generator().manual_seed(run.settings.seed)
    if loaded is None:
        loaded = Checkpoint(init_params(run.config, generator), run.config)

    def copied(tensor: Tensor) -> Tensor:  # because training writes into it
        return tensor.to(device, torch.float32, copy=True)

    params = map_params(copied, loaded.params)
    if loaded.opt_state is None:
        opt_state = init_optimizer(params)
    else:
        step, exp_avg, exp_avg_sq = loaded.opt_state
        opt_state = OptState(step, map_params(copied, exp_avg), map_params(copied, exp_avg_sq))
    state = State(params, opt_state, generator.get_state())
    if "text_hash" not in loaded.run:
        return state
    if loaded.run["text_hash"] != run.text_hash:
        raise ValueError(f"it was made with other data than {' '.join(run.settings.data)}; to start a new run from its "
                         "model, use --weights and another --checkpoint")
    return restore(run, state, loaded.run)


def to_checkpoint(run: Run, state: State) -> Checkpoint:
    """What is saved of a state: of this, `start_state` makes the same state again."""
    rest = {"generator_state": state.generator_state, "order": state.order, "evaluations": state.evaluations,
            "loss": state.loss, "text_hash": run.text_hash, "settings": asdict(run.settings),
            "launcher": run.processes.launcher}
    opt_state = state.opt_state if state.opt_state.step > 0 else None  # at the start it is nothing but zeros
    return Checkpoint(state.params, run.config, opt_state, rest)


def next_state(run: Run, state: State) -> State:
    """The next state of a run: after one evaluation, where one is due, else after one step of training (section 5.2).

    Only the tensors of parameters and moments are written into: go on with the state that is returned. After an error,
    the state that was passed is as it was. FloatingPointError if the loss is infinite or nan.
    """
    generator = torch.Generator()
    generator.set_state(state.generator_state)
    if is_evaluation_due(run, state):
        return evaluated(run, state, generator)
    return trained(run, state, generator)


def evaluated(run: Run, state: State, generator: torch.Generator) -> State:
    """The state with one more evaluation."""
    step = state.opt_state.step
    losses = evaluate_model(state.params, run, generator, run.settings.eval_iter)
    # At its end a run is evaluated where the chapter does not do so. What this draws must not change a longer run.
    generator_state = generator.get_state() if is_logged(run, step) else state.generator_state
    evaluations = (*state.evaluations, (step * run.tokens_per_step, *losses))
    return state._replace(evaluations=evaluations, generator_state=generator_state)


def trained(run: Run, state: State, generator: torch.Generator) -> State:
    """The state after one more step of training."""
    settings, processes, order = run.settings, run.processes, state.order
    step = state.opt_state.step  # how many were done
    index = step % run.steps_per_epoch  # of this one in its epoch
    if index == 0 or order is None:  # None: the run began with a file of other tools, in the middle of an epoch
        batches = draw_batches(len(run.train_windows), settings.batch_size, generator, shuffle=True)
        order = processes.gather(torch.stack(batches))[0]  # the first process's, for all
    device = state.params["tok_emb.weight"].device
    indices = order[index].chunk(processes.size)[processes.rank]  # of one process: all
    inputs, targets = get_batch(run.train_windows, indices, device)

    # This is `train_step`, with what is done to the gradients between its halves.
    draws, dtype = dropout_generator(run, step, generator, device), getattr(torch, settings.dtype)
    loss, gradients = loss_and_gradients(state.params, inputs, targets, run.config, draws, dtype)
    gradients = processes.average(gradients)
    if settings.max_norm is not None and step >= settings.warmup_steps:
        gradients = clip_gradients(gradients, settings.max_norm)
    params, opt_state = adamw_step(state.params, state.opt_state, gradients,
                                   learning_rate(step, run.total_steps, settings), settings.weight_decay)
    return State(params, opt_state, generator.get_state(), order, state.evaluations, loss.item())


def is_logged(run: Run, step: int) -> bool:
    """Whether the chapter prints the losses after this many steps: after the first, and then every eval_freq."""
    return step > 0 and (step - 1) % run.settings.eval_freq == 0


def is_evaluation_due(run: Run, state: State) -> bool:
    """Whether this state's losses are wanted, for the log or at the end of the run, and not among its evaluations."""
    step = state.opt_state.step
    is_done = bool(state.evaluations) and state.evaluations[-1][0] == step * run.tokens_per_step
    return not is_done and (is_logged(run, step) or step == run.total_steps)


def is_finished(run: Run, state: State) -> bool:
    """Whether nothing is left to do."""
    return state.opt_state.step >= run.total_steps and not is_evaluation_due(run, state)


def dropout_generator(run: Run, step: int, generator: torch.Generator, device: torch.device) -> torch.Generator:
    """What a step's dropout draws from: on a CPU, in the first process, the run's own generator, as in the chapter.

    Anywhere else a new one for each step, so that the same step draws the same masks again.
    """
    if device.type == "cpu" and run.processes.rank == 0:
        return generator
    seed = np.random.SeedSequence((run.settings.seed, step, run.processes.rank)).generate_state(1)
    return torch.Generator(device).manual_seed(int(seed[0]))


def log_lines(run: Run, state: State) -> list[str]:
    """The lines of the chapter's log that belong to a state: its losses, and a sample at the end of an epoch."""
    steps, lines = state.opt_state.step, []
    if steps == 0 or is_evaluation_due(run, state):  # the lines come with the next state: the same with its losses
        return []
    epoch, index = divmod(steps - 1, run.steps_per_epoch)  # of the last step: the chapter counts from 0
    if is_logged(run, steps):
        _, train_loss, val_loss = state.evaluations[-1]
        lines.append(f"Ep {epoch + 1} (Step {steps - 1:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
    if index == run.steps_per_epoch - 1:
        params = compute_in(state.params, getattr(torch, run.settings.dtype))
        prompt = text_to_token_ids(run.settings.start_context, run.tokenizer).to(params["tok_emb.weight"].device)
        text = token_ids_to_text(generate(params, prompt, run.config, 50), run.tokenizer)
        lines.append(text.replace("\n", " "))
    return lines


def plot_losses(evaluations: Sequence[tuple[int, float, float]], tokens_per_epoch: int, path: str | Path) -> None:
    """Draws the losses against epochs, with a second axis for the tokens seen, into a file (figure 5.12)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    tokens_seen, train_losses, val_losses = zip(*evaluations, strict=True)
    epochs_seen = [tokens / tokens_per_epoch for tokens in tokens_seen]
    figure = Figure(figsize=(5, 3), dpi=150, layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(evaluations) == 1 else ""  # one point makes no line
    axes.plot(epochs_seen, train_losses, marker=marker, label="Training loss")
    axes.plot(epochs_seen, val_losses, marker=marker, linestyle="-.", label="Validation loss")
    axes.set(xlabel="Epochs", ylabel="Loss")
    axes.legend(loc="upper right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    to_tokens, to_epochs = (lambda epochs: epochs * tokens_per_epoch), (lambda tokens: tokens / tokens_per_epoch)
    axes.secondary_xaxis("top", functions=(to_tokens, to_epochs)).set_xlabel("Tokens seen")
    with write_atomically(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:])


def train(run: Run, state: State, checkpoint: str | None = None, signals: Sequence[int] | None = None) -> State:
    """The last state of a run: at its end, or after the step in which a signal came (section 5.2).

    Prints the chapter's log. With a checkpoint, saves there at the start, every save_every steps and at the end, and
    draws the losses. Of several processes, the first alone prints and saves. An error is raised after saving what was
    reached; but when a loss is infinite or nan, a FloatingPointError is raised and the file stays as it is. `signals`
    is for a caller who catches signals: a list that gets an item when one has come.
    """
    if signals is None:
        with caught_signals() as signals:
            return train(run, state, checkpoint, signals)
    leader, tokens = run.processes.rank == 0, run.tokens_per_step
    if leader and checkpoint and state.opt_state.step == 0:
        save_state(run, state, checkpoint)  # if nothing can be written there, it is better to know now
    try:
        with tqdm(desc="training", total=run.total_steps * tokens, initial=state.opt_state.step * tokens,
                  unit=" tokens", unit_scale=True, disable=None if leader else True) as bar:
            while not is_finished(run, state) and not any(run.processes.gather(bool(signals))):
                state = next_state(run, state)
                if leader:
                    report(run, state, bar)
                    if checkpoint and is_save_due(run, state):
                        save_state(run, state, checkpoint)
                    if run.settings.best and is_best(run, state):
                        save_state(run, state, run.settings.best)
    except FloatingPointError as error:
        raise FloatingPointError(f"after {state.opt_state.step} steps {error}") from None
    except Exception:
        if leader and checkpoint:
            finish(run, state, checkpoint)
        raise
    if leader and checkpoint:
        finish(run, state, checkpoint)
    return state


def report(run: Run, state: State, bar: "tqdm[Any]") -> None:
    """Moves the bar to where the state is, and prints the state's lines of the log."""
    if state.loss is not None:
        bar.set_postfix(loss=f"{state.loss:.3f}", refresh=False)
    bar.update(state.opt_state.step * run.tokens_per_step - bar.n)
    for line in log_lines(run, state):
        tqdm.write(line, file=sys.stdout)  # clear of the bar, which is on standard error
    sys.stdout.flush()


# ---- The chapter ends here. What follows is around it: saving, signals, other processes and the options. ----

def restore(run: Run, state: State, saved: dict[str, Any]) -> State:
    """The state with what was saved beside parameters and moments; ValueError if that is damaged."""
    try:
        generator = torch.Generator()
        generator.set_state(saved["generator_state"])
        evaluations = tuple((int(tokens), float(train_loss), float(val_loss))
                            for tokens, train_loss, val_loss in saved["evaluations"])
        order, shape = saved["order"], (run.steps_per_epoch, run.settings.batch_size)
        if order is not None:
            order = order.clone()  # so that nothing stays mapped to the file
            if order.shape != shape or order.dtype != torch.int64 or not 0 <= order.min() <= order.max() < len(
                    run.train_windows):
                raise ValueError
        loss = None if saved["loss"] is None else float(saved["loss"])
        if loss is not None and state.opt_state.step == 0:  # a step was done, but the optimizer's state is missing
            raise ValueError
        return State(state.params, state.opt_state, generator.get_state(), order, evaluations, loss)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError):
        raise ValueError("the state of the run in it is damaged") from None


def is_save_due(run: Run, state: State) -> bool:
    """Whether the settings say to save after this step; with its evaluation, where one is due."""
    every = run.settings.save_every
    return every > 0 and state.opt_state.step % every == 0 and not is_evaluation_due(run, state)


def is_best(run: Run, state: State) -> bool:
    """Whether this state was just evaluated and has the lowest validation loss so far."""
    if not state.evaluations:
        return False
    *before, (tokens, _, val_loss) = state.evaluations
    return tokens == state.opt_state.step * run.tokens_per_step and all(val_loss < other for _, _, other in before)


def save_state(run: Run, state: State, path: str) -> bool:
    """Saves the state, and draws its losses: whether there is a picture now.

    FloatingPointError if the model computes nan; then nothing is saved.
    """
    loss = mean_loss(state.params, run.config, run.val_windows, [torch.tensor([0])])
    if not all(map(math.isfinite, [loss, *(tensor.sum().item() for tensor in distinct(state.params))])):
        raise FloatingPointError("the model computes nan")
    save_checkpoint(path, to_checkpoint(run, state))
    if not state.evaluations:
        return False
    try:
        plot_losses(state.evaluations, run.steps_per_epoch * run.tokens_per_step, run.settings.plot)
    except OSError as error:
        say(f"{run.settings.plot} could not be written: {error.strerror}")
        return False
    return True


def finish(run: Run, state: State, checkpoint: str) -> None:
    """Saves the state for the last time and says what is where, and how to go on."""
    picture = f" and {run.settings.plot}" if save_state(run, state, checkpoint) else ""
    say(f"saved {checkpoint} ({os.path.getsize(checkpoint) / 1e6:,.1f} MB){picture}")
    if not is_finished(run, state):
        command = shlex.join(["python", "train.py", "--resume", "--checkpoint", checkpoint])
        say(f"stopped after {state.opt_state.step} steps: `{command}` goes on")


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that will hold the signals that ask for an end; a second Ctrl-C or SIGTERM ends the process at once.

    SIGUSR1 is what SLURM sends before the time is up. A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """
    caught: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has not all of them
    handlers = {number: handler for number in numbers if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def handle(number: int, _frame: Any) -> None:
        caught.append(number)
        if number in (signal.SIGINT, signal.SIGTERM):  # others may be followed by one, as SIGUSR1 is, and come twice
            for each in handlers.keys() & {signal.SIGINT, signal.SIGTERM}:
                signal.signal(each, signal.SIG_DFL)

    for each in handlers:
        signal.signal(each, handle)
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def tune_allocator() -> None:
    """Tells glibc's malloc to keep freed memory, and does nothing where there is no glibc.

    Each step frees and takes the same gigabytes. Given back to the kernel, every page of them would have to be mapped
    and cleared anew: a fifth of the step's time.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-4, 0)   # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def join_processes(device: torch.device) -> tuple[torch.device, Processes]:
    """This process's device and its place among the processes that torchrun has started, if it has.

    Each has a cuda device of its own, or the CPU. The functions of Processes raise a ConnectionError when another
    process has ended.
    """
    rank, local_rank, size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    launcher = os.getppid() if "TORCHELASTIC_RESTART_COUNT" in os.environ else 0
    if size == 1:
        return device, Processes(launcher=launcher)
    device = sample.pick_device(f"cuda:{local_rank}" if device.type == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meet(rank, size, "nccl" if device.type == "cuda" else "gloo")

    def gather(value: Any) -> list[Any]:
        everyone = [None] * size
        with together():
            dist.all_gather_object(everyone, value)
        return everyone

    def average(gradients: list[Tensor]) -> list[Tensor]:
        with together():  # all at once and each where it lies: to join them first would cost more than it saves
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()
        return [gradient.div_(size) for gradient in gradients]

    return device, Processes(rank, size, gather, average, launcher)


def meet(rank: int, size: int, backend: str) -> None:
    """Connects the processes; ConnectionError if that fails."""
    patience = timedelta(days=1)  # the others may wait for a download
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))  # type: ignore[attr-defined]
        # After a restart the addresses of the processes before are still in the store: each attempt has its own part.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    except RuntimeError as error:
        raise ConnectionError(f"the processes can't meet: {error}") from None


@contextmanager
def together() -> Iterator[None]:
    """What fails here fails because another process has ended: ConnectionError."""
    try:
        yield
    except RuntimeError:
        raise ConnectionError("another process has ended: --resume goes on from the last save") from None


@dataclass(frozen=True)
class Files(sample.Options):
    """The options that say what a run starts from, where it is saved, and on which device it is done."""
    checkpoint: str = option("model.pth", TEXT, "where the run is saved")
    resume: bool = option(False, sample.YES, "go on from --checkpoint, with its settings unless others are given")
    overwrite: bool = option(False, sample.YES, "replace --checkpoint if it is there")
    weights: str | None = option(None, TEXT, "start a new run from this model: a file, a folder, or `openai`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.weights:
            raise ValueError("--resume goes on from --checkpoint and --weights starts a new run: give one of them")


@dataclass(frozen=True)
class ModelOptions(sample.Checked):
    """The options that shape a fresh model; only drop_rate can be changed in one that is loaded."""
    emb_dim: int = option(GPT_CONFIG_124M.emb_dim, whole(1), "size of the embeddings")
    n_heads: int = option(GPT_CONFIG_124M.n_heads, whole(1), "attention heads; with --emb-dim alone emb_dim / 64")
    n_layers: int = option(GPT_CONFIG_124M.n_layers, whole(1), "transformer blocks")
    drop_rate: float = option(GPT_CONFIG_124M.drop_rate, number(0, 1), "probability of dropout")
    qkv_bias: bool = option(GPT_CONFIG_124M.qkv_bias, sample.YES, "query, key and value have a bias")


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    return sample.new_parser("Train a GPT-2 model on a text, as the chapter does.", """examples:
  python train.py --data book.txt --epochs 3 --checkpoint book.pth --plot book.png
  python train.py --resume --epochs 11""",
                             {"the run": Settings, "files and device": Files, "the model": ModelOptions})


def choose(typed: dict[str, Any], loaded: Checkpoint | None, origin: str | None) -> tuple[Settings, Config]:
    """Settings and configuration: what was typed lies over what was loaded, and that over the chapter's defaults.

    ValueError for what makes no sense, or contradicts the model or the run that was loaded.
    """
    names = {each.name for each in fields(ModelOptions)}
    typed_settings = {name: value for name, value in typed.items() if name not in names}
    typed_model = {name: value for name, value in typed.items() if name in names}
    model = asdict(loaded.config if loaded else GPT_CONFIG_124M)
    saved = loaded.settings if loaded else {}
    fixed = {name: model[name] for name in ("emb_dim", "n_layers", "qkv_bias") if loaded}  # n_heads: see load_model
    fixed |= {name: saved[name] for name in ("batch_size", "context_length", "seed", "train_ratio") if name in saved}
    for name, value in fixed.items():
        if name in typed and typed[name] != value:
            raise ValueError(f"{sample.flag(name)} {typed[name]} contradicts {origin}: {value} there")
    Settings(**typed_settings)  # first alone: a mistake that was typed is not one of the file
    ModelOptions(**typed_model)
    window = min(model["context_length"], GPT_CONFIG_124M.context_length)
    try:
        settings = from_fields(Settings, {"context_length": window, **saved, **typed_settings})
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    if loaded is None:
        if "emb_dim" in typed:
            model["n_heads"] = usual_heads(typed["emb_dim"])
        model |= typed_model
        return settings, Config(**model | {"context_length": settings.context_length})
    if settings.context_length > model["context_length"]:
        raise ValueError(f"--context-length {settings.context_length} is more than {origin} can see: "
                         f"{model['context_length']}")
    return settings, replace(loaded.config, drop_rate=typed.get("drop_rate", model["drop_rate"]))


def check_outputs(files: Files, settings: Settings, replaceable: Sequence[str | None]) -> None:
    """Raises a ValueError if a file can't be written, or would be written over one that is not replaceable."""
    texts = {Path(path).resolve() for path in settings.data}
    outputs = [Path(path) for path in (files.checkpoint, settings.best, settings.plot) if path]
    if len(texts | {path.resolve() for path in outputs}) < len(texts) + len(outputs):  # two are the same file
        raise ValueError("--checkpoint, --best and --plot must be different files, and none of --data")
    for path in outputs:
        is_plot = path == Path(settings.plot)
        if not path.parent.is_dir():
            raise ValueError(f"{path} can't be written: there is no folder {path.parent}")
        if not path.exists():
            continue
        if not path.is_file() or not (is_plot or zipfile.is_zipfile(path)):
            kind = "picture" if is_plot else "checkpoint"
            raise ValueError(f"{path} is there and is no {kind}: it will not be overwritten")
        if not is_plot and str(path) not in replaceable and not files.overwrite:
            raise ValueError(f"{path} is there: --resume goes on with it, --overwrite replaces it, or use another name")


def check_room(path: str, params: Params) -> None:
    """Raises a ValueError if the disk of this checkpoint has no room for two: a new one is written beside the old."""
    size = 3 * sum(tensor.nbytes for tensor in distinct(params))  # each parameter with its two running means
    needed, free = size if os.path.exists(path) else 2 * size, shutil.disk_usage(Path(path).resolve().parent).free
    if free < needed:
        raise ValueError(f"{path} needs {needed / 1e6:,.0f} MB of its disk, where {free / 1e6:,.0f} MB are free")


def prepare(files: Files, typed: dict[str, Any], device: torch.device, processes: Processes) -> tuple[Run, State]:
    """The run that was asked for, and the state in which it begins."""
    loaded, origin = None, files.checkpoint if files.resume else files.weights
    for rank in range(processes.size):  # one after the other: the first one downloads, the others find it
        if origin and rank == processes.rank:
            loaded = load_model(origin, typed.get("n_heads"), files.size, files.models_dir, files.base_url,
                                with_run=files.resume)
        processes.gather(None)
    settings, config = choose(typed, loaded, origin)
    if settings.batch_size % processes.size:
        raise ValueError(f"--batch-size {settings.batch_size} can't be split evenly over {processes.size} processes")
    if processes.rank == 0 and settings.epochs:
        replaceable = (files.checkpoint, loaded.settings.get("best")) if files.resume and loaded else ()
        check_outputs(files, settings, replaceable)
    try:
        text = read_text(settings.data)
    except FileNotFoundError as error:
        if "data" in typed or not files.resume:
            raise
        raise ValueError(f"{error.filename}, which {origin} was trained on, is not here: use --data") from None
    run = make_run(text, config, settings, processes)
    try:
        state = start_state(run, loaded, device)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    if len(set(processes.gather((config, state.opt_state.step, run.text_hash)))) > 1:
        raise ValueError("the processes do not have the same checkpoint and data")
    if processes.rank == 0:
        if settings.epochs:
            check_room(files.checkpoint, state.params)
        say(*(loaded.notes if loaded else ()))
    return run, state


def start_lines(run: Run, state: State) -> list[str]:
    """What a run says of itself at its start."""
    device, count = state.params["tok_emb.weight"].device, sum(tensor.numel() for tensor in distinct(state.params))
    lines = [f"{count:,} parameters, {len(run.train_windows)} + {len(run.val_windows)} windows of "
             f"{run.settings.context_length} tokens, {run.total_steps} steps, on {device}"]
    if device.type != "cpu":
        lines.append("the chapter's figures are a CPU's: those printed here will differ")
    if run.settings.epochs and is_finished(run, state):
        lines.append(f"all {run.settings.epochs} epochs are done: --epochs asks for more")
    units = torch.cpu.get_capabilities()
    if run.settings.dtype == "bfloat16" and device.type == "cpu" and units.get("architecture") == "x86_64" and not (
            units.get("avx512_bf16") or units.get("amx_bf16")):
        lines.append("this processor has no units for bfloat16 and has to imitate it: float32 trains faster here")
    return lines


def is_own(checkpoint: str, processes: Processes) -> bool:
    """Whether this run, before it was restarted, has written the checkpoint."""
    try:
        return load_checkpoint(checkpoint).run.get("launcher") == processes.launcher
    except (OSError, ValueError):
        return False


def what_is_kept(checkpoint: str) -> str:
    """A sentence about the file that a run has left."""
    try:
        opt_state = load_checkpoint(checkpoint).opt_state
        return f"{checkpoint} has the model after {opt_state.step if opt_state else 0} steps"
    except (OSError, ValueError):
        return "Nothing was saved"


def main() -> int:
    """The exit status of `python train.py`."""
    tune_allocator()
    typed = vars(build_parser().parse_args())
    for name in {"checkpoint", "best", "plot"} & typed.keys():
        typed[name] = str(Path(typed[name]))  # without a slash at its end
    if "best" in typed:  # a run that goes on in another folder must not take a file of the same name there for its own
        typed["best"] = os.path.abspath(typed["best"])
    files = Files(**{each.name: typed.pop(each.name) for each in fields(Files) if each.name in typed})
    device, processes = join_processes(sample.pick_device(files.device))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    if restarted and processes.gather(is_own(files.checkpoint, processes))[0]:
        files = replace(files, resume=True, weights=None)
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
    run, state = prepare(files, typed, device, processes)
    leader = processes.rank == 0
    if leader:
        say(*start_lines(run, state))
    if not run.settings.epochs:
        losses = evaluate_model(state.params, run, torch.Generator().manual_seed(run.settings.seed))
        if leader:
            print("Training loss {:.5f}, validation loss {:.5f}".format(*losses))
            perplexities = torch.tensor(losses, dtype=torch.float64).exp().tolist()
            print("Training perplexity {:.2f}, validation perplexity {:.2f}".format(*perplexities))
        return 0
    with caught_signals() as signals:
        try:
            train(run, state, files.checkpoint, signals)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}: perhaps the learning rate is too high. "
                                     f"{what_is_kept(files.checkpoint)}") from None
    return 128 + signals[0] if signals else 0


if __name__ == "__main__":
    sample.run_command(main)
