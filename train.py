"""Pretraining: windows of text, the loss over a set, the training step, the loop. `python train.py --help`

A text becomes tokens (`tokenize`), windows (`make_windows`), an order (`pass_order`), batches (`batch_of`), a loss and
new parameters (`train_step`), again and again (`train`). On a CPU, every random number of the first process comes from
one generator, or from another that it has seeded, in the chapter's order.

Axes: B batch, T tokens.
"""
import argparse
import ctypes
import hashlib
import os
import re
import shlex
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw
from tqdm import tqdm

import sample
from gpt import EMBEDDINGS, GPT_CONFIG_124M, Config, Params, calc_loss, cast, init_params
from sample import END_OF_TEXT, generate, number, text_to_token_ids, token_ids_to_text
from weights import Checkpoint, OptState, save_checkpoint, write_atomically

PIECE = 2**20  # characters that are tokenized at a time


class Settings(NamedTuple):
    """What decides the course of a run besides the model, as `--help` explains it. The defaults are the chapter's."""
    data: Sequence[str] = ("the-verdict.txt",)
    train_ratio: float = 0.9
    epochs: int = 10
    batch_size: int = 2
    lr: float = 4e-4
    weight_decay: float = 0.1
    eval_freq: int = 5
    eval_iter: int = 5
    seed: int = 123
    start_context: str = "Every effort moves you"
    save_every: int = 0
    dtype: str = "float32"
    context_length: int = 256  # tokens in a window; the model may be able to see more


DEFAULTS = asdict(GPT_CONFIG_124M) | Settings()._asdict()


class Windows(NamedTuple):
    """The text as a model sees it, (n, T + 1) tokens in the training and in the validation set."""
    train: np.ndarray
    val: np.ndarray


class Progress(NamedTuple):
    """How far a run is: with parameters, optimizer state, Config and Settings, all that the rest of it depends on."""
    data_hash: str               # of its windows
    generator_state: Tensor
    step: int = 0                # steps done
    order: Tensor | None = None  # of the windows in this epoch
    evaluations: tuple[tuple[int, float, float], ...] = ()  # tokens seen, training loss, validation loss


def tune_allocator() -> None:
    """Tells glibc's malloc to keep freed memory, and does nothing where there is no glibc.

    Each step frees and takes the same gigabytes. Given back to the kernel, every page of them would have to be mapped
    and cleared anew: a fifth of the step's time.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-4, 0)   # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def read_text(paths: Sequence[str | Path]) -> str:
    """The text of UTF-8 files, `<|endoftext|>` between them; ValueError for one that is empty or no text."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        if not texts[-1].strip() or "\0" in texts[-1]:
            raise ValueError(f"{path} is {'empty' if not texts[-1].strip() else 'not text: it has zero bytes'}")
    return END_OF_TEXT.join(texts)


def tokenize(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """The token ids of a text, as 16-bit integers (section 5.1.3)."""
    cut = re.compile(r"(?<=\S)[ \n]")  # no token reaches from before a blank into it, so these pieces are exact
    starts = [0]
    while len(text) - starts[-1] > PIECE and (found := cut.search(text, starts[-1] + PIECE)):
        starts.append(found.start())
    pieces = [text[start:end] for start, end in pairwise([*starts, len(text)])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tokens = pool.map(
            lambda piece: tokenizer.encode_to_numpy(piece, allowed_special={END_OF_TEXT}).astype(np.uint16), pieces)
        return np.concatenate(list(tqdm(tokens, "tokenizing", len(pieces), delay=1, leave=False)))


def make_windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Views of length + 1 tokens (n, length + 1), one every `length` tokens: inputs, and targets shifted by one."""
    if len(tokens) <= length:
        return np.empty((0, length + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


def read_windows(settings: Settings, tokenizer: tiktoken.Encoding) -> Windows:
    """The windows of the training and the validation part of the text; ValueError if they are too few (5.1.3)."""
    text, length = read_text(settings.data), settings.context_length
    split = int(settings.train_ratio * len(text))
    train, val = (make_windows(tokenize(part, tokenizer), length) for part in (text[:split], text[split:]))
    for part, windows, needed in (("training", train, settings.batch_size), ("validation", val, 1)):
        if len(windows) < needed:
            raise ValueError(f"the text is too short: its {part} part has {len(windows)} windows of {length} tokens, "
                             f"{needed} or more are needed")
    return Windows(train, val)


def pass_order(n: int, generator: torch.Generator, shuffle: bool) -> Tensor:
    """The order of one pass over n windows (n,), with the draws of the chapter's DataLoader (section 5.1.3)."""
    # DataLoader draws a seed for its worker processes, even where it has none, and then one for the order, if any.
    seeds = torch.empty(2 if shuffle else 1, dtype=torch.int64).random_(generator=generator)
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(seeds[1]))) if shuffle else torch.arange(n)


def batch_of(windows: np.ndarray, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of the windows in these rows."""
    tokens = torch.from_numpy(windows[rows.numpy()].astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def batches(windows: np.ndarray, batch_size: int, generator: torch.Generator, shuffle: bool,
            device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the windows: inputs and targets (B, T). A shuffled pass drops the last, partial batch (5.1.3)."""
    for rows in torch.split(pass_order(len(windows), generator, shuffle), batch_size):
        if len(rows) == batch_size or not shuffle:
            yield batch_of(windows, rows, device)


@torch.no_grad()
def calc_loss_loader(params: Params, loader: Iterator[tuple[Tensor, Tensor]], config: Config,
                     num_batches: int | None = None) -> float:
    """The mean loss of the first num_batches batches, of all by default; nan if there is none (section 5.1.3)."""
    losses = [calc_loss(params, *batch, config).item() for batch in islice(loader, num_batches)]
    return sum(losses) / len(losses) if losses else float("nan")


def evaluate_model(params: Params, train_windows: np.ndarray, val_windows: np.ndarray, batch_size: int, config: Config,
                   generator: torch.Generator, eval_iter: int | None = None) -> tuple[float, float]:
    """The mean training and validation loss over eval_iter batches of each, or all, without dropout (section 5.2).

    The generator gives the order of the training batches.
    """
    device = params["tok_emb.weight"].device
    train, val = (batches(train_windows, batch_size, generator, True, device),
                  batches(val_windows, batch_size, generator, False, device))
    return calc_loss_loader(params, train, config, eval_iter), calc_loss_loader(params, val, config, eval_iter)


def init_optimizer(params: Params) -> OptState:
    """AdamW's state before the first step: its step count and two moments for each parameter, all 0 (section 5.2)."""
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in params.items()} for _ in range(2))
    return {"step": torch.zeros((), device=params["tok_emb.weight"].device), "exp_avg": first, "exp_avg_sq": second}


def train_step(params: Params, opt_state: OptState, inputs: Tensor, targets: Tensor, config: Config,
               generator: torch.Generator | None = None, *, lr: float = 4e-4, weight_decay: float = 0.1,
               dtype: torch.dtype = torch.float32,
               average: Callable[[list[Tensor]], list[Tensor]] | None = None) -> tuple[Params, OptState, Tensor]:
    """Parameters and optimizer state after one step of AdamW, and what the loss of this batch was (section 5.2).

    inputs and targets are (B, T). The new values are written into the old tensors: use only what is returned.
    The model computes in `dtype`, the parameters keep theirs. `average`, if given, gets the gradients, one for each
    tensor among the parameters, and returns those to use: with several processes, their mean.
    """
    names = {id(tensor): name for name, tensor in params.items()}  # tied parameters are one tensor: it goes by the last
    leaves = {key: params[name].detach().requires_grad_() for key, name in names.items()}  # what autograd follows
    # A cast of the embeddings would copy all of a table of which a few rows are looked up.
    computed = {name: leaves[id(tensor)] if name in EMBEDDINGS else leaves[id(tensor)].to(dtype)
                for name, tensor in params.items()}
    loss = calc_loss(computed, inputs, targets, config, generator)
    gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss, list(leaves.values()))]
    if average is not None:
        gradients = average(gradients)
    first, second = ([opt_state[key][name] for name in names.values()] for key in ("exp_avg", "exp_avg_sq"))
    with torch.no_grad():  # adamw counts the steps up in place, one count for each tensor
        adamw(list(leaves.values()), gradients, first, second, max_exp_avg_sqs=[], amsgrad=False, maximize=False,
              state_steps=[opt_state["step"].clone() for _ in leaves], beta1=0.9, beta2=0.999, eps=1e-8, lr=lr,
              weight_decay=weight_decay, fused=True)
    return params, opt_state | {"step": opt_state["step"] + 1}, loss.detach()


def reduce(tensors: list[Tensor], operation: Any) -> list[Tensor]:
    """The tensors' sum or maximum over all processes, in their own buffers; ConnectionError if another has ended."""
    if not dist.is_initialized():
        return tensors
    try:  # all at once and each where it lies: to join them first would cost more than it saves
        for work in [dist.all_reduce(tensor, operation, async_op=True) for tensor in tensors]:
            work.wait()
    except RuntimeError:
        raise ConnectionError("another process has ended: --resume goes on from the last save") from None
    return tensors


def dropout_generator(generator: torch.Generator, step: int, device: torch.device, rank: int) -> torch.Generator:
    """What a step's dropout draws from: on a CPU, in process 0, the run's own; anywhere else a new one each step."""
    if device.type == "cpu" and rank == 0:
        return generator
    seed = np.random.SeedSequence((generator.initial_seed(), step, rank)).generate_state(1)
    return torch.Generator(device).manual_seed(int(seed[0]))


def plot_losses(evaluations: Sequence[tuple[int, float, float]], tokens_per_epoch: int, path: str | Path) -> None:
    """Draws the losses against epochs, with a second axis for the tokens seen, into a file (figure 5.12)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    tokens_seen, train_losses, val_losses = zip(*evaluations, strict=True)
    epochs_seen = [tokens / tokens_per_epoch for tokens in tokens_seen]
    figure = Figure(figsize=(5, 3), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs_seen, train_losses, label="Training loss")
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="Validation loss")
    axes.set(xlabel="Epochs", ylabel="Loss")
    axes.legend(loc="upper right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    to_tokens, to_epochs = (lambda epochs: epochs * tokens_per_epoch), (lambda tokens: tokens / tokens_per_epoch)
    axes.secondary_xaxis("top", functions=(to_tokens, to_epochs)).set_xlabel("Tokens seen")
    with write_atomically(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:])


def catch_signals() -> list[int]:
    """A list that will hold the first Ctrl-C or SIGTERM to come; a second one ends the process at once."""
    caught: list[int] = []

    def handle(signum: int, _frame: Any) -> None:
        caught.append(signum)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, handle)
    return caught


@contextmanager
def unread_is_a_signal(bar: tqdm, signals: list[int]) -> Iterator[None]:
    """Around what prints: adds SIGPIPE to the signals if none can read it any more, so that the run saves and stops."""
    try:
        yield
        sys.stdout.flush()
    except OSError:
        bar.disable = True  # or it would fail once more when it is closed
        signals.append(signal.SIGPIPE)


def train(params: Params, opt_state: OptState, config: Config, progress: Progress, windows: Windows,
          tokenizer: tiktoken.Encoding, generator: torch.Generator, settings: Settings, rank: int, world_size: int,
          signals: list[int], save: Callable[[Params, OptState, Progress], None]) -> Progress:
    """How far training came, to the end or until there is a signal in the list; prints the chapter's log (section 5.2).

    The trained parameters go to `save`: at the end, when interrupted, and every `save_every` steps. This is process
    `rank` of `world_size`, each of which takes its part of every batch; process 0 alone saves, evaluates and prints.
    """
    device, dtype, leader = params["tok_emb.weight"].device, getattr(torch, settings.dtype), rank == 0

    def average(gradients: list[Tensor]) -> list[Tensor]:
        return [gradient.div_(world_size) for gradient in reduce(gradients, dist.ReduceOp.SUM)]

    def largest(value: Tensor) -> Tensor:
        return reduce([value.to(device)], dist.ReduceOp.MAX)[0].cpu() if world_size > 1 else value
    n, batch_size = len(windows.train), settings.batch_size
    steps_per_epoch, rows_each = n // batch_size, batch_size // world_size
    total, batch_tokens = settings.epochs * steps_per_epoch, batch_size * settings.context_length
    order = progress.order
    with tqdm(desc="training", total=total * batch_tokens, initial=progress.step * batch_tokens, unit=" tokens",
              unit_scale=True, disable=not leader) as bar:
        for step in range(progress.step, total):
            # As `batches` does, but a run may go on in the middle of an epoch, and each process takes its own rows.
            epoch, index = divmod(step, steps_per_epoch)
            if index == 0 or order is None:  # None: in the middle of an epoch, but in a file of another origin
                order = pass_order(n, generator, shuffle=True) if leader else torch.zeros(n, dtype=torch.int64)
                order = largest(order)  # the leader's, for all
            start = index * batch_size + rank * rows_each
            inputs, targets = batch_of(windows.train, order[start:start + rows_each], device)
            params, opt_state, _ = train_step(
                params, opt_state, inputs, targets, config, dropout_generator(generator, step, device, rank),
                lr=settings.lr, weight_decay=settings.weight_decay, dtype=dtype,
                average=average if world_size > 1 else None)
            with unread_is_a_signal(bar, signals):
                bar.update(batch_tokens)
            if leader and step % settings.eval_freq == 0:
                losses = evaluate_model(
                    cast(params, dtype), *windows, batch_size, config, generator, settings.eval_iter)
                evaluation = ((step + 1) * batch_tokens, *losses)
                progress = progress._replace(evaluations=(*progress.evaluations, evaluation))
                with unread_is_a_signal(bar, signals):  # tqdm.write: clear of the bar, which is on standard error
                    tqdm.write(f"Ep {epoch + 1} (Step {step:06d}): Train loss {losses[0]:.3f}, "
                               f"Val loss {losses[1]:.3f}", file=sys.stdout)
            if leader and index == steps_per_epoch - 1:
                prompt = text_to_token_ids(settings.start_context, tokenizer).to(device)
                text = token_ids_to_text(generate(cast(params, dtype), prompt, config, 50), tokenizer)
                with unread_is_a_signal(bar, signals):
                    tqdm.write(text.replace("\n", " "), file=sys.stdout)
            stop = largest(torch.tensor(len(signals))).item()  # if any process has got a signal
            progress = progress._replace(step=step + 1, order=order, generator_state=generator.get_state())
            saving = settings.save_every and (step + 1) % settings.save_every == 0
            if leader and (stop or saving or step + 1 == total):
                save(params, opt_state, progress)
            if stop:
                break
    return progress


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line; an option that is not given is None where `settle` finds its value."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS,
                                     description="Train a GPT-2 model on a text, as the chapter does.")

    def add(name: str, parse: Callable[[str], Any], meaning: str, **options: Any) -> None:
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse, help=f"{meaning} (default: {DEFAULTS[name]})",
                            **options)
    parser.add_argument("--data", nargs="+", help=f"UTF-8 text files (default: {' '.join(DEFAULTS['data'])})")
    add("train_ratio", number(float, 0, 1, above=True), "the part of the text to train on")
    add("epochs", number(int, 0), "in all, also with --resume; 0 prints the losses")
    add("batch_size", number(int, 1), "windows a step, over all processes")
    add("lr", number(float, 0, above=True), "AdamW's learning rate")
    add("weight_decay", number(float, 0), "AdamW's weight decay")
    add("eval_freq", number(int, 1), "steps between evaluations")
    add("eval_iter", number(int, 1), "batches of each set in an evaluation")
    add("start_context", str, "what the samples continue")
    add("save_every", number(int, 0), "steps between saves; 0: at the end and when interrupted")
    add("context_length", number(int, 1), "tokens in a window, and the most that a fresh model can see")
    add("vocab_size", int, "of the model, that of GPT-2's tokenizer", choices=[DEFAULTS["vocab_size"]])
    add("emb_dim", number(int, 1), "of the model")
    add("n_layers", number(int, 1), "of the model")
    add("drop_rate", number(float, 0, 1), "of the model")
    parser.add_argument("--qkv-bias", action=argparse.BooleanOptionalAction, help="of the model (default: without)")
    parser.add_argument("--checkpoint", default="model.pth", help="where the model is saved (default: %(default)s)")
    parser.add_argument("--plot", default="loss.png", help="the picture: .png, .pdf or .svg (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint, with its settings unless given")
    sample.add_shared_options(parser, None, "`openai` to start from the published GPT-2 (default: fresh ones)")
    parser.set_defaults(seed=None, dtype=None)  # or a resumed run would not have those it was started with
    return parser


def settle(given: dict[str, Any], loaded: Checkpoint | None, source: str) -> tuple[Settings, Config]:
    """What decides a run: each option as given, or else as in what was loaded from source, or else as in the chapter.

    ValueError for an option that contradicts what was loaded: of a model, only drop_rate can be changed; windows may be
    shorter than its context; a run that goes on keeps its windows, its batches and its seed.
    """
    kept, fixed = DEFAULTS, list[str]()
    if loaded is not None:
        saved, room = loaded.run.get("settings", {}), loaded.config.context_length
        kept = DEFAULTS | asdict(loaded.config) | {"context_length": min(DEFAULTS["context_length"], room)} | saved
        fixed = ["emb_dim", "n_heads", "n_layers", "qkv_bias"]
        fixed += ["batch_size", "context_length", "seed", "train_ratio"] if saved else []
    for name in fixed:
        if given.get(name, kept[name]) != kept[name]:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} contradicts {source}: {kept[name]} there")
    chosen = kept | given
    settings = Settings(*(chosen[name] for name in Settings._fields))
    if not settings.start_context:
        raise ValueError("--start-context is empty: give the samples something to continue")
    if loaded is None:
        return settings, Config(**{name: chosen[name] for name in asdict(GPT_CONFIG_124M)})
    if settings.context_length > room:
        raise ValueError(f"--context-length {settings.context_length} contradicts {source}: {room} there")
    return settings, replace(loaded.config, drop_rate=chosen["drop_rate"])


def check_outputs(checkpoint: Path, plot: Path, settings: Settings, params: Params) -> None:
    """Raises now what would fail after hours of training: paths that can't be written, a full disk."""
    outputs = {checkpoint.resolve(), plot.resolve()}
    if len(outputs) < 2 or outputs & {Path(path).resolve() for path in settings.data}:
        raise ValueError("--checkpoint and --plot must be different files, and none of --data")
    if plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot {plot} must end in .png, .pdf or .svg")
    if checkpoint.is_file() and not zipfile.is_zipfile(checkpoint):
        raise ValueError(f"--checkpoint {checkpoint} is there and is no checkpoint: it will not be overwritten")
    for path in (checkpoint, plot):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is a directory or a device, not a file to write")
        with open(f"{path}.partial", "wb"):
            os.remove(f"{path}.partial")
    needed = 12 * sum(tensor.numel() for tensor in params.values())  # float32, with AdamW's moments
    needed *= 2 if settings.save_every else 1  # the second file is written beside the first
    free = shutil.disk_usage(checkpoint.resolve().parent).free
    if free < needed:
        raise ValueError(f"{checkpoint} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")


def join_processes(device: torch.device) -> tuple[torch.device, int, int, int]:
    """This process's device, its number, its number on its machine, and how many there are, as torchrun has set it.

    Without torchrun: the device as given, 0, 0 and 1. With it, each has a cuda device of its own, or the CPU.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if world_size > 1:
        device = sample.pick_device(f"cuda:{local_rank}" if device.type == "cuda" else "cpu")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, local_rank, world_size


def keep_old(checkpoint: str) -> None:
    """Keeps the file that a new run will replace: it can be found as `.old` from now on, too."""
    old = Path(f"{checkpoint}.old")
    old.unlink(missing_ok=True)
    try:
        os.link(checkpoint, old)
    except OSError:  # this file system has no second names
        shutil.copyfile(checkpoint, old)
    print(f"{checkpoint} is there: it is kept as {old}", file=sys.stderr)


def main() -> int:
    """The exit status of `python train.py`."""
    tune_allocator()
    args = build_parser().parse_args()
    if args.weights not in (None, "openai"):
        raise ValueError("--weights can only be openai; to go on from a file, use --resume --checkpoint FILE")
    if args.resume and args.weights:
        raise ValueError("--resume goes on from --checkpoint, --weights openai starts anew: give one of them")
    device, rank, local_rank, world_size = join_processes(sample.pick_device(args.device))
    source, loaded = args.checkpoint if args.resume else args.weights, None
    my_turn = 0 if rank == 0 else 1 if local_rank == 0 else 2  # the first on each machine downloads, the others find it
    for turn in range(3):
        if source and turn == my_turn:
            loaded = sample.load_model(source, args)
        reduce([torch.zeros(1, device=device)], dist.ReduceOp.SUM)  # a barrier: all wait for those whose turn it is
    settings, config = settle({name: value for name, value in vars(args).items() if value is not None}, loaded, source)
    if settings.batch_size % world_size:
        raise ValueError(f"--batch-size {settings.batch_size} can't be split evenly over {world_size} processes")

    tokenizer = sample.gpt2_tokenizer()
    windows = read_windows(settings, tokenizer)
    data_hash = hashlib.sha256(b"".join(part.tobytes() for part in windows)).hexdigest()
    generator = torch.Generator().manual_seed(settings.seed)
    params, _, opt_state, run = loaded or (init_params(config, generator), config, None, {})
    fresh = Progress(data_hash, generator.get_state(), step=int(opt_state["step"]) if opt_state else 0)
    progress = fresh._replace(**run.get("progress", {}))
    generator.set_state(progress.generator_state)
    if progress.data_hash != data_hash:
        raise ValueError(f"{source} was made with other data than {' '.join(settings.data)}")
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
        print(f"on {device}: the chapter's figures are a CPU's, those printed here will differ", file=sys.stderr)

    if not settings.epochs:
        params = cast(params, getattr(torch, settings.dtype), device)
        losses = evaluate_model(params, *windows, settings.batch_size, config, generator)
        if rank == 0:
            print("Training loss {:.5f}, validation loss {:.5f}".format(*losses))
        return 0
    steps_per_epoch = len(windows.train) // settings.batch_size
    total = settings.epochs * steps_per_epoch
    if rank == 0:
        if progress.step >= total:
            print(f"{source} has done its {settings.epochs} epochs: give more with --epochs", file=sys.stderr)
        check_outputs(Path(args.checkpoint), Path(args.plot), settings, params)
        if "progress" not in run and os.path.exists(args.checkpoint):  # it is not the beginning of this run
            keep_old(args.checkpoint)

    def save(params: Params, opt_state: OptState, progress: Progress) -> None:
        save_checkpoint(args.checkpoint, params, config, opt_state, settings.lr, settings.weight_decay,
                        progress=progress._asdict(), settings=settings._asdict())
    params = cast(params, torch.float32, device)
    opt_state = opt_state or init_optimizer(params)
    moments = {key: cast(opt_state[key], torch.float32, device) for key in ("exp_avg", "exp_avg_sq")}
    signals = catch_signals()
    progress = train(params, {"step": opt_state["step"].to(device), **moments}, config, progress, windows, tokenizer,
                     generator, settings, rank, world_size, signals, save)
    if rank == 0 and progress.evaluations:
        tokens_per_epoch = steps_per_epoch * settings.batch_size * settings.context_length
        plot_losses(progress.evaluations, tokens_per_epoch, args.plot)
    if rank == 0 and progress.step < total:
        options = shlex.join(["--checkpoint", args.checkpoint] + ["--plot", args.plot] * (args.plot != "loss.png"))
        print(f"stopped after step {progress.step - 1}: `python train.py --resume {options}` goes on", file=sys.stderr)
    return 128 + signals[0] if signals else 0


if __name__ == "__main__":
    sample.run_command(main)
