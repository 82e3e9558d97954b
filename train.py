"""Pretraining: windows of text, the loss over a set, the training step, the loop. `python train.py --help`

A text becomes tokens (`tokenize`), windows (`make_windows`), batches (`batches`), a loss and new parameters
(`train_step`), again and again (`train`). On a CPU, every random number of the first process comes from one generator,
in the chapter's order.

Axes: B batch, T tokens.
"""
import argparse
import ctypes
import hashlib
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
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
from gpt import GPT_CONFIG_124M, Config, Params, calc_loss, init_params
from sample import END_OF_TEXT, cast, generate, number, text_to_token_ids, token_ids_to_text
from weights import Checkpoint, OptState, save_checkpoint, write_atomically

Windows = tuple[np.ndarray, np.ndarray]  # the training set's and the validation set's
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
    context_length: int = 256  # tokens in a window


class Progress(NamedTuple):
    """How far a run is: with parameters, optimizer state and configuration, all that the rest of it depends on."""
    data: str                        # the hash of its windows
    step: int = 0                    # steps done
    order: Tensor | None = None      # of the windows in this epoch
    generator: Tensor | None = None  # its state
    evaluations: tuple[tuple[int, float, float], ...] = ()  # tokens seen, training loss, validation loss


def tune_allocator() -> None:
    """Nothing: tells glibc's malloc to keep freed memory, and does nothing where there is no glibc.

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
    return train, val


def pass_order(n: int, generator: torch.Generator, shuffle: bool) -> Tensor:
    """The order of one pass over n windows (n,), with the draws of the chapter's DataLoader (section 5.1.3)."""
    def draw_seed() -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    draw_seed()  # DataLoader draws one for its worker processes first, even where it has none
    return torch.randperm(n, generator=torch.Generator().manual_seed(draw_seed())) if shuffle else torch.arange(n)


def batch_of(windows: np.ndarray, rows: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of the windows in these rows."""
    tokens = torch.from_numpy(windows[rows.numpy()].astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def batches(windows: np.ndarray, batch_size: int, generator: torch.Generator, shuffle: bool,
            device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
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
    """The mean training and validation loss over eval_iter batches of each, without dropout (section 5.2)."""
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
    """New parameters, new optimizer state and the batch's loss, after one step of AdamW (section 5.2).

    inputs and targets are (B, T). The new values are written into the old tensors: use only what is returned.
    The model computes in `dtype`, the parameters keep theirs. `average`, if given, gets the gradients, in the order of
    the parameters, and returns those to use: with several processes, their mean.
    """
    # Leaves are what autograd follows, one for each tensor; a tied tensor has several names, and its leaf gets one.
    names = {id(tensor): name for name, tensor in params.items()}
    leaves = {name: params[name].detach().requires_grad_() for name in names.values()}
    tracked = {name: leaves[names[id(tensor)]] for name, tensor in params.items()}  # by all names again
    # Embeddings need no cast: a lookup reads a few rows of a table, a cast would copy all of it.
    computed = {name: leaf if "_emb." in name else leaf.to(dtype) for name, leaf in tracked.items()}
    loss = calc_loss(computed, inputs, targets, config, generator)
    gradients = [gradient.contiguous() for gradient in torch.autograd.grad(loss, list(leaves.values()))]
    if average is not None:
        gradients = average(gradients)
    first, second = ([opt_state[key][name] for name in leaves] for key in ("exp_avg", "exp_avg_sq"))
    with torch.no_grad():  # adamw counts the steps up in place, one count for each tensor
        adamw(list(leaves.values()), gradients, first, second, [], [opt_state["step"].clone() for _ in leaves],
              fused=True, amsgrad=False, maximize=False, beta1=0.9, beta2=0.999, eps=1e-8, lr=lr,
              weight_decay=weight_decay)
    return params, opt_state | {"step": opt_state["step"] + 1}, loss.detach()


def reduce(tensors: list[Tensor], operation: Any) -> list[Tensor]:
    """The tensors' sum, mean or maximum over all processes, in their own buffers; ConnectionError if one has ended."""
    try:  # all at once and each where it lies: to join them first would cost more than it saves
        for work in [dist.all_reduce(tensor, operation, async_op=True) for tensor in tensors]:
            work.wait()
    except RuntimeError:
        raise ConnectionError("another process has ended: --resume goes on from the last save") from None
    return tensors


def average(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients' mean over all processes, in their own buffers."""
    return [gradient.div_(dist.get_world_size()) for gradient in reduce(gradients, dist.ReduceOp.SUM)]


def dropout_generator(generator: torch.Generator, step: int, device: torch.device, rank: int) -> torch.Generator:
    """What a step's dropout draws from: on a CPU, in process 0, the run's own; anywhere else a new one each step."""
    if device.type == "cpu" and rank == 0:
        return generator
    seed = np.random.SeedSequence((generator.initial_seed(), step, rank)).generate_state(1)
    return torch.Generator(device).manual_seed(int(seed[0]))


def plot_losses(evaluations: Sequence[tuple[int, float, float]], tokens_per_epoch: int, path: str | Path) -> None:
    """Nothing: draws the losses against epochs, with a second axis for the tokens seen, into a file (figure 5.12)."""
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
    scales = (partial(np.multiply, tokens_per_epoch), partial(np.multiply, 1 / tokens_per_epoch))
    axes.secondary_xaxis("top", functions=scales).set_xlabel("Tokens seen")
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


def train(params: Params, opt_state: OptState, config: Config, progress: Progress, windows: Windows,
          tokenizer: tiktoken.Encoding, generator: torch.Generator, settings: Settings, rank: int, world_size: int,
          save: Callable[[Params, OptState, Progress], None]) -> tuple[Progress, int]:
    """How far training came, and the signal that ended it early or 0; prints the chapter's log (section 5.2).

    The trained parameters go to `save`: at the end, when interrupted, and every `save_every` steps. This is process
    `rank` of `world_size`, each of which takes its part of every batch; process 0 alone saves, evaluates and prints.
    """
    device, dtype, leader = params["tok_emb.weight"].device, getattr(torch, settings.dtype), rank == 0

    def shared(value: Tensor) -> Tensor:  # the largest that a process brings, where 0 is to bring nothing
        return reduce([value.to(device)], dist.ReduceOp.MAX)[0].cpu() if world_size > 1 else value
    steps_per_epoch, rows = len(windows[0]) // settings.batch_size, settings.batch_size // world_size
    total, batch_tokens = settings.epochs * steps_per_epoch, settings.batch_size * settings.context_length
    order, signals, stop = progress.order, catch_signals(), 0
    with tqdm(desc="training", total=total * batch_tokens, initial=progress.step * batch_tokens, unit=" tokens",
              unit_scale=True, disable=not leader) as bar:
        for step in range(progress.step, total):
            epoch, index = divmod(step, steps_per_epoch)
            if index == 0 or order is None:
                n = len(windows[0])
                order = shared(pass_order(n, generator, shuffle=True) if leader else torch.zeros(n, dtype=torch.int64))
            start = index * settings.batch_size + rank * rows
            inputs, targets = batch_of(windows[0], order[start:start + rows], device)
            params, opt_state, _ = train_step(
                params, opt_state, inputs, targets, config, dropout_generator(generator, step, device, rank),
                lr=settings.lr, weight_decay=settings.weight_decay, dtype=dtype,
                average=average if world_size > 1 else None)
            bar.update(batch_tokens)
            if leader and step % settings.eval_freq == 0:
                losses = evaluate_model(cast(params, dtype), *windows, settings.batch_size, config, generator,
                                        settings.eval_iter)
                evaluation = ((step + 1) * batch_tokens, *losses)
                progress = progress._replace(evaluations=(*progress.evaluations, evaluation))
                log(f"Ep {epoch + 1} (Step {step:06d}): Train loss {losses[0]:.3f}, Val loss {losses[1]:.3f}", signals)
            if leader and index == steps_per_epoch - 1:
                prompt = text_to_token_ids(settings.start_context, tokenizer).to(device)
                text = token_ids_to_text(generate(cast(params, dtype), prompt, config, 50), tokenizer)
                log(text.replace("\n", " "), signals)
            stop = int(shared(torch.tensor(signals[0] if signals else 0)))
            progress = progress._replace(step=step + 1, order=order)
            saving = settings.save_every and (step + 1) % settings.save_every == 0
            if leader and (stop or saving or step + 1 == total):
                save(params, opt_state, progress._replace(generator=generator.get_state()))
            if stop:
                break
    return progress, stop if progress.step < total else 0


def log(line: str, signals: list[int]) -> None:
    """Nothing: prints the line to standard output, clear of the bar on standard error; a failure adds a SIGPIPE."""
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # the reader has gone, or the disk is full: a reason to save and stop, not to lose the run
        signals.append(signal.SIGPIPE)


def build_parser() -> sample.Parser:
    """The parser of this command line; an option that is not given is None where the default may come from a file."""
    parser, defaults = sample.Parser(description="Train a GPT-2 model on a text, as the chapter does."), Settings()

    def add(name: str, parse: Callable[[str], Any], meaning: str, default: Any = None) -> None:
        default = default or getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse, help=f"{meaning} (default: {default})")
    parser.add_argument("--data", nargs="+", help=f"UTF-8 text files (default: {' '.join(defaults.data)})")
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
    for name, kind in (("vocab_size", int), ("emb_dim", int), ("n_layers", int), ("drop_rate", float)):
        parse = number(int, 1) if kind is int else number(float, 0, 1)
        add(name, parse, "of the model", getattr(GPT_CONFIG_124M, name))
    parser.add_argument("--qkv-bias", action=argparse.BooleanOptionalAction, help="of the model (default: without)")
    parser.add_argument("--checkpoint", default="model.pth", help="where the model is saved (default: %(default)s)")
    parser.add_argument("--plot", default="loss.png", help="the picture: .png, .pdf or .svg (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint, with its settings unless given")
    sample.add_weight_options(parser, None, "`openai` to start from the published GPT-2 (default: fresh ones)")
    parser.set_defaults(seed=None, dtype=None)
    return parser


def settle(given: dict[str, Any], loaded: Checkpoint | None, source: str) -> tuple[Settings, Config]:
    """What decides a run: each option as given, or else as in what was loaded from source, or else as in the chapter.

    ValueError for an option that contradicts what was loaded: of a model, only drop_rate can be changed; its windows
    may be shorter than its context; a run that goes on keeps its windows and batches.
    """
    kept, fixed = asdict(GPT_CONFIG_124M) | Settings()._asdict(), dict[str, Any]()
    if loaded is not None:
        window = min(kept["context_length"], loaded.config.context_length)
        kept |= asdict(loaded.config) | {"context_length": window} | loaded.run.get("settings", {})
        names = ["vocab_size", "emb_dim", "n_heads", "n_layers", "qkv_bias"]
        names += ["batch_size", "context_length"] if "settings" in loaded.run else []
        fixed = {name: kept[name] for name in names}
        if given.get("context_length", 0) > loaded.config.context_length:
            fixed["context_length"] = loaded.config.context_length
    for name, there in fixed.items():
        if given.get(name, there) != there:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} contradicts {source}: {there} there")
    chosen = kept | given
    config = Config(**{field.name: chosen[field.name] for field in fields(Config)})
    if loaded is not None:
        config = replace(config, context_length=loaded.config.context_length)
    return Settings(*(chosen[name] for name in Settings._fields)), config


def check_outputs(checkpoint: Path, plot: Path, inputs: Sequence[str], params: Params) -> None:
    """Nothing; an error now for what would fail after hours of training: paths that can't be written, a full disk."""
    outputs = {checkpoint.resolve(), plot.resolve()}
    if len(outputs) < 2 or outputs & {Path(path).resolve() for path in inputs}:
        raise ValueError("--checkpoint and --plot must be different files, and none of --data")
    if plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot {plot} must end in .png, .pdf or .svg")
    if checkpoint.is_file() and not zipfile.is_zipfile(checkpoint):
        raise ValueError(f"--checkpoint {checkpoint} is there and is no checkpoint: it will not be overwritten")
    for path in (checkpoint, plot):
        if path.is_dir():
            raise ValueError(f"{path} is a directory, not a file to write")
        with open(f"{path}.partial", "wb"):
            os.remove(f"{path}.partial")
    needed = 12 * sum(tensor.numel() for tensor in params.values())  # float32, with AdamW's moments
    free = shutil.disk_usage(checkpoint.resolve().parent).free
    if free < needed:
        raise ValueError(f"{checkpoint} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")


def main() -> int:
    """The exit status of `python train.py`."""
    tune_allocator()
    args = build_parser().parse_args()
    if args.weights not in (None, "openai"):
        raise ValueError("--weights can only be openai; to go on from a file, use --resume --checkpoint FILE")
    if args.resume and args.weights:
        raise ValueError("--resume goes on from --checkpoint, --weights openai starts anew: give one of them")
    device, tokenizer = sample.pick_device(args.device), sample.gpt2_tokenizer()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    source, loaded = args.checkpoint if args.resume else args.weights, None
    for turn in (0, 1) if source else ():  # first process 0, then the others, which find what it has downloaded
        loaded = sample.load_model(source, args) if turn == min(rank, 1) else loaded
        if world_size > 1:
            reduce([torch.zeros(1, device=device)], dist.ReduceOp.SUM)
    settings, config = settle({name: value for name, value in vars(args).items() if value is not None}, loaded, source)
    if not settings.start_context:
        raise ValueError("--start-context is empty: give the samples something to continue")
    if config.vocab_size != tokenizer.n_vocab:
        raise ValueError(f"--vocab-size must be {tokenizer.n_vocab}, the size of GPT-2's vocabulary")
    if settings.batch_size % world_size:
        raise ValueError(f"--batch-size {settings.batch_size} can't be split evenly over {world_size} processes")
    windows = read_windows(settings, tokenizer)
    data = hashlib.sha256(b"".join(part.tobytes() for part in windows)).hexdigest()
    generator = torch.Generator().manual_seed(settings.seed)
    params, _, opt_state, run = loaded or (init_params(config, generator), config, None, {})
    progress = Progress(data, step=int(opt_state["step"]) if opt_state else 0)._replace(**run.get("progress", {}))
    if progress.data != data:
        raise ValueError(f"{source} was made with other data than {' '.join(settings.data)}")
    if progress.generator is not None:
        generator.set_state(progress.generator)
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
        print(f"on {device}: the chapter's figures are a CPU's, those printed here will differ", file=sys.stderr)
    if not settings.epochs:
        params = cast(params, getattr(torch, settings.dtype), device)
        losses = evaluate_model(params, *windows, settings.batch_size, config, generator)
        if rank == 0:
            print("Training loss {:.5f}, validation loss {:.5f}".format(*losses))
        return 0
    steps_per_epoch = len(windows[0]) // settings.batch_size
    if progress.step >= settings.epochs * steps_per_epoch:
        print(f"{source} has done its {settings.epochs} epochs: give more with --epochs", file=sys.stderr)
        return 0
    if rank == 0:
        check_outputs(Path(args.checkpoint), Path(args.plot), settings.data, params)
    found = [] if args.resume or not os.path.exists(args.checkpoint) else [args.checkpoint]  # not ours: it is kept

    def save(params: Params, opt_state: OptState, progress: Progress) -> None:
        while found:
            os.replace(found.pop(), f"{args.checkpoint}.old")
            print(f"{args.checkpoint} was there: now it is {args.checkpoint}.old", file=sys.stderr)
        save_checkpoint(args.checkpoint, params, config, opt_state, settings.lr, settings.weight_decay,
                        progress=progress._asdict(), settings=settings._asdict())
    params = cast(params, torch.float32, device)
    opt_state = opt_state or init_optimizer(params)
    moments = {key: cast(opt_state[key], torch.float32, device) for key in ("exp_avg", "exp_avg_sq")}
    progress, stop = train(params, {"step": opt_state["step"].to(device), **moments}, config, progress, windows,
                           tokenizer, generator, settings, rank, world_size, save)
    if rank == 0 and progress.evaluations:
        tokens_per_epoch = steps_per_epoch * settings.batch_size * settings.context_length
        plot_losses(progress.evaluations, tokens_per_epoch, args.plot)
    if rank == 0 and stop:
        paths = f"--checkpoint {args.checkpoint}" + (f" --plot {args.plot}" if args.plot != "loss.png" else "")
        print(f"stopped after step {progress.step - 1}: `python train.py --resume {paths}` goes on", file=sys.stderr)
    return 128 + stop if stop else 0


if __name__ == "__main__":
    sample.run(main)
