"""Pretraining: windows of text, the loss over a set, the training step, the loop. `python train.py --help`

A text becomes tokens (`tokenize`), windows (`make_windows`), batches (`batches`, `batch_of`), a loss and new parameters
(`train_step`), again and again (`train`). On a CPU, every random number of the first process comes from one generator,
or from another that it has seeded, in the chapter's order.

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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
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


class Windows(NamedTuple):
    """The text as a model sees it, (n, T + 1) tokens in the training and in the validation set."""
    train: np.ndarray
    val: np.ndarray


class Progress(NamedTuple):
    """How far a run is: with parameters, optimizer state, Config and Settings, all that the rest of it depends on."""
    data_hash: str               # of its windows
    generator_state: Tensor
    step: int = 0                # steps done
    order: Tensor | None = None  # of the windows in this epoch: (steps an epoch, B)
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
    # No token reaches from before a blank into it: pieces that end before one have the tokens of the whole.
    pieces = re.findall(rf"(?s).{{{PIECE}}}.*?\S(?=[ \n])|.*", text)
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


def batches(n: int, batch_size: int, generator: torch.Generator, shuffle: bool) -> tuple[Tensor, ...]:
    """For each batch of a pass over n windows, the numbers of its windows (B,), drawn as the chapter does (5.1.3).

    A shuffled pass, for training, drops the last batch if it is not full.
    """
    # DataLoader draws a seed for its worker processes, even where it has none, and then one for the order, if any.
    seeds = torch.empty(2 if shuffle else 1, dtype=torch.int64).random_(generator=generator)
    if not shuffle:
        return torch.split(torch.arange(n), batch_size)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(int(seeds[1])))
    return torch.split(order, batch_size)[:n // batch_size]


def batch_of(windows: np.ndarray, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of the windows in these rows."""
    tokens = torch.from_numpy(windows[rows.numpy()].astype(np.int64)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def calc_loss_loader(params: Params, windows: np.ndarray, loader: Sequence[Tensor], config: Config) -> float:
    """The mean loss over batches of windows, each given by their numbers, without dropout (section 5.1.3)."""
    device = params["tok_emb.weight"].device
    return sum(calc_loss(params, *batch_of(windows, rows, device), config).item() for rows in loader) / len(loader)


def evaluate_model(params: Params, train_windows: np.ndarray, val_windows: np.ndarray, batch_size: int, config: Config,
                   generator: torch.Generator, eval_iter: int | None = None) -> tuple[float, float]:
    """The mean training and validation loss over eval_iter batches of each, or all, without dropout (section 5.2).

    The generator gives the order of the training batches.
    """
    train_loader = batches(len(train_windows), batch_size, generator, shuffle=True)[:eval_iter]
    val_loader = batches(len(val_windows), batch_size, generator, shuffle=False)[:eval_iter]
    return (calc_loss_loader(params, train_windows, train_loader, config),
            calc_loss_loader(params, val_windows, val_loader, config))


def init_optimizer(params: Params) -> OptState:
    """AdamW's state before the first step: for each parameter a step count and two moments, all 0 (section 5.2)."""
    return {name: {"step": torch.zeros((), device=tensor.device), "exp_avg": torch.zeros_like(tensor),
                   "exp_avg_sq": torch.zeros_like(tensor)} for name, tensor in params.items()}


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
    first, second, steps = ([opt_state[name][key] for name in names.values()]
                            for key in ("exp_avg", "exp_avg_sq", "step"))
    with torch.no_grad():
        adamw(list(leaves.values()), gradients, first, second, max_exp_avg_sqs=[], state_steps=steps, fused=True,
              amsgrad=False, maximize=False, beta1=0.9, beta2=0.999, eps=1e-8, lr=lr, weight_decay=weight_decay)
    return params, opt_state, loss.detach()


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
    """A list that will hold the first Ctrl-C, SIGTERM or SIGHUP to come; a second one ends the process at once."""
    caught, handled = list[int](), [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        handled.append(signal.SIGHUP)

    def handle(signum: int, _frame: Any) -> None:
        caught.append(signum)
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
    for each in handled:
        signal.signal(each, handle)
    return caught


def train(params: Params, opt_state: OptState, config: Config, progress: Progress, windows: Windows,
          tokenizer: tiktoken.Encoding, generator: torch.Generator, settings: Settings, checkpoint: str,
          signals: list[int], rank: int = 0, world_size: int = 1) -> Progress:
    """How far training came, to the end or until there is a signal in the list; prints the chapter's log (section 5.2).

    Writes the checkpoint at the end, when interrupted, and every `save_every` steps. Adds a SIGPIPE to the signals when
    none can read the log any more. This is process `rank` of `world_size`, each of which takes its part of every batch;
    process 0 alone saves, evaluates and prints.
    """
    device, dtype, leader = params["tok_emb.weight"].device, getattr(torch, settings.dtype), rank == 0
    n, batch_size = len(windows.train), settings.batch_size
    steps_per_epoch, batch_tokens = n // batch_size, batch_size * settings.context_length
    total, order = settings.epochs * steps_per_epoch, progress.order

    def average(gradients: list[Tensor]) -> list[Tensor]:
        return [gradient.div_(world_size) for gradient in reduce(gradients, dist.ReduceOp.SUM)]

    def largest(value: Tensor) -> Tensor:
        return reduce([value.to(device)], dist.ReduceOp.MAX)[0].cpu() if world_size > 1 else value
    with tqdm(desc="training", total=total * batch_tokens, initial=progress.step * batch_tokens, unit=" tokens",
              unit_scale=True, disable=not leader) as bar:
        for step in range(progress.step, total):
            epoch, index = divmod(step, steps_per_epoch)
            if index == 0 or order is None:  # None: in the middle of an epoch, but in a file of another origin
                order = torch.stack(batches(n, batch_size, generator, shuffle=True))
                order = largest(order if leader else torch.zeros_like(order))  # the leader's, for all
            inputs, targets = batch_of(windows.train, order[index].chunk(world_size)[rank], device)
            params, opt_state, _ = train_step(
                params, opt_state, inputs, targets, config, dropout_generator(generator, step, device, rank),
                lr=settings.lr, weight_decay=settings.weight_decay, dtype=dtype,
                average=average if world_size > 1 else None)
            log = []
            if leader and step % settings.eval_freq == 0:
                train_loss, val_loss = evaluate_model(
                    cast(params, dtype), *windows, batch_size, config, generator, settings.eval_iter)
                evaluation = ((step + 1) * batch_tokens, train_loss, val_loss)
                progress = progress._replace(evaluations=(*progress.evaluations, evaluation))
                log.append(f"Ep {epoch + 1} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
            if leader and index == steps_per_epoch - 1:
                prompt = text_to_token_ids(settings.start_context, tokenizer).to(device)
                text = token_ids_to_text(generate(cast(params, dtype), prompt, config, 50), tokenizer)
                log.append(text.replace("\n", " "))
            try:
                bar.update(batch_tokens)
                for line in log:
                    tqdm.write(line, file=sys.stdout)  # clear of the bar, which is on standard error
                sys.stdout.flush()
            except OSError:  # none can read it any more, but no work is lost
                bar.disable = True  # or it would fail once more when it is closed
                signals.append(signal.SIGPIPE)
            stop = largest(torch.tensor(len(signals))).item()  # if any process has got a signal
            progress = progress._replace(step=step + 1, order=order, generator_state=generator.get_state())
            saving = settings.save_every and (step + 1) % settings.save_every == 0
            if leader and (stop or saving or step + 1 == total):
                save_checkpoint(checkpoint, params, config, opt_state, settings.lr, settings.weight_decay,
                                progress=progress._asdict(), settings=settings._asdict())
            if stop:
                break
    return progress


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line; the defaults are those of Settings and of the chapter's configuration."""
    parser = sample.new_parser("Train a GPT-2 model on a text, as the chapter does.")
    add = parser.add_argument
    add("--data", nargs="+", help="UTF-8 text files")
    add("--train-ratio", type=number(float, 0, 1, above=True), help="the part of the text to train on")
    add("--epochs", type=number(int, 0), help="in all, also with --resume; 0 prints the losses")
    add("--batch-size", type=number(int, 1), help="windows a step, over all processes")
    add("--lr", type=number(float, 0, above=True), help="AdamW's learning rate")
    add("--weight-decay", type=number(float, 0), help="AdamW's weight decay")
    add("--eval-freq", type=number(int, 1), help="steps between evaluations")
    add("--eval-iter", type=number(int, 1), help="batches of each set in an evaluation")
    add("--start-context", help="what the samples continue")
    add("--save-every", type=number(int, 0), help="steps between saves; 0: at the end and when interrupted")
    add("--context-length", type=number(int, 1), help="tokens in a window, and the most that a fresh model can see")
    add("--vocab-size", type=int, choices=[GPT_CONFIG_124M.vocab_size], help="of the model, that of GPT-2's tokenizer")
    add("--emb-dim", type=number(int, 1), help="of the model")
    add("--n-layers", type=number(int, 1), help="of the model")
    add("--drop-rate", type=number(float, 0, 1), help="of the model")
    add("--qkv-bias", action=argparse.BooleanOptionalAction, help="of the model")
    add("--checkpoint", type=os.path.normpath, default="model.pth", help="where the model is saved")
    add("--plot", type=os.path.normpath, default="loss.png", help="the picture: .png, .pdf or .svg")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--weights", choices=["openai"], help="start from the published GPT-2; from others: --resume")
    start.add_argument("--resume", action="store_true", help="go on from --checkpoint, with its settings unless given")
    parser.set_defaults(**asdict(GPT_CONFIG_124M) | Settings()._asdict() | {"n_heads": None})
    return parser


def settle(arguments: list[str], loaded: Checkpoint | None, source: str) -> tuple[Settings, Config]:
    """What decides a run: each option as given, or else as in what was loaded from source, or else as in the chapter.

    ValueError for an option that contradicts what was loaded: of a model, only drop_rate can be changed; windows may be
    shorter than its context; a run that goes on keeps its windows, its batches and its seed.
    """
    parser, model, saved = build_parser(), GPT_CONFIG_124M, dict[str, Any]()
    if loaded is not None:
        model, saved = loaded.config, loaded.run.get("settings", {})
    window = min(model.context_length, Settings().context_length)
    parser.set_defaults(**asdict(model) | {"context_length": window})
    # What was saved is parsed as if it had been typed before the arguments, and so checked as they are.
    before = [f"--{name.replace('_', '-')}={saved[name]}" for name in Settings._fields[1:] if name in saved]
    before += ["--data", *saved["data"]] if "data" in saved else []
    kept, chosen = vars(parser.parse_args(before)), vars(parser.parse_args([*before, *arguments]))
    fixed = ["emb_dim", "n_heads", "n_layers", "qkv_bias"] if loaded else []
    for name in fixed + (["batch_size", "context_length", "seed", "train_ratio"] if saved else []):
        if chosen[name] != kept[name]:
            raise ValueError(f"--{name.replace('_', '-')} {chosen[name]} contradicts {source}: {kept[name]} there")
    settings = Settings(*(chosen[name] for name in Settings._fields))
    if not settings.start_context:
        raise ValueError("--start-context is empty: give the samples something to continue")
    config = Config(**{name: chosen[name] for name in asdict(model)})
    if loaded is None:
        return settings, config
    if settings.context_length > model.context_length:
        raise ValueError(f"--context-length {settings.context_length} is more than {source} can see: "
                         f"{model.context_length}")
    return settings, replace(model, drop_rate=config.drop_rate)


def check_outputs(checkpoint: Path, plot: Path, settings: Settings, params: Params) -> None:
    """Raises now what would fail after hours of training: paths that can't be written, a full disk."""
    outputs = {checkpoint.resolve(), plot.resolve()}
    if len(outputs) < 2 or outputs & {Path(path).resolve() for path in settings.data}:
        raise ValueError("--checkpoint and --plot must be different files, and none of --data")
    if plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot {plot} must end in .png, .pdf or .svg")
    for path in (checkpoint, plot):
        if path.exists() and not (path.is_file() and (path == plot or zipfile.is_zipfile(path))):
            kind = "picture" if path == plot else "checkpoint"
            raise ValueError(f"{path} is there and is no {kind}: it will not be overwritten")
        with open(f"{path}.partial", "wb"):
            os.remove(f"{path}.partial")
    needed = 12 * sum(tensor.numel() for tensor in params.values())  # float32, with AdamW's moments
    needed *= 2 if settings.save_every else 1  # the second file is written beside the first
    if (free := shutil.disk_usage(checkpoint.parent).free) < needed:
        raise ValueError(f"{checkpoint} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")


def join_processes(device: torch.device) -> tuple[torch.device, int, int, int]:
    """This process's device, its number, its number on its machine, and how many there are, as torchrun has set it.

    Without torchrun: the device as given, 0, 0 and 1. With it, each has a cuda device of its own, or the CPU.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if world_size == 1:
        return device, 0, 0, 1
    device = sample.pick_device(f"cuda:{local_rank}" if device.type == "cuda" else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
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
    device, rank, local_rank, world_size = join_processes(sample.pick_device(args.device))
    source, loaded = args.checkpoint if args.resume else args.weights, None
    my_turn = 0 if rank == 0 else 1 if local_rank == 0 else 2  # the first on each machine downloads, the others find it
    for turn in range(3):
        if source and turn == my_turn:
            loaded = sample.load_model(source, args)
        reduce([torch.zeros(1, device=device)], dist.ReduceOp.SUM)  # a barrier: all wait for those whose turn it is
    settings, config = settle(sys.argv[1:], loaded, source)
    if settings.batch_size % world_size:
        raise ValueError(f"--batch-size {settings.batch_size} can't be split evenly over {world_size} processes")

    tokenizer = sample.gpt2_tokenizer()
    windows = read_windows(settings, tokenizer)
    data_hash = hashlib.sha256(b"".join(part.tobytes() for part in windows)).hexdigest()
    generator = torch.Generator().manual_seed(settings.seed)
    params, _, opt_state, run = loaded or (init_params(config, generator), config, None, {})
    done = int(opt_state["out_head.weight"]["step"]) if opt_state else 0
    progress = Progress(data_hash, generator.get_state(), done)._replace(**run.get("progress", {}))
    generator.set_state(progress.generator_state)
    if progress.data_hash != data_hash:
        raise ValueError(f"{source} was made with other data than {' '.join(settings.data)}")
    mark = int(hashlib.sha256(repr((config, progress.step, data_hash)).encode()).hexdigest()[:15], 16)
    if reduce([torch.tensor([mark, -mark], device=device)], dist.ReduceOp.MAX)[0].sum():  # the largest - the smallest
        raise ValueError("the processes do not have the same checkpoint and data")
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

    params = cast(params, torch.float32, device)
    opt_state = opt_state or init_optimizer(params)
    opt_state = {name: cast(state, torch.float32, device) for name, state in opt_state.items()}
    signals = catch_signals()
    progress = train(params, opt_state, config, progress, windows, tokenizer, generator, settings, args.checkpoint,
                     signals, rank, world_size)
    if rank == 0 and progress.evaluations:
        tokens_per_epoch = steps_per_epoch * settings.batch_size * settings.context_length
        plot_losses(progress.evaluations, tokens_per_epoch, args.plot)
    if rank == 0 and progress.step < total:
        options = shlex.join(["--checkpoint", args.checkpoint] + ["--plot", args.plot] * (args.plot != "loss.png"))
        print(f"stopped after step {progress.step - 1}: `python train.py --resume {options}` goes on", file=sys.stderr)
    return 128 + signals[0] if signals else 0


if __name__ == "__main__":
    sample.run_command(main)
