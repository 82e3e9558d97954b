"""Pretraining: windows of text, the loss over a set, the training step, the run. `python train.py --help`

A run is a sequence of states. What stays the same is a `Run`, what changes is a `State`, and `next_state` makes the
next from the last: it prints nothing and saves nothing. `train_simple` calls it again and again and prints the log;
`train`, which the command uses, also saves. There are no nested loops: epoch and batch follow from the number of steps.

The random numbers of a run come from one generator. Its state is part of the run's state, so that a saved run goes on
as if nothing had happened. On a CPU they are drawn in the chapter's order:

    once         the parameters, in the order of `param_shapes`
    an epoch     two seeds; the second one gives the order of the windows
    a step       dropout: of the embeddings; in each block of the attention weights, its output, the feed-forward output
    evaluation   two seeds for the training windows, one for the validation windows

With several processes, or on another device, dropout has generators of its own. Axes: B batch, T tokens.
"""
import ctypes
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # for speed on a busy machine: see sample.py

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]
from torch.optim.adamw import adamw
from tqdm import tqdm

from gpt import (GPT_CONFIG_124M, Checked, Config, Params, calc_loss, compute_in, distinct, init_params, map_params,
                 option, param_shapes)
from sample import (END_OF_TEXT, Options, generate, gpt2_tokenizer, pick_device, read_utf8, run_command,
                    text_to_token_ids, token_ids_to_text, typed_options)
from weights import (BETAS, EPS, LEARNING_RATE, WEIGHT_DECAY, Checkpoint, OptState, SavedRun, load_model,
                     save_checkpoint, write_atomically)

STORY = Path(__file__).resolve().with_name("the-verdict.txt")  # also when this file is called by a link


@dataclass(frozen=True)
class Settings(Checked):
    """The settings of a run, besides the model's: default, what it is, and what it must be. All are options too."""
    data: tuple[str, ...] = option((), "UTF-8 text files, if not the-verdict.txt")
    train_ratio: float = option(0.9, "the part of the text to train on", above=0, below=1)
    context_length: int = option(256, "tokens in a window, and the most that a fresh model can see", at_least=1)
    epochs: int = option(10, "in all, also with --resume; 0 prints the losses of the model and ends", at_least=0)
    batch_size: int = option(2, "windows in a step, over all processes", at_least=1)
    lr: float = option(LEARNING_RATE, "AdamW's learning rate", above=0, below=math.inf)
    weight_decay: float = option(WEIGHT_DECAY, "AdamW's weight decay", at_least=0, below=math.inf)
    warmup_steps: int = option(0, "steps in which the learning rate grows up to --lr", at_least=0)
    initial_lr: float = option(3e-5, "the learning rate at the first of these steps", at_least=0, below=math.inf)
    min_lr: float | None = option(None, "what the rate falls to in the end, along a cosine", at_least=0, below=math.inf)
    max_norm: float | None = option(None, "the length to which the gradient is clipped, after the warm-up", above=0)
    seed: int = option(123, "of every random draw", at_least=0, below=2**63)
    eval_freq: int = option(5, "steps between evaluations", at_least=1)
    eval_iter: int = option(5, "batches of each set in an evaluation", at_least=1)
    start_context: str = option("Every effort moves you", "what the samples continue")
    dtype: str = option("float32", "of the computation; bfloat16 needs units for it", one_of=("float32", "bfloat16"))
    save_every: int = option(0, "steps between saves, besides those at the start and the end; 0: none", at_least=0)
    keep_best: bool = option(False, "keep the model with the lowest validation loss too")


class Processes(NamedTuple):
    """This process among those that torchrun has started, each with its part of every batch; by default the only one.

    `average` gives the averages over all, in place. Of one process they are what they are: `list`.
    """
    rank: int = 0
    size: int = 1
    average: Callable[[list[Tensor]], list[Tensor]] = list


class Run(NamedTuple):
    """What stays the same through a run. Windows are (n, T + 1) tokens: T inputs, and T targets one token later."""
    config: Config
    settings: Settings
    train_windows: np.ndarray
    val_windows: np.ndarray
    steps_per_epoch: int
    total_steps: int
    fingerprint: str  # of what may not change when a saved run goes on
    tokenizer: tiktoken.Encoding
    processes: Processes = Processes()


class State(NamedTuple):
    """What changes through a run. With it and its `Run` a run can go on; a SavedRun ends with the same three fields."""
    params: Params
    opt_state: OptState
    generator_state: Tensor
    order_seed: int | None = None  # gives the order of the windows in this epoch
    evaluations: tuple[tuple[int, float, float], ...] = ()  # number of steps done, training loss, validation loss


# The text (section 5.1.3)
def read_text(paths: Sequence[str | Path]) -> str:
    """The text of UTF-8 files, `<|endoftext|>` between them, of none the story; ValueError for one that is no text."""
    return END_OF_TEXT.join(read_utf8(Path(path).read_bytes(), path) for path in paths or [STORY])


def tokenize(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """The token ids of a text (n,), as 16-bit integers: the ids of `text_to_token_ids` in a quarter of the memory."""
    return tokenizer.encode_to_numpy(text, allowed_special={END_OF_TEXT}).astype(np.uint16)


def make_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Windows of length + 1 tokens (n, length + 1), one every `length` tokens: inputs, and targets shifted by one."""
    starts = np.arange(0, len(tokens) - length, length)
    return tokens[starts[:, None] + np.arange(length + 1)]  # type: ignore[no-any-return]


def make_run(text: str, config: Config, settings: Settings, processes: Processes = Processes()) -> Run:
    """A run over this text, of the files that settings.data names; ValueError if it is too short (section 5.1.3)."""
    tokenizer, length, n = gpt2_tokenizer(), settings.context_length, int(settings.train_ratio * len(text))
    if config.vocab_size != tokenizer.n_vocab or settings.batch_size % processes.size:
        raise ValueError(f"batch_size {settings.batch_size} must be a multiple of {processes.size} processes, and "
                         f"vocab_size {config.vocab_size} GPT-2's, {tokenizer.n_vocab}")
    train_windows, val_windows = (make_windows(tokenize(part, tokenizer), length) for part in (text[:n], text[n:]))
    if len(train_windows) < settings.batch_size or len(val_windows) < 1:
        raise ValueError(f"the text is too short: {len(train_windows)} windows of {length} tokens to train on, and "
                         f"{len(val_windows)} for validation, where {settings.batch_size} and 1 are needed")
    steps = len(train_windows) // settings.batch_size
    fixed = f"{settings.train_ratio} {length} {settings.batch_size} {settings.seed} "
    return Run(config, settings, train_windows, val_windows, steps, settings.epochs * steps,
               hashlib.sha256((fixed + text).encode()).hexdigest(), tokenizer, processes)


def draw_seeds(count: int, generator: Generator) -> Tensor:
    """What DataLoader draws for a pass: a seed for its workers, even without any, and a second one if it shuffles."""
    return torch.empty(count, dtype=torch.int64).random_(generator=generator)


def shuffled(n: int, batch_size: int, seed: int) -> Tensor:
    """The indices of n windows in each full batch of a shuffled pass (n // batch_size, B), as DataLoader has them."""
    order = torch.randperm(n, generator=Generator().manual_seed(seed))
    return order[:n // batch_size * batch_size].view(-1, batch_size)


def get_batch(windows: np.ndarray, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of the windows (n, T + 1) with these indices (B,) (section 5.1.3)."""
    tokens = torch.from_numpy(windows[indices.numpy()].astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


# The loss over a set
def mean_loss(params: Params, config: Config, windows: np.ndarray, batches: Sequence[Tensor] | Tensor) -> float:
    """The mean loss, without dropout, over batches, each given by the indices of its windows (section 5.1.3)."""
    device = params["tok_emb.weight"].device
    losses = [calc_loss(params, *get_batch(windows, indices, device), config).item() for indices in batches]
    return sum(losses) / len(losses)


def evaluate_model(params: Params, run: Run, generator: Generator, eval_iter: int | None = None) -> tuple[float, float]:
    """The mean training and validation loss without dropout, over eval_iter batches of each, or all (section 5.2)."""
    n, batch_size = len(run.train_windows), run.settings.batch_size
    params = compute_in(params, getattr(torch, run.settings.dtype))
    train_batches = shuffled(n, batch_size, int(draw_seeds(2, generator)[1]))
    draw_seeds(1, generator)
    val_batches = torch.split(torch.arange(len(run.val_windows)), batch_size)
    return (mean_loss(params, run.config, run.train_windows, train_batches[:eval_iter]),
            mean_loss(params, run.config, run.val_windows, val_batches[:eval_iter]))


# The training step
def init_optimizer(params: Params) -> OptState:
    """AdamW's state before the first step: both running means of each gradient are 0 (section 5.2)."""
    return OptState(0, map_params(torch.zeros_like, params), map_params(torch.zeros_like, params))


def train_step(params: Params, opt_state: OptState, inputs: Tensor, targets: Tensor, config: Config,
               generator: Generator | None = None, *, lr: float = LEARNING_RATE,
               weight_decay: float = WEIGHT_DECAY, dtype: torch.dtype = torch.float32,
               change: Callable[[list[Tensor]], list[Tensor]] = list) -> tuple[Params, OptState, Tensor]:
    """Parameters and optimizer state after one step of AdamW, and what the loss of this batch was (section 5.2).

    inputs and targets are (B, T). Without a generator there is no dropout. The model computes in `dtype`. `change` may
    change the gradients, one for each distinct tensor, before AdamW gets them. To save memory, new values are written
    into the tensors that were passed: use only what is returned. FloatingPointError if the loss is infinite or nan;
    then nothing was written.
    """
    # AdamW's fused kernel takes it for granted that a parameter, its moments and its gradient lie in memory alike.
    params, exp_avg, exp_avg_sq = (map_params(torch.Tensor.contiguous, each) for each in (params, *opt_state[1:]))
    leaves = map_params(lambda tensor: tensor.detach().requires_grad_(), params)
    loss = calc_loss(compute_in(leaves, dtype), inputs, targets, config, generator)
    if not loss.isfinite():
        raise FloatingPointError(f"the loss after {opt_state.step} steps is {loss.item()}")
    gradients = change(list(torch.autograd.grad(loss, distinct(leaves))))
    with torch.no_grad():
        # The function behind torch.optim.AdamW, which wants the number of steps as a tensor for each parameter.
        steps = list(torch.full((len(gradients),), opt_state.step, dtype=torch.float32, device=loss.device))
        adamw(distinct(params), gradients, distinct(exp_avg), distinct(exp_avg_sq), max_exp_avg_sqs=[],
              state_steps=steps, fused=True, amsgrad=False, maximize=False,
              beta1=BETAS[0], beta2=BETAS[1], eps=EPS, lr=lr, weight_decay=weight_decay)
    return params, OptState(opt_state.step + 1, exp_avg, exp_avg_sq), loss.detach()


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
    scale = (max_norm / (torch.stack([gradient.norm() for gradient in gradients]).norm() + 1e-6)).clamp(max=1)
    return [gradient.mul_(scale) for gradient in gradients]


# The run
def start_state(run: Run, loaded: Checkpoint | None = None, device: torch.device | str = "cpu") -> State:
    """The first state of a run, or the one that was saved (section 5.4); ValueError if that is of another run.

    Without a run in the checkpoint, a new one starts from its parameters and, if it has one, its optimizer's state.
    """
    generator = Generator().manual_seed(run.settings.seed)
    loaded = loaded or Checkpoint(init_params(run.config, generator), run.config)

    def copied(params: Params) -> Params:  # because training writes into them
        return map_params(lambda tensor: tensor.to(device, torch.float32, copy=True), params)

    params, opt_state = copied(loaded.params), loaded.opt_state
    opt_state = OptState(opt_state.step, *map(copied, opt_state[1:])) if opt_state else init_optimizer(params)
    saved = loaded.run or SavedRun({}, run.fingerprint, generator.get_state(), None, ())
    if saved.fingerprint != run.fingerprint:
        raise ValueError("the run has another text (--data), --train-ratio, --context-length, --batch-size or --seed")
    return State(params, opt_state, *saved[2:])


def to_checkpoint(run: Run, state: State) -> Checkpoint:
    """What is saved of a state: of this, `start_state` makes the same state again (section 5.4)."""
    settings = json.loads(json.dumps(asdict(run.settings), default=str))  # plain values: a Path could not be loaded
    return Checkpoint(state.params, run.config, state.opt_state, SavedRun(settings, run.fingerprint, *state[2:]))


def next_state(run: Run, state: State) -> State:
    """The state after one more step of training and, where one is due, an evaluation (section 5.2).

    Parameters and moments are written into: go on with the state that is returned. FloatingPointError as `train_step`.
    """
    settings, step, device = run.settings, state.opt_state.step, state.params["tok_emb.weight"].device
    generator = Generator()
    generator.set_state(state.generator_state)
    index, order_seed = step % run.steps_per_epoch, state.order_seed
    if index == 0 or order_seed is None:  # None: it began with a file of the chapter's, in the middle of an epoch
        order_seed = int(draw_seeds(2, generator)[1])
    indices = shuffled(len(run.train_windows), settings.batch_size, order_seed)[index]
    own = indices.chunk(run.processes.size)[run.processes.rank]  # of one process: all
    average, max_norm = run.processes.average, settings.max_norm if step >= settings.warmup_steps else None
    params, opt_state, _ = train_step(
        state.params, state.opt_state, *get_batch(run.train_windows, own, device), run.config,
        dropout_generator(run, step, generator, device), lr=learning_rate(step, run.total_steps, settings),
        weight_decay=settings.weight_decay, dtype=getattr(torch, settings.dtype),
        change=average if max_norm is None else lambda gradients: clip_gradients(average(gradients), max_norm))
    evaluations, is_logged = state.evaluations, step % settings.eval_freq == 0
    if is_logged or step + 1 == run.total_steps:
        # At its end a run is evaluated where the chapter does not do so. What this draws must not change a longer run.
        draws = generator if is_logged else generator.clone_state()
        evaluations = (*evaluations, (step + 1, *evaluate_model(params, run, draws, settings.eval_iter)))
    return State(params, opt_state, generator.get_state(), order_seed, evaluations)


def dropout_generator(run: Run, step: int, generator: Generator, device: torch.device) -> Generator:
    """What a step's dropout draws from: on a CPU, without other processes, from the run's own generator.

    Else it is a new one for each step, so that the same step draws the same masks again.
    """
    if device.type == "cpu" and run.processes.size == 1:
        return generator
    [seed] = np.random.SeedSequence((run.settings.seed, step, run.processes.rank)).generate_state(1)
    return Generator(device).manual_seed(int(seed))


def log_lines(run: Run, state: State) -> list[str]:
    """The lines of the chapter's log that belong to a state: its losses, and a sample after an epoch (section 5.2)."""
    step, lines = state.opt_state.step - 1, []  # the chapter counts from 0
    epoch, index = divmod(step, run.steps_per_epoch)
    if step % run.settings.eval_freq == 0:
        _, train_loss, val_loss = state.evaluations[-1]
        lines.append(f"Ep {epoch + 1} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
    if index == run.steps_per_epoch - 1:
        params = compute_in(state.params, getattr(torch, run.settings.dtype))
        prompt = text_to_token_ids(run.settings.start_context, run.tokenizer).to(params["tok_emb.weight"].device)
        lines.append(token_ids_to_text(generate(params, prompt, run.config, 50), run.tokenizer).replace("\n", " "))
    return lines


def plot_losses(evaluations: Sequence[tuple[int, float, float]], run: Run, path: str | Path) -> None:
    """Draws the losses against epochs, with a second axis for the tokens seen, into a .png (figure 5.12)."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    steps, train_losses, val_losses = zip(*evaluations, strict=True)
    epochs = [step / run.steps_per_epoch for step in steps]
    per_epoch = run.steps_per_epoch * run.settings.batch_size * run.settings.context_length  # tokens
    with style.context("default"), write_atomically(path) as file:  # whatever a matplotlibrc says
        figure = Figure(figsize=(5, 3), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.plot(epochs, train_losses, label="Training loss")
        axes.plot(epochs, val_losses, linestyle="-.", label="Validation loss")
        axes.set(xlabel="Epochs", ylabel="Loss")
        axes.legend(loc="upper right")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        to_tokens, to_epochs = partial(np.multiply, per_epoch), partial(np.multiply, 1 / per_epoch)
        axes.secondary_xaxis("top", functions=(to_tokens, to_epochs)).set_xlabel("Tokens seen")
        figure.savefig(file, format="png")


def train_simple(run: Run, state: State) -> State:
    """The last state of a run, by the chapter's loop. Prints the chapter's log (section 5.2)."""
    while state.opt_state.step < run.total_steps:
        state = next_state(run, state)
        for line in log_lines(run, state):
            print(line)
    return state


# ---- The chapter ends here. What follows is around it: saving, signals, other processes and the options. ----

def train(run: Run, state: State, checkpoint: str | Path | None = None) -> State:
    """The last state of a run: at its end, or after the step in which a signal came (section 5.2).

    Prints the chapter's log. With a checkpoint, saves there at the start, every save_every steps and at the end, also
    at the end by an error, and draws the losses beside it. FloatingPointError if the loss is infinite or nan; a model
    that computes nan is not saved. Of several processes, the first alone prints and saves. A signal is sent again when
    all is saved: Ctrl-C is a KeyboardInterrupt then.
    """
    is_leader, every, device = run.processes.rank == 0, run.settings.save_every, state.params["tok_emb.weight"].device
    path = Path(checkpoint) if checkpoint and is_leader else None
    if path:
        save_state(run, state, path)  # if nothing can be written there, it is better to know now
    with caught_signals() as signals:
        try:
            with tqdm(total=run.total_steps, initial=state.opt_state.step, disable=None if is_leader else True) as bar:
                while state.opt_state.step < run.total_steps and not is_any(bool(signals), device, run.processes):
                    state = next_state(run, state)
                    bar.update()
                    for line in log_lines(run, state) if is_leader else ():
                        tqdm.write(line, file=sys.stdout)  # clear of the bar, which is on standard error
                    if path and every and state.opt_state.step % every == 0:
                        attempt(save_state, run, state, path)
                    if path and run.settings.keep_best and is_best(state):
                        attempt(save_state, run, state, path.with_stem(f"{path.stem}-best"))
        finally:
            if path:
                finish(run, state, path)
    return state


def attempt(action: Callable[..., None], *arguments: Any) -> None:
    """Does what a run can do without: if it fails, a warning says why."""
    try:
        action(*arguments)
    except (ImportError, OSError) as error:
        warnings.warn(f"this failed, and nothing else: {error}", stacklevel=2)


def is_best(state: State) -> bool:
    """Whether the lowest validation loss so far is this state's."""
    return min(state.evaluations, key=lambda each: each[2], default=(0,))[0] == state.opt_state.step


def save_state(run: Run, state: State, path: Path) -> None:
    """Saves the state. FloatingPointError if the model computes nan; then nothing is saved."""
    if not math.isfinite(mean_loss(state.params, run.config, run.val_windows, [torch.tensor([0])])):
        raise FloatingPointError("the model computes nan, and is not saved")
    save_checkpoint(path, to_checkpoint(run, state))


def finish(run: Run, state: State, path: Path) -> None:
    """Saves the state for the last time, draws its losses, and says how to go on."""
    save_state(run, state, path)
    if state.evaluations and path.suffix != ".png":
        attempt(plot_losses, state.evaluations, run, path.with_suffix(".png"))
    command = shlex.join(["python", __file__, "--resume", "--checkpoint", str(path)])
    print(f"saved {path} after step {state.opt_state.step} of {run.total_steps}: `{command}` goes on", file=sys.stderr)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that will hold the signals that ask for an end. The first is sent again when the work is done.

    A second Ctrl-C ends the process at once. What is ignored, as SIGHUP under nohup, stays ignored.
    """
    caught: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT:  # others come twice where a whole group of processes is told to end
            signal.signal(number, signal.SIG_DFL)

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if threading.current_thread() is threading.main_thread() else ()
    numbers = [number for number in signal.Signals if number.name in names]  # Windows has not all of them
    before = {number: signal.signal(number, handle) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


def is_any(flag: bool, device: torch.device, processes: Processes) -> bool:
    """Whether the flag is set in any of the processes. Each waits here for the others."""
    return bool(processes.average([torch.tensor([float(flag)], dtype=torch.float32, device=device)])[0] > 0)


def tune_allocator() -> None:
    """Makes malloc keep freed memory, where it is glibc's.

    Each step frees and takes the same gigabytes. To map and clear every page anew costs a fifth of the step's time.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-4, 0)   # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def join_processes(device: torch.device) -> tuple[torch.device, Processes]:
    """This process's device, a cuda device of its own or the CPU, and its place among those started by torchrun."""
    rank, local_rank, size = (int(os.getenv(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if size < 2:
        return device, Processes()
    device = pick_device(f"cuda:{local_rank}" if device.type == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # After a restart the addresses of the processes before are still in the store: each attempt has its own part.
    store = PrefixStore(os.getenv("TORCHELASTIC_RESTART_COUNT", ""), next(rendezvous("env://"))[0])
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(days=1))

    def average(tensors: list[Tensor]) -> list[Tensor]:
        try:  # all at once and each where it lies: to join them first would cost more than it saves
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()
        except RuntimeError as error:
            raise ConnectionError(f"the processes have lost each other: {error}") from None
        return [tensor.div_(size) for tensor in tensors]

    return device, Processes(rank, size, average)


@dataclass(frozen=True)
class Files(Options):
    """The options that say what a run starts from, where it is saved, and on which device it is done."""
    checkpoint: str = option("model.pth", "where the run is saved; its picture lies beside it")
    resume: bool = option(False, "go on from --checkpoint, with its settings unless others are given")
    overwrite: bool = option(False, "replace --checkpoint if it is there")
    weights: str | None = option(None, "start a new run from this model: a file, a folder, or `openai`")


def choose(typed: dict[str, Any], shape: dict[str, Any], loaded: Checkpoint | None) -> tuple[Settings, Config]:
    """Settings and configuration: typed options win over saved ones, those over the defaults. ValueError if wrong."""
    E = shape.get("emb_dim", GPT_CONFIG_124M.emb_dim)
    model = loaded.config if loaded else replace(GPT_CONFIG_124M, emb_dim=E, n_heads=math.gcd(E, E // 64 or 1))
    window = {"context_length": min(model.context_length, GPT_CONFIG_124M.context_length)}
    try:
        settings = Settings(**window | (loaded.run.settings if loaded and loaded.run else {}) | typed)
    except (TypeError, ValueError) as error:  # TypeError: a setting that we don't have
        raise ValueError(f"the settings of the saved run: {error}") from None
    length = model.context_length if loaded else settings.context_length
    config = replace(model, **shape | {"context_length": length})
    if settings.context_length > length or (loaded and replace(config, drop_rate=model.drop_rate) != model):
        raise ValueError(f"of a loaded model only --drop-rate and a shorter --context-length can be chosen: {model}")
    return settings, config


def prepare(typed: dict[str, Any], shape: dict[str, Any], files: Files, device: torch.device,
            processes: Processes) -> tuple[Run, State]:
    """The run that was asked for, and its first state. ValueError if it can't be, or would replace another's files."""
    path = Path(files.checkpoint)
    restarts = max(int(os.getenv(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    is_resumed = files.resume or (restarts > 0 and path.exists())
    is_written = Settings(**typed).epochs > 0 and processes.rank == 0
    for output in (path, path.with_stem(f"{path.stem}-best")) if is_written and not is_resumed else ():
        if output.exists() and not (files.overwrite and output.is_file() and zipfile.is_zipfile(output)):
            raise ValueError(f"{output} is there: --resume goes on with it, --overwrite replaces a whole checkpoint")
    origin = str(path) if is_resumed else files.weights
    if processes.rank > 0:
        is_any(False, device, processes)  # waits until the first process has downloaded what the others find then
    loaded = load_model(origin, shape.get("n_heads"), files.size, files.models_dir, files.base_url) if origin else None
    if processes.rank == 0:
        is_any(False, device, processes)
    if loaded and not is_resumed:
        loaded = Checkpoint(loaded.params, loaded.config)  # with --weights a new run starts from the model alone
    settings, config = choose(typed, shape, loaded)
    needed = 2 * 3 * 4 * sum(map(math.prod, param_shapes(config).values()))  # bytes: a save keeps the old file
    if is_written and shutil.disk_usage(path.resolve().parent).free < needed:
        raise ValueError(f"{path} needs {needed / 1e6:,.0f} MB of free space on its disk")
    run = make_run(read_text(settings.data), config, settings, processes)
    return run, start_state(run, loaded, device)


def main() -> None:
    """Does what `python train.py` is asked for."""
    tune_allocator()
    typed, shape, others = typed_options("Train a GPT-2 on a text, as the chapter does.", Settings, Config, Files)
    files = Files(**others)
    if files.resume and files.weights:
        raise ValueError("--resume goes on from --checkpoint and --weights starts a new run: give one of them")
    device, processes = join_processes(pick_device(files.device))
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
    run, state = prepare(typed, shape, files, device, processes)
    if processes.rank == 0:
        print(f"{sum(map(torch.numel, distinct(state.params))):,} parameters, {len(run.train_windows)} + "
              f"{len(run.val_windows)} windows, {run.total_steps} steps, on {device}", file=sys.stderr)
    if run.settings.epochs:
        train(run, state, files.checkpoint)
    elif processes.rank == 0:
        losses = evaluate_model(state.params, run, Generator().manual_seed(run.settings.seed))
        print("Training loss {:.5f}, validation loss {:.5f}".format(*losses))
        print("Training perplexity {:.2f}, validation perplexity {:.2f}".format(*map(math.exp, losses)))


if __name__ == "__main__":
    run_command(main)
