"""Text in, text out: the tokenizer, temperature, top-k and generation. `python sample.py --help`

`next_token` chooses a token by `keep_top_k` and `softmax_with_temperature`; `stream` does so again and again.

Axes: B batch, T tokens, V vocabulary.
"""
import argparse
import codecs
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from gpt import GPT_CONFIG_124M, Config, Params, cast, empty_cache, forward, pack
from weights import OPENAI_SIZES, OPENAI_URL, Checkpoint, download_openai, load_checkpoint, load_openai

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = Path(__file__).with_name("r50k_base.tiktoken")
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding, from the file that came with this one; ValueError if that is damaged (5.1.1)."""
    ranks = load_tiktoken_bpe(str(VOCABULARY), VOCABULARY_SHA256)
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})


def text_to_token_ids(text: str, tokenizer: tiktoken.Encoding) -> Tensor:
    """The token ids of a text, (1, n); `<|endoftext|>` in it is the token 50256 (section 5.1.1)."""
    return torch.tensor([tokenizer.encode(text, allowed_special={END_OF_TEXT})], dtype=torch.long)


def token_ids_to_text(token_ids: Tensor, tokenizer: tiktoken.Encoding) -> str:
    """The text of token ids (1, n) or (n,) (section 5.1.1)."""
    return tokenizer.decode(token_ids.flatten().tolist())


def softmax_with_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities (..., V) from logits (..., V): more even the higher the temperature (section 5.3.1).

    Infinite logits are limits: -inf has no chance, and +inf all of it. ValueError unless temperature is above 0, and
    for logits that are nan.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, not {temperature!r}")
    if logits.isnan().any():
        raise ValueError("the model's logits are no numbers: its training has failed, perhaps at too high a rate")
    limits = torch.finfo(logits.dtype)
    largest = logits.amax(-1, keepdim=True)
    below = (logits - largest).masked_fill(logits == largest, 0)  # inf - inf has no value, but is meant as 0 here
    return (below / min(max(temperature, limits.tiny), limits.max)).softmax(-1)  # neither 0 nor inf in this dtype


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row where they stand, -inf elsewhere; of equal ones just enough (section 5.3.2).

    logits (..., V) -> (..., V), of which min(k, V) are kept. ValueError when k is below 1.
    """
    if k < 1:
        raise ValueError(f"top-k must keep at least 1 token, not {k!r}")
    kept = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)


def next_token(logits: Tensor, temperature: float = 0.0, top_k: int | None = None,
               generator: torch.Generator | None = None) -> Tensor:
    """Each row's next token id (B, 1), from logits (B, V): the likeliest at temperature 0, else drawn (section 5.3.3).

    ValueError for a temperature that is negative, or positive without a generator to draw from, and for top_k below 1.
    """
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if generator is None:
        raise ValueError("a temperature that is not 0 needs a generator to draw from")
    return torch.multinomial(softmax_with_temperature(logits, temperature), 1, generator=generator)


@torch.inference_mode()
def stream(params: Params, token_ids: Tensor, config: Config, max_new_tokens: int, temperature: float = 0.0,
           top_k: int | None = None, eos_id: int | None = None,
           generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """The tokens of `generate` as they come, each (B, 1)."""
    B, T = token_ids.shape
    if T == 0 or max_new_tokens < 0:
        raise ValueError("the prompt must have at least one token" if T == 0 else "max_new_tokens must not be negative")
    params, start = pack(params), 0
    cache = empty_cache(params, B, min(config.context_length, T + max_new_tokens), config)
    ended = torch.zeros(B, 1, dtype=torch.bool, device=token_ids.device)
    for _ in range(max_new_tokens):
        window = token_ids[:, -config.context_length:]
        logits = forward(params, window[:, -1:] if start else window, config, cache=cache, start=start)[:, -1]
        token = next_token(logits, temperature, top_k, generator)
        if eos_id is not None:
            ended = ended | (token == eos_id)
            if ended.all():
                return
            token = token.masked_fill(ended, eos_id)
        yield token
        token_ids = torch.cat([token_ids, token], dim=1)
        start = window.shape[1] % config.context_length  # 0: the window slides, all its tokens have new positions


def generate(params: Params, token_ids: Tensor, config: Config, max_new_tokens: int, temperature: float = 0.0,
             top_k: int | None = None, eos_id: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """token_ids (B, T) followed by up to max_new_tokens new ones (B, T + n) (section 5.3.3).

    Each is chosen by `next_token` given the last context_length tokens before it. Generation ends before a token in
    which every row has produced eos_id; a row that ends earlier is filled with eos_id. ValueError for an empty prompt
    and for what `next_token` refuses.
    """
    new = stream(params, token_ids, config, max_new_tokens, temperature, top_k, eos_id, generator)
    return torch.cat([token_ids, *new], dim=1)


def number(kind: type, low: float, high: float = 2**31, above: bool = False) -> Callable[[str], Any]:
    """A parser of numbers from low (or above it) up to below high, for argparse."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value < high or (above and value == low):
            raise ValueError
        return value
    bound = f"{'above' if above else 'of at least'} {low} and below {high}"
    parse.__name__ = f"{'whole ' if kind is int else ''}number {bound}"  # argparse: "invalid ... value: '-1'"
    return parse


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that both command lines share; without a usage, a mistake is reported in one line."""
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--size", default="124M", help=f"OpenAI's model: {', '.join(OPENAI_SIZES)}")
    add("--models-dir", default="gpt2", help="where OpenAI's models are kept")
    add("--base-url", default=OPENAI_URL, help="where OpenAI's models are downloaded from")
    add("--seed", type=number(int, 0, 2**63), default=123, help="of every random draw")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the first there is of cuda, mps, cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the computation; float32 is exact, bfloat16 faster")
    add("--n-heads", type=number(int, 1), help="of the model; None: as its file tells, emb_dim / 64 if it does not")
    return parser


def load_model(name: str, args: argparse.Namespace) -> Checkpoint:
    """OpenAI's model if the name is `openai`, or else the checkpoint of that name; ValueError if it is not to be had.

    Of args, only the options of `new_parser` are used.
    """
    if name == "openai":
        loaded = Checkpoint(*load_openai(download_openai(args.size, args.models_dir, args.base_url)), None, {})
    elif Path(name).is_file():
        loaded = load_checkpoint(name, args.n_heads)
    else:
        raise ValueError(f"there is no {name}: `python train.py --checkpoint {name}` makes it")
    if args.n_heads not in (None, loaded.config.n_heads):
        raise ValueError(f"--n-heads {args.n_heads} contradicts {name}: {loaded.config.n_heads} there")
    if loaded.config.vocab_size != GPT_CONFIG_124M.vocab_size:
        raise ValueError(f"{name} knows {loaded.config.vocab_size} tokens, but GPT-2's vocabulary has "
                         f"{GPT_CONFIG_124M.vocab_size}")
    return loaded


def pick_device(name: str) -> torch.device:
    """The device of that name, or for `auto` the best one here; ValueError if it is not there."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, available in kinds.items() if available]
    choices = [*there, *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in ("auto", *choices):
        raise ValueError(f"there is no device {name!r} here: choose from {', '.join(choices)}")
    return torch.device(there[0] if name == "auto" else name)


def run_command(command: Callable[[], int]) -> NoReturn:
    """Exits with the command's status; what the user did wrong, or the disk or network, is one line and status 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # where it is not UTF-8, a strange character is no failure
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt:
        status = 130
    except (OSError, MemoryError, ValueError, RuntimeError) as error:
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        if isinstance(error, RuntimeError) and "memory" not in message:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
        status = 2
    sys.exit(status)


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    parser = new_parser("Continue a text with a GPT-2 model.")
    add = parser.add_argument
    add("--weights", default="model.pth", help="a checkpoint, or `openai` for the published GPT-2")
    add("--prompt", default="Every effort moves you", help="what the model continues")
    add("--max-new-tokens", type=number(int, 0), default=25, help="how many to write at most")
    add("--temperature", type=number(float, 0), default=0.0, help="0: always the likeliest token; higher: more varied")
    add("--top-k", type=number(int, 1), help="how many of the likeliest tokens can be drawn; None: all")
    return parser


def main() -> int:
    """The exit status of `python sample.py`."""
    args = build_parser().parse_args()
    device = pick_device(args.device)
    params, config, *_ = load_model(args.weights, args)
    params = cast(params, getattr(torch, args.dtype), device)
    tokenizer = gpt2_tokenizer()
    prompt = text_to_token_ids(args.prompt, tokenizer).to(device)
    tokens = stream(params, prompt, config, args.max_new_tokens, args.temperature, args.top_k,
                    tokenizer.eot_token, torch.Generator(device).manual_seed(args.seed))

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be spread over several tokens
    print(args.prompt, end="", flush=True)
    start, count = time.perf_counter(), 0
    for count, token in enumerate(tokens, 1):
        print(decoder.decode(tokenizer.decode_single_token_bytes(int(token))), end="", flush=True)
    print(decoder.decode(b"", final=True))
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
