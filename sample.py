"""Text in, text out: the tokenizer, temperature, top-k and generation. `python sample.py --help`

`next_token` chooses a token by `keep_top_k` and `softmax_with_temperature`; `stream` does so again and again.

Axes: B batch, T tokens, V vocabulary.
"""
import argparse
import base64
import codecs
import hashlib
import math
import os
import reprlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    # For speed on a busy machine. A thread that waits for another "spins": it keeps its processor busy, which may be
    # the one that the other waits for. So it must not do so for long. OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

from gpt import Config, Params, cast, empty_cache, extend, pack
from weights import OPENAI_SIZES, OPENAI_URL, load_model

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = Path(__file__).with_name("r50k_base.tiktoken")
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def gpt2_tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding, that of tiktoken.get_encoding("gpt2"), which would download it (section 5.1.1).

    It is read from the file beside this one; ValueError if that is damaged.
    """
    lines = VOCABULARY.read_bytes()
    if hashlib.sha256(lines).hexdigest() != VOCABULARY_SHA256:
        raise ValueError(f"{VOCABULARY} is damaged: fetch it again")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines.splitlines())}
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

    It is (logits / temperature).softmax(-1), as in the chapter. The rest is for extreme values. The largest logit is
    subtracted first, as softmax itself does, so that a tiny temperature makes no number too large; a logit of -inf gets
    nothing, and one of +inf leaves nothing to the others. ValueError unless temperature is above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, not {temperature!r}")
    limits = torch.finfo(logits.dtype)
    temperature = min(max(temperature, limits.tiny), limits.max)  # neither 0 nor infinite in this dtype
    logits = logits.clamp(max=limits.max)
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row where they stand, -inf elsewhere (section 5.3.2).

    logits (..., V) -> (..., V), of which exactly min(k, V) are kept: of equal ones just enough, where a comparison with
    the smallest, as in the chapter, would keep them all. ValueError when k is below 1.
    """
    if k < 1:
        raise ValueError(f"top-k must keep at least 1 token, not {k!r}")
    top = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)


def next_token(logits: Tensor, temperature: float = 0.0, top_k: int | None = None,
               generator: torch.Generator | None = None) -> Tensor:
    """Each row's next token id (B, 1), from logits (B, V): the likeliest at temperature 0, else drawn (section 5.3.3).

    ValueError for logits that are nan, for a temperature that is negative, or positive without a generator to draw
    from, and for top_k below 1.
    """
    if logits.isnan().any():
        raise ValueError("the model computes nan, which is no number: its training has failed")
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
    """The tokens of `generate` as they come, each (B, 1). Its errors come when the first token is asked for."""
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids must be (batch, tokens), not {tuple(token_ids.shape)}")
    B, T = token_ids.shape
    if T == 0:
        raise ValueError("the prompt must have at least one token")
    if max_new_tokens < 0:
        raise ValueError("max_new_tokens must not be negative")
    # The chapter calls `forward` on the whole window for each token: that loop is `naive_generate` in test_sampling.py.
    # This gives the same tokens. The cache remembers what was read, and `pack` lays the weights out for speed.
    params = pack(params)
    cache = empty_cache(params, B, min(config.context_length, T + max_new_tokens), config)
    ended = torch.zeros(B, 1, dtype=torch.bool, device=token_ids.device)
    unread = token_ids[:, -config.context_length:]
    for _ in range(max_new_tokens):
        logits, cache = extend(params, unread, config, cache)
        token = next_token(logits[:, -1], temperature, top_k, generator)
        if eos_id is not None:
            ended = ended | (token == eos_id)
            if ended.all():
                return
            token = token.masked_fill(ended, eos_id)
        yield token
        token_ids = torch.cat([token_ids, token], dim=1)
        unread = token
        if cache.length == config.context_length:
            # From now on the window moves with each token, so all in it have new positions and are read again.
            unread, cache = token_ids[:, -config.context_length:], cache._replace(length=0)


def generate(params: Params, token_ids: Tensor, config: Config, max_new_tokens: int, temperature: float = 0.0,
             top_k: int | None = None, eos_id: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """token_ids (B, T) followed by up to max_new_tokens new ones (B, T + n) (section 5.3.3).

    Each is chosen by `next_token` given the last context_length tokens before it. A row that produces eos_id is filled
    with eos_id from there on. When every row has produced it, generation ends, without that last column.
    ValueError for an empty prompt and for what `next_token` refuses.
    """
    tokens = list(stream(params, token_ids, config, max_new_tokens, temperature, top_k, eos_id, generator))
    return torch.cat([token_ids, *tokens], dim=1)


# ---- The chapter ends here. What follows is the command line, and what train.py's command line shares with it. ----

class Rule(NamedTuple):
    """What an option may be: how its text is read, in which words a mistake is told, and a test of the value."""
    kind: type
    words: str
    allows: Callable[[Any], bool]


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    """The rule of whole numbers from low to high."""
    words = f"a whole number from {low} to {high}"
    return Rule(int, words, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float = math.inf, above: bool = False) -> Rule:
    """The rule of numbers that are at least low, or above it, and below high."""
    words = f"a number {'above' if above else 'of at least'} {low}" + (f" and below {high}" if high < math.inf else "")
    return Rule(float, words, lambda value: isinstance(value, (int, float)) and low <= value < high
                and not (above and value == low))


def one_of(*choices: str) -> Rule:
    """The rule of a choice."""
    return Rule(str, "one of " + ", ".join(choices), lambda value: value in choices)


TEXT = Rule(str, "a text that is not empty", lambda value: isinstance(value, str) and value != "")
TEXTS = Rule(str, "one or more names",
             lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(map(TEXT.allows, value)))
PICTURE = Rule(str, "a name that ends in .png, .pdf or .svg",
               lambda value: TEXT.allows(value) and Path(value).suffix in (".png", ".pdf", ".svg"))
YES = Rule(bool, "True or False", lambda value: isinstance(value, bool))


def option(default: Any, rule: Rule, help: str) -> Any:
    """A field of a dataclass that is an option of a command line: `lr` is --lr there."""
    return field(default=default, metadata={"rule": rule, "help": help})


def flag(name: str) -> str:
    """What the option of that name is called on a command line."""
    return "--" + name.replace("_", "-")


class Checked:
    """The base of dataclasses of options: a value against its rule raises a ValueError that names its flag."""

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            value, rule = getattr(self, each.name), each.metadata["rule"]
            if not (rule.allows(value) or (value is None and each.default is None)):
                raise ValueError(f"{flag(each.name)} must be {rule.words}, not {reprlib.repr(value)}")


@dataclass(frozen=True)
class Options(Checked):
    """What both command lines know."""
    size: str = option("124M", one_of(*OPENAI_SIZES), f"OpenAI's model: {', '.join(OPENAI_SIZES)}")
    models_dir: str = option("gpt2", TEXT, "where OpenAI's models are kept")
    base_url: str = option(OPENAI_URL, TEXT, "where OpenAI's models are downloaded from")
    device: str = option("auto", TEXT, "cpu, cuda, mps, or auto: the first there is of cuda, mps, cpu")


def new_parser(description: str, examples: str, groups: dict[str, type]) -> argparse.ArgumentParser:
    """A parser with a flag for each field of each group's dataclass. It gives only what was typed.

    It takes no abbreviations, and reports a mistake in one line.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for each in fields(options):
            name, rule = flag(each.name), each.metadata["rule"]
            default = " ".join(each.default) if isinstance(each.default, tuple) else each.default
            told = each.metadata["help"] + ("" if default is None or rule is YES else f" (default: {default})")
            if rule is YES:
                group.add_argument(name, action=argparse.BooleanOptionalAction, help=told)
            elif rule is TEXTS:
                group.add_argument(name, nargs="+", action="extend", help=told)
            else:
                group.add_argument(name, type=rule.kind, help=told)
    return parser


def pick_device(name: str) -> torch.device:
    """The device of that name, or for `auto` the best one here; ValueError if it is not there."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, available in kinds.items() if available]
    choices = [*there, *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in ("auto", *choices):
        raise ValueError(f"there is no device {name!r} here: choose from {', '.join(choices)}")
    return torch.device(there[0] if name == "auto" else name)


def say(*sentences: str) -> None:
    """Prints each sentence on a line of standard error, if that can still be written to."""
    with suppress(OSError, ValueError):  # ValueError: it is closed
        for sentence in sentences:
            print(sentence, file=sys.stderr, flush=True)


def run_command(command: Callable[[], int]) -> NoReturn:
    """Exits with the command's status; what the user did wrong, or the disk or network, is one line and status 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's has not
            getattr(sys, name).reconfigure(errors="replace")  # a character that this console lacks is no failure
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt:
        status = 130
    except (OSError, MemoryError, ValueError, ArithmeticError, RuntimeError) as error:
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        if isinstance(error, RuntimeError) and "memory" not in message:
            raise
        say(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}")
        status = 2
    sys.exit(status)


@dataclass(frozen=True)
class SampleOptions(Options):
    """The options of this command line, with the chapter's defaults."""
    weights: str = option("model.pth", TEXT, "a checkpoint, a file or folder of Hugging Face's GPT-2, or `openai`")
    n_heads: int | None = option(None, whole(1), "the model's heads, for a file that does not tell")
    prompt: str = option("Every effort moves you", TEXT, "what the model continues; - reads it from standard input")
    max_new_tokens: int = option(25, whole(0), "how many to write at most")
    num_samples: int = option(1, whole(1), "how many continuations to write")
    temperature: float = option(0.0, number(0), "0: always the likeliest token; higher: more varied")
    top_k: int | None = option(None, whole(1), "how many of the likeliest tokens can be drawn, instead of all")
    seed: int = option(123, whole(0, 2**63 - 1), "of the random draws")
    dtype: str = option("float32", one_of("float32", "bfloat16"), "of the computation: float32, or bfloat16, which "
                        "reads half the bytes")


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command line."""
    return new_parser("Continue a text with a GPT-2 model.", """examples:
  python sample.py --prompt "It was a dark night" --temperature 1 --top-k 50
  python sample.py --weights openai --size 355M""", {"the model and the text": SampleOptions})


def main() -> int:
    """The exit status of `python sample.py`."""
    options = SampleOptions(**vars(build_parser().parse_args()))
    device = pick_device(options.device)
    loaded = load_model(options.weights, options.n_heads, options.size, options.models_dir, options.base_url)
    say(*loaded.notes)
    params = cast(loaded.params, getattr(torch, options.dtype), device)
    tokenizer = gpt2_tokenizer()
    prompt = options.prompt
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n") if sys.stdin else ""
    token_ids = text_to_token_ids(prompt, tokenizer).to(device).expand(options.num_samples, -1)
    start = time.perf_counter()
    request = (params, token_ids, loaded.config, options.max_new_tokens, options.temperature, options.top_k,
               tokenizer.eot_token, torch.Generator(device).manual_seed(options.seed))
    if options.num_samples == 1:
        count = write_one(prompt, stream(*request), tokenizer)
    else:
        count = write_several(prompt, generate(*request)[:, token_ids.shape[1]:], tokenizer)
    seconds = time.perf_counter() - start
    say(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s, seed {options.seed}")
    return 0


def write_one(prompt: str, tokens: Iterator[Tensor], tokenizer: tiktoken.Encoding) -> int:
    """Prints the prompt and then tokens, each (1, 1), as they come: how many."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be spread over several tokens
    count = 0
    try:
        print(prompt, end="", flush=True)
        for token in tokens:
            print(decoder.decode(tokenizer.decode_single_token_bytes(int(token))), end="", flush=True)
            count += 1
    finally:  # also when it fails or is interrupted, so that a message begins a line
        print(decoder.decode(b"", final=True), flush=True)
    return count


def write_several(prompt: str, token_ids: Tensor, tokenizer: tiktoken.Encoding) -> int:
    """Prints the prompt before each row of token_ids (B, T), up to its end of text: how many tokens those are."""
    count = 0
    for row in token_ids.tolist():
        length = row.index(tokenizer.eot_token) if tokenizer.eot_token in row else len(row)
        print(prompt + tokenizer.decode(row[:length]), end="\n\n")
        count += length
    return count


if __name__ == "__main__":
    run_command(main)
