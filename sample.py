"""Text in, text out: the tokenizer, temperature, top-k and generation. `python sample.py --help`

`next_token` chooses a token by `keep_top_k` and `softmax_with_temperature`; `generate` does so again and again.

Axes: B batch, T tokens, V vocabulary.
"""
import argparse
import base64
import codecs
import hashlib
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # For speed on a busy machine. A thread that waits for another "spins": it keeps its processor busy, which may be
    # the one that the other waits for. So it must not do so for long. OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Generator, Tensor

from gpt import Checked, Config, Params, empty_cache, extend, forward, kind_of, map_params, option, pack
from weights import OPENAI_SIZES, OPENAI_URL, load_model

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = Path(__file__).resolve().with_name("r50k_base.tiktoken")  # also when this file is called by a link
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding, from the file beside this one; ValueError if that is damaged (section 5.1.1)."""
    lines = VOCABULARY.read_bytes()
    if hashlib.sha256(lines).hexdigest() != VOCABULARY_SHA256:
        raise ValueError(f"{VOCABULARY} is damaged")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines.splitlines())}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})


def text_to_token_ids(text: str, tokenizer: tiktoken.Encoding) -> Tensor:
    """The token ids of a text, (1, n); `<|endoftext|>` in it is the token 50256 (section 5.1.1)."""
    return torch.tensor([tokenizer.encode(text, allowed_special={END_OF_TEXT})], dtype=torch.long)


def token_ids_to_text(token_ids: Tensor, tokenizer: tiktoken.Encoding) -> str:
    """The text of token ids (1, n) or (n,) (section 5.1.1)."""
    return tokenizer.decode(token_ids.flatten().tolist())


def softmax_with_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities (..., V) from logits (..., V): more even the higher the temperature (section 5.3.1).

    It is (logits / temperature).softmax(-1), as in the chapter. The largest logit is subtracted first, as softmax
    itself does, so that a tiny temperature makes no number too large. ValueError unless temperature is above 0.
    """
    limits = torch.finfo(logits.dtype)
    if not 0 < temperature < limits.max:
        raise ValueError(f"temperature must be a positive number, not {temperature!r}")
    return ((logits - logits.amax(-1, keepdim=True)) / max(temperature, limits.tiny)).softmax(-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row where they stand, -inf elsewhere (section 5.3.2).

    logits (..., V) -> (..., V), of which exactly min(k, V) are kept. If several equal the k-th largest, the chapter's
    comparison with that one would keep them all. ValueError when k is below 1.
    """
    if k < 1:
        raise ValueError(f"top-k must keep at least 1 token, not {k!r}")
    top = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)


def next_token(logits: Tensor, temperature: float = 0.0, top_k: int | None = None,
               generator: Generator | None = None) -> Tensor:
    """Each row's next token id (B, 1), from logits (B, V): the likeliest at temperature 0, else drawn (section 5.3.3).

    ValueError for logits whose largest is not finite, for a temperature that is negative, or positive without a
    generator to draw from, and for top_k below 1.
    """
    if not logits.amax(-1).isfinite().all():
        raise ValueError("the model computes nan or inf, which are no numbers")
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if generator is None:
        raise ValueError("a temperature that is not 0 needs a generator to draw from")
    return torch.multinomial(softmax_with_temperature(logits, temperature), 1, generator=generator)


def generate_simple(params: Params, token_ids: Tensor, config: Config, max_new_tokens: int, temperature: float = 0.0,
                    top_k: int | None = None, eos_id: int | None = None, generator: Generator | None = None) -> Tensor:
    """token_ids (1, T) followed by up to max_new_tokens new ones (1, T + n): the chapter's `generate` (section 5.3.3).

    Each is chosen by `next_token` given the last context_length tokens before it, until one is eos_id. Our `generate`
    gives the same tokens many times faster, and takes several rows. Errors are those of `forward` and `next_token`.
    """
    for _ in range(max_new_tokens):
        logits = forward(params, token_ids[:, -config.context_length:], config)[:, -1]
        token = next_token(logits, temperature, top_k, generator)
        if token == eos_id:
            break
        token_ids = torch.cat([token_ids, token], dim=1)
    return token_ids


# ---- The chapter ends here. What follows is the same loop with a cache, and the command line. ----

@torch.inference_mode()
def stream(params: Params, token_ids: Tensor, config: Config, max_new_tokens: int, temperature: float = 0.0,
           top_k: int | None = None, eos_id: int | None = None, generator: Generator | None = None) -> Iterator[Tensor]:
    """The tokens of `generate` as they come, each (B, 1). Its errors come when the first token is asked for."""
    B, T = token_ids.shape
    params = pack(params)
    cache = empty_cache(params, B, T + max_new_tokens, config)
    ended = torch.zeros(B, 1, dtype=torch.bool, device=token_ids.device)
    unread = token_ids[:, -config.context_length:]
    for _ in range(max_new_tokens):
        logits, cache = extend(params, unread, config, cache)
        token = next_token(logits[:, -1], temperature, top_k, generator)
        if eos_id is not None:
            token, ended = token.masked_fill(ended, eos_id), ended | (token == eos_id)
            if ended.all():
                return
        yield token
        token_ids, unread = torch.cat([token_ids, token], dim=1), token
        if cache.length == config.context_length:
            # From now on the window moves with each token, so all in it have new positions and are read again.
            unread, cache = token_ids[:, -config.context_length:], cache._replace(length=0)


def generate(params: Params, token_ids: Tensor, config: Config, max_new_tokens: int, temperature: float = 0.0,
             top_k: int | None = None, eos_id: int | None = None, generator: Generator | None = None) -> Tensor:
    """token_ids (B, T) followed by up to max_new_tokens new ones (B, T + n) (section 5.3.3).

    Each is chosen by `next_token` given the last context_length tokens before it. A row that produces eos_id is filled
    with eos_id from there on. When every row has produced it, generation ends, without that last column.
    ValueError for an empty prompt and for what `next_token` refuses.
    """
    tokens = stream(params, token_ids, config, max_new_tokens, temperature, top_k, eos_id, generator)
    return torch.cat([token_ids, *tokens], dim=1)


# The command line
@dataclass(frozen=True)
class Options(Checked):
    """The options that both command lines have."""
    size: str = option("124M", "of OpenAI's model", one_of=OPENAI_SIZES)
    models_dir: str = option("gpt2", "where OpenAI's models are kept")
    base_url: str = option(OPENAI_URL, "where OpenAI's models are downloaded from")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the first there is of cuda, mps, cpu")


@dataclass(frozen=True)
class SampleOptions(Options):
    """The options of this command line, with the chapter's defaults."""
    weights: str = option("model.pth", "a checkpoint, a file or folder of Hugging Face's GPT-2, or `openai`")
    n_heads: int | None = option(None, "the model's heads, for a file that does not state them", at_least=1)
    prompt: str = option("Every effort moves you", "what the model continues; - reads it from standard input")
    max_new_tokens: int = option(25, "how many to write at most", at_least=0)
    num_samples: int = option(1, "how many continuations to write, one after the other", at_least=1)
    temperature: float = option(0.0, "0: always the likeliest token; higher: more varied", at_least=0, below=math.inf)
    top_k: int | None = option(None, "how many of the likeliest tokens can be drawn, instead of all", at_least=1)
    seed: int = option(123, "of the random draws", at_least=0, below=2**63)
    dtype: str = option("float32", "of the computation; bfloat16 reads half the bytes", one_of=("float32", "bfloat16"))


def typed_options(description: str, *kinds: type) -> list[dict[str, Any]]:
    """What was typed on the command line, by names, for each of these dataclasses of options."""
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)  # a mistake is one line
    for each in {each.name: each for kind in kinds for each in fields(kind)}.values():
        how = {"type": kind_of(each)} if each.type is not bool else {"action": argparse.BooleanOptionalAction}
        if isinstance(each.default, tuple):
            how |= {"nargs": "+", "action": "extend"}
        parser.add_argument(f"--{each.name.replace('_', '-')}", help=f"{each.metadata['help']} ({each.default})", **how)
    typed = vars(parser.parse_args())
    return [{each.name: typed[each.name] for each in fields(kind) if each.name in typed} for kind in kinds]


def pick_device(name: str) -> torch.device:
    """The device of that name, or for `auto` the best one here; ValueError if it is not there."""
    there = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]
    choices = ["auto", *there, *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in choices:
        raise ValueError(f"there is no device {name!r} here: choose from {', '.join(choices)}")
    return torch.device(there[0] if name == "auto" else name)


def read_utf8(content: bytes, name: str | Path) -> str:
    """The text in these bytes, without a byte-order mark; ValueError with this name if they are not UTF-8."""
    try:  # a zero is no text, so it becomes a byte that UTF-8 does not have
        text = content.replace(b"\0", b"\xff").decode("utf-8").removeprefix("\ufeff")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: see its byte {error.start}") from None


def run_command(command: Callable[[], None]) -> None:
    """Calls the command. What the user did wrong, or the disk or network, is one line and exit status 2."""
    sys.stdin, sys.stdout, sys.stderr = (  # what was closed before the start is None
        file or open(os.devnull, "r+") for file in (sys.stdin, sys.stdout, sys.stderr))  # noqa: SIM115
    with suppress(AttributeError):  # a notebook's standard output can't
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # type: ignore  # a console may lack a character
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        command()
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (FloatingPointError, ImportError, MemoryError, OSError, OverflowError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and not re.search("(out of|allocate) memory", str(error)):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split()) or 'no memory'}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Does what `python sample.py` is asked for."""
    options = SampleOptions(**typed_options("Continue a text with a GPT-2 model.", SampleOptions)[0])
    device, tokenizer, prompt = pick_device(options.device), gpt2_tokenizer(), options.prompt
    if prompt == "-":
        prompt = read_utf8(sys.stdin.buffer.read(), "standard input").removesuffix("\n")
    loaded = load_model(options.weights, options.n_heads, options.size, options.models_dir, options.base_url)
    params = map_params(lambda tensor: tensor.to(device, getattr(torch, options.dtype)), loaded.params)
    token_ids, generator = text_to_token_ids(prompt, tokenizer).to(device), Generator(device).manual_seed(options.seed)
    start, count = time.perf_counter(), 0
    for _ in range(options.num_samples):
        count += write(prompt, stream(params, token_ids, loaded.config, options.max_new_tokens, options.temperature,
                                      options.top_k, tokenizer.eot_token, generator), tokenizer)
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s, seed {options.seed}", file=sys.stderr)


def write(prompt: str, tokens: Iterator[Tensor], tokenizer: tiktoken.Encoding) -> int:
    """Prints the prompt and then tokens, each (1, 1), as they come. Returns their number."""
    decoder, count = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0  # a character may be several tokens
    print(prompt, end="", flush=True)
    for count, token in enumerate(tokens, 1):
        print(decoder.decode(tokenizer.decode_single_token_bytes(int(token))), end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    return count


if __name__ == "__main__":
    run_command(main)
