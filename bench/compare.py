"""Times this project beside what its users would pick instead, in one run: `python bench/compare.py KIND`

    train    one training step, GPT-2 124M, 2 x 256 tokens, dropout 0.1. `floor` is its bare matrix products, each by
             the faster of MKL and oneDNN: the ratio to it says what is left to win
    decode   one sequence, 8 tokens of prompt and 200 new ones, drawn with top-k 50. `read-fp32` adds up the bytes that
             a float32 token needs. openvino-* run only with --openvino-python
    rows     8 sequences together beside one, seconds for each token of each
    growth   the 900th new token beside the 100th
    prompt   a prompt of 1000 tokens and the token after it
    past     a context of 512: a token that moves the full window on, beside the token before it and beside reading a
             prompt of 512 tokens
    busy     a token and a training step, of 124M and of 4 layers that are 256 wide: quiet, then while another process
             keeps one core busy, and the ratio
    start    `python sample.py` until its first token, beside `import torch` and reading the file
    split    a step of 8 x 256 tokens by two processes with a core each, beside one process with both
    corpus   reading and tokenizing a text of 100 MB, and the process's peak memory
    run      the whole of section 5.2, from the start of the process to its end, and its peak memory

and on a CUDA device:

    gpu-step   a training step of 16 x 1024 tokens, the matrices in bfloat16, with the chapter's dropout and without
    gpu-token  a token of one sequence, as in `decode`

The peers come from the package registry. All models have random weights: nothing else is downloaded.

    pip install --no-deps llms-from-scratch==1.0.19
    pip install transformers==5.24.0 ctranslate2==4.8.5

OpenVINO needs another transformers, so it gets an environment of its own. torchvision, which comes along, is not used,
and it stops the import where it does not fit torch (it is for GPUs, and torch is for the CPU alone):

    python -m venv ov && ov/bin/pip install torch==2.13.0 optimum==2.3.0 "optimum-intel[openvino]==2.2.0"
    ov/bin/pip uninstall -y torchvision
    python bench/compare.py decode --openvino-python ov/bin/python

Every contestant runs in a process of its own, in turn (A B C, A B C, ...), on two threads, so that a drift of the
machine's speed hits all alike. Read the ratios rather than the times. Nothing else should run on the machine meanwhile.
"""
import argparse
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

# torch, the project and the peers are imported where they are used: no contestant loads what is another's.
ROOT = Path(__file__).resolve().parents[1]
STORY = ROOT / "the-verdict.txt"
sys.path.insert(0, str(ROOT))
PROMPT, NEW = 8, 200  # tokens
Work = Callable[[], object]
Figures = dict[str, float]  # a figure under its unit; those in "s" are compared


def repeated(work: Work, warmup: int, repeats: int) -> float:
    """The median seconds that the work takes, once warm."""
    def seconds() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    return statistics.median([seconds() for _ in range(warmup + repeats)][warmup:])


def random_tokens(*shape: int) -> Any:
    """Always the same token ids, drawn once."""
    import torch
    return torch.randint(0, 50257, shape, generator=torch.Generator().manual_seed(0))


# Training

def training_step(name: str) -> Figures:
    """Seconds for a training step."""
    if name == "floor":
        return {"s": repeated(matrix_products(), 2, 5)}
    if name.startswith("ours"):
        import gpt
        return {"s": repeated(our_step(gpt.GPT_CONFIG_124M, "bfloat16" if name == "ours-bf16" else "float32"), 2, 5)}
    return {"s": repeated(peer_step(name), 2, 5)}


def gpu_step(name: str) -> Figures:
    """Seconds for a training step of 16 x 1024 tokens on a GPU."""
    import torch

    import gpt
    torch.set_float32_matmul_precision("high")  # as train.py does
    drop_rate = 0.0 if name.endswith("no-dropout") else 0.1
    if name.startswith("ours"):
        config = replace(gpt.GPT_CONFIG_124M, context_length=1024, drop_rate=drop_rate)
        work = our_step(config, "bfloat16", 16, "cuda")
    else:
        work = peer_step(name.partition("-")[0] + "-fast-fused-bf16", (16, 1024), drop_rate, "cuda")
    return {"s": repeated(work, 3, 10), "GB": torch.cuda.max_memory_allocated() / 1e9}


def our_step(config: Any, dtype: str = "float32", batch_size: int = 2, device: str = "cpu") -> Work:
    """This project's training step."""
    import torch

    import gpt
    import train
    train.tune_allocator()
    params = gpt.cast(gpt.init_params(config, torch.Generator().manual_seed(123)), torch.float32, device)
    generator = torch.Generator(device).manual_seed(123)
    opt_state = train.init_optimizer(params)
    tokens = random_tokens(batch_size, config.context_length + 1).to(device)

    def step() -> None:
        nonlocal params, opt_state
        params, opt_state, loss = train.train_step(params, opt_state, tokens[:, :-1], tokens[:, 1:], config, generator,
                                                   dtype=getattr(torch, dtype))
        loss.item()
    return step


def peer_step(name: str, shape: tuple[int, int] = (2, 256), drop_rate: float = 0.1, device: str = "cpu") -> Work:
    """The training step of the chapter's package or of transformers, over (B, T) tokens."""
    import torch
    import torch.nn.functional as F
    torch.manual_seed(0)
    batch_size, length = shape
    tokens = random_tokens(batch_size, length + 1).to(device)
    x, y = tokens[:, :-1], tokens[:, 1:]
    if name.startswith("book"):
        model = book_model(fast="fast" in name, context_length=length, drop_rate=drop_rate).to(device)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel
        config = GPT2Config(n_positions=length, resid_pdrop=drop_rate, embd_pdrop=drop_rate, attn_pdrop=drop_rate)
        model = GPT2LMHeadModel(config).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused="fused" in name)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=name.endswith("bf16")):
            if name.startswith("book"):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            else:
                loss = model(input_ids=x, labels=x).loss  # it shifts them itself
        loss.backward()
        optimizer.step()
        loss.item()
    return step


def matrix_products() -> Work:
    """All that a training step multiplies by its linear layers: the product and the two gradients of each."""
    import torch.nn.functional as F

    import gpt
    import train
    train.tune_allocator()
    libraries = [F.linear, gpt.onednn_product] if gpt.ONEDNN else [F.linear]  # F.linear takes MKL
    fastest: dict[tuple[int, ...], Callable[..., Any]] = {}
    products = []
    for name, shape in gpt.param_shapes(gpt.GPT_CONFIG_124M).items():
        if len(shape) == 2 and name not in gpt.EMBEDDINGS:
            for i, pair in enumerate(three_products(2 * 256, *shape)):
                if (*shape, i) not in fastest:
                    fastest[*shape, i] = min(libraries, key=partial(seconds_for_product, *pair))
                products.append(partial(fastest[*shape, i], *pair))

    def work() -> None:
        for product in products:
            product()
    return work


def three_products(rows: int, fan_out: int, fan_in: int) -> list[tuple[Any, Any]]:
    """Pairs (a, b) whose product a b^T is that of a linear layer, the gradient of its input, and of its weight."""
    import torch
    x, weight, gradient = torch.randn(rows, fan_in), torch.randn(fan_out, fan_in), torch.randn(rows, fan_out)
    return [(x, weight), (gradient, weight.t()), (gradient.t(), x.t())]


def seconds_for_product(a: Any, b: Any, library: Callable[..., Any]) -> float:
    return repeated(partial(library, a, b), 1, 5)


def book_model(fast: bool = False, **changes: object) -> Any:
    """The model of the chapter's package, in its training configuration but for the changes."""
    from llms_from_scratch.ch04 import GPTModel, GPTModelFast

    import gpt
    return (GPTModelFast if fast else GPTModel)({**asdict(gpt.GPT_CONFIG_124M), **changes})


# Generation

def our_model(**changes: Any) -> tuple[Any, Any]:
    """Parameters of OpenAI's 124M shape, but for the changes, and their configuration."""
    import torch

    import gpt
    config = replace(gpt.GPT_CONFIG_124M, **{"context_length": 1024, "drop_rate": 0.0, "qkv_bias": True, **changes})
    return gpt.init_params(config, torch.Generator().manual_seed(0)), config


def decode(name: str, device: str = "cpu") -> Figures:
    """Seconds for a new token of one sequence, drawn with top-k 50."""
    library, _, precision = name.partition("-")
    if device != "cpu":
        work = {"ours": decode_ours, "hf": decode_hf}[library](precision, device)
        return {"s": repeated(work, 2, 5) / NEW}
    works = {"ours": decode_ours, "book": decode_book, "hf": decode_hf, "ct2": decode_ctranslate2,
             "openvino": decode_openvino, "read": read_weights}
    work = works[library](precision)
    import torch
    with torch.inference_mode():
        return {"s": repeated(work, 1, 2) / NEW}


def decode_ours(precision: str, device: str = "cpu") -> Work:
    import torch

    import gpt
    import sample
    params, config = our_model()
    params = gpt.cast(params, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], device)
    generator = torch.Generator(device).manual_seed(1)
    return partial(sample.generate, params, random_tokens(1, PROMPT).to(device), config, NEW, temperature=1.0, top_k=50,
                   generator=generator)


def decode_book(_precision: str) -> Work:
    from llms_from_scratch.ch05 import generate
    model = book_model(context_length=1024, qkv_bias=True).eval()
    return partial(generate, model, random_tokens(1, PROMPT), NEW, 1024, temperature=1.0, top_k=50)


def hf_model() -> Any:
    """The model of transformers, in OpenAI's 124M shape."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config()).eval()


def hf_generate(model: Any) -> Work:
    """The generation of transformers, which drives OpenVINO's model too."""
    return partial(model.generate, random_tokens(1, PROMPT).to(model.device), max_new_tokens=NEW, min_new_tokens=NEW,
                   do_sample=True, top_k=50, pad_token_id=0)


def decode_hf(precision: str, device: str = "cpu") -> Work:
    model = hf_model().to(device)
    return hf_generate(model.bfloat16() if precision == "bf16" else model)


def decode_ctranslate2(precision: str) -> Work:
    """CTranslate2's generation. The model is converted in the first round."""
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    folder = Path(tempfile.gettempdir(), f"ct2-{precision}")
    if not folder.exists():
        with tempfile.TemporaryDirectory() as source:
            hf_model().save_pretrained(source)
            words = {f"w{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
            end = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
            tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(source)
            converter = ctranslate2.converters.TransformersConverter(source)
            converter.convert(str(folder), quantization="int8" if precision == "int8" else None)
    engine = ctranslate2.Generator(str(folder), device="cpu", intra_threads=threads(), inter_threads=1,
                                   compute_type="int8" if precision == "int8" else "float32")
    prompt = [f"w{i}" for i in range(PROMPT)]
    return partial(engine.generate_batch, [prompt], max_length=NEW, min_length=NEW, sampling_topk=50,
                   include_prompt_in_result=False)


def decode_openvino(precision: str) -> Work:
    """OpenVINO's model, driven by transformers. It is exported, and its weights made int8, in the first round."""
    import torch
    from optimum.intel import OVModelForCausalLM
    torch.set_num_threads(1)  # torch only draws the token: more of its threads would be in the way of OpenVINO's
    folder = Path(tempfile.gettempdir(), f"openvino-{precision}")
    if not folder.exists():
        with tempfile.TemporaryDirectory() as source:
            hf_model().save_pretrained(source)
            exported = OVModelForCausalLM.from_pretrained(source, export=True, load_in_8bit=precision == "int8",
                                                          compile=False)
            exported.save_pretrained(folder)
    config = {"INFERENCE_NUM_THREADS": threads(), "PERFORMANCE_HINT": "LATENCY"}
    if precision == "fp32":
        config["INFERENCE_PRECISION_HINT"] = "f32"  # else it is bfloat16 on a processor with units for that
    return hf_generate(OVModelForCausalLM.from_pretrained(folder, ov_config=config))


def read_weights(_precision: str) -> Work:
    """Adds up as many float32 numbers as NEW tokens read, one token after the other."""
    import torch

    import gpt
    shapes = gpt.param_shapes(gpt.GPT_CONFIG_124M)
    weights = torch.ones(sum(math.prod(shape) for name, shape in shapes.items() if name not in gpt.EMBEDDINGS))
    return lambda: [weights.sum() for _ in range(NEW)]


def threads() -> int:
    """How many threads a contestant gets."""
    return int(os.environ["OMP_NUM_THREADS"])


def rows(name: str) -> Figures:
    """Seconds for a new token, of one sequence or of 8 together."""
    import sample
    count = int(name.removeprefix("ours-"))
    params, config = our_model()
    ids = random_tokens(count, PROMPT)
    return {"s": repeated(lambda: sample.generate(params, ids, config, NEW), 1, 2) / (NEW * count)}


def token_seconds(context_length: int, prompt_length: int, count: int) -> list[float]:
    """The seconds that each of our first `count` new tokens takes. The first one's are those of reading the prompt."""
    import sample
    params, config = our_model(context_length=context_length)
    ids = random_tokens(1, prompt_length)
    times = [time.perf_counter()]
    for _ in sample.stream(params, ids, config, count):
        times.append(time.perf_counter())
    return [end - start for start, end in pairwise(times)]


def growth(name: str) -> Figures:
    """Seconds for a new token: the median of the 20 around the 100th or the 900th of one sequence."""
    middle = {"ours-100th": 100, "ours-900th": 900}[name]
    return {"s": statistics.median(token_seconds(1024, 1, middle + 10)[-20:])}


def past(name: str) -> Figures:
    """Seconds for a token when the window of 512 is full, for one just before that, or for reading 512 tokens."""
    if name == "ours-prompt":
        return {"s": statistics.median(token_seconds(512, 512, 1)[0] for _ in range(5))}
    prompt_length = {"ours-past": 512, "ours-before": 507}[name]
    return {"s": statistics.median(token_seconds(512, prompt_length, 6)[1:])}  # after the first one, five more


def prompt(name: str) -> Figures:
    """Seconds to read a prompt of 1000 tokens and choose the next."""
    if name.startswith("ours"):
        import sample
        params, config = our_model()
        ids = random_tokens(1, 1000)
        return {"s": repeated(lambda: sample.generate(params, ids, config, 1), 2, 5)}
    import torch
    model, ids = hf_model(), random_tokens(1, 1000)
    with torch.inference_mode():
        return {"s": repeated(lambda: model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0), 2, 5)}


# A neighbour

@contextmanager
def busy_core() -> Iterator[None]:
    """Another process keeps a core busy. It ends with this one, however that ends."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}:\n    for _ in range(10**6): pass"
    with subprocess.Popen([sys.executable, "-c", loop]) as process:
        try:
            yield
        finally:
            process.kill()


def busy(name: str) -> Figures:
    """Seconds for a token or a training step on a quiet machine and beside a busy process, and their ratio."""
    import gpt
    import sample
    _, kind, size = name.split("-")
    changes = {"small": {"emb_dim": 256, "n_heads": 4, "n_layers": 4}, "124M": {}}[size]
    if kind == "step":
        work, per_work = our_step(replace(gpt.GPT_CONFIG_124M, **changes)), 1
    else:
        params, config = our_model(**changes)
        work, per_work = partial(sample.generate, params, random_tokens(1, PROMPT), config, 50), 50
    quiet = repeated(work, 2, 7) / per_work
    with busy_core():
        beside = repeated(work, 2, 7) / per_work
    return {"s quiet": quiet, "s busy": beside, "x": beside / quiet}


# Whole processes

def start(name: str) -> Figures:
    """Seconds from the start of a process until it has written its first token, or has read the file."""
    import torch

    import gpt
    import train
    from weights import Checkpoint, save_checkpoint
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pth")
        params = gpt.init_params(gpt.GPT_CONFIG_124M, torch.Generator().manual_seed(0))
        save_checkpoint(path, Checkpoint(params, gpt.GPT_CONFIG_124M, train.init_optimizer(params)))
        length = len("Every effort moves you") + 1
        read = f"import torch; open({str(path)!r}, 'rb').read(); print(' ' * {length}, flush=True)"
        command = [str(ROOT / "sample.py"), "--weights", str(path)] if name == "ours-sample" else ["-c", read]
        return {"s": repeated(partial(read_output, [sys.executable, *command], length), 1, 3)}


def read_output(command: list[str], length: int) -> None:
    """Starts a process, reads so many bytes of what it prints, and ends it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = process.stdout.read(length)
        process.kill()
    if len(printed) < length:
        raise RuntimeError(f"{command} ended after {printed!r}")


def split(name: str) -> Figures:
    """Seconds for a training step of 8 x 256 tokens: by what an epoch over four stories takes longer than over one."""
    import gpt
    import train
    launcher, per_process = {"ours-one": ([], "2"),
                             "ours-two": (["-m", "torch.distributed.run", "--nproc-per-node", "2"], "1")}[name]

    def epoch(stories: int) -> tuple[float, int]:
        data = (str(STORY),) * stories
        settings = train.Settings(data=data, batch_size=8)
        steps = train.make_run(train.read_text(data), gpt.GPT_CONFIG_124M, settings).steps_per_epoch
        command = [sys.executable, *launcher, str(ROOT / "train.py"), "--data", *data, "--batch-size", "8",
                   "--eval-iter", "1", "--eval-freq", "1000", "--epochs", "1"]
        return in_new_folder(command, OMP_NUM_THREADS=per_process), steps
    (short, few), (long, many) = epoch(1), epoch(4)
    return {"s": (long - short) / (many - few)}


def in_new_folder(command: list[str], **environment: str) -> float:
    """The seconds that a command takes in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
        return time.perf_counter() - begin


def peak_gigabytes(who: int) -> float:
    """The peak memory of this process or of its largest child, as Linux tells it: in units of 1024 bytes."""
    return resource.getrusage(who).ru_maxrss * 1024 / 1e9


def corpus(_name: str) -> Figures:
    """Seconds from a text of 100 MB in a file to its windows, and the process's peak memory."""
    import gpt
    import train
    words = STORY.read_text(encoding="utf-8").split(" ")
    draw = random.Random(0)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        while file.tell() < 10**8:
            file.write(" ".join(draw.choices(words, k=10**5)) + "\n")
        file.flush()
        begin = time.perf_counter()
        train.make_run(train.read_text([file.name]), gpt.GPT_CONFIG_124M, train.Settings(data=(file.name,)))
        return {"s": time.perf_counter() - begin, "GB": peak_gigabytes(resource.RUSAGE_SELF)}


def section_5_2(name: str) -> Figures:
    """Seconds for the whole of section 5.2, and the process's peak memory."""
    by_book = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import compare; compare.book_run()"
    ours = [str(ROOT / "train.py"), "--data", str(STORY), "--dtype"]
    command = {"ours-fp32": [*ours, "float32"], "ours-bf16": [*ours, "bfloat16"], "book": ["-c", by_book]}[name]
    return {"s": in_new_folder([sys.executable, *command]), "GB": peak_gigabytes(resource.RUSAGE_CHILDREN)}


def book_run() -> None:
    """What section 5.2 does and `python train.py` does, by the chapter's package."""
    import torch
    from llms_from_scratch import ch05
    from llms_from_scratch.ch02 import GPTDatasetV1

    import sample
    torch.manual_seed(123)
    model, tokenizer = book_model(), sample.gpt2_tokenizer()
    text = STORY.read_text(encoding="utf-8")
    middle = int(0.9 * len(text))
    parts = [GPTDatasetV1(part, tokenizer, 256, 256) for part in (text[:middle], text[middle:])]
    train_loader, val_loader = (torch.utils.data.DataLoader(part, batch_size=2, shuffle=first, drop_last=first)
                                for part, first in zip(parts, (True, False), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    train_losses, val_losses, tokens_seen = ch05.train_model_simple(
        model, train_loader, val_loader, optimizer, torch.device("cpu"), num_epochs=10, eval_freq=5, eval_iter=5,
        start_context="Every effort moves you", tokenizer=tokenizer)
    ch05.plot_losses(torch.linspace(0, 10, len(train_losses)), tokens_seen, train_losses, val_losses)
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, "model.pth")


# The comparison

class Kind(NamedTuple):
    """Figures for the name of a contestant, and the contestants. Those of this project are called ours-something."""
    measure: Callable[[str], Figures]
    contestants: list[str]


KINDS = {
    "train": Kind(training_step, ["ours-fp32", "ours-bf16", "floor", "book", "book-fused", "book-fast-fused",
                                  "hf-fused", "book-fused-bf16"]),
    "decode": Kind(decode, ["ours-fp32", "ours-bf16", "book", "hf-fp32", "hf-bf16", "ct2-fp32", "ct2-int8",
                            "openvino-fp32", "openvino-int8", "read-fp32"]),
    "rows": Kind(rows, ["ours-1", "ours-8"]),
    "growth": Kind(growth, ["ours-100th", "ours-900th"]),
    "prompt": Kind(prompt, ["ours-fp32", "hf-fp32"]),
    "past": Kind(past, ["ours-past", "ours-before", "ours-prompt"]),
    "busy": Kind(busy, ["ours-token-small", "ours-token-124M", "ours-step-small", "ours-step-124M"]),
    "start": Kind(start, ["ours-sample", "import-and-read"]),
    "split": Kind(split, ["ours-one", "ours-two"]),
    "corpus": Kind(corpus, ["ours"]),
    "run": Kind(section_5_2, ["ours-fp32", "ours-bf16", "book"]),
    "gpu-step": Kind(gpu_step, ["ours", "book", "hf", "ours-no-dropout", "book-no-dropout", "hf-no-dropout"]),
    "gpu-token": Kind(partial(decode, device="cuda"), ["ours-fp32", "ours-bf16", "hf-fp32", "hf-bf16"]),
}


def measure_one(kind: str, name: str) -> None:
    """Prints the figures of one contestant: this process is its own."""
    if name.startswith("ours") and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as both scripts do
    print(json.dumps(KINDS[kind].measure(name)))


def measure_all(kind: str, names: list[str], rounds: int, openvino_python: str | None) -> dict[str, list[Figures]]:
    """The figures of each round, under the names of the contestants."""
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            python = openvino_python if openvino_python and name.startswith("openvino") else sys.executable
            done = subprocess.run([python, __file__, kind, "--one", name], capture_output=True, text=True)
            if done.returncode == 0:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                print(f"{name} failed: {done.stderr}", file=sys.stderr)
    return {name: figures for name, figures in found.items() if figures}


def describe_machine() -> str:
    """The processor, what of it PyTorch uses, and PyTorch."""
    import torch
    told = {}
    with suppress(OSError):
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
        told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines.splitlines())}
    model = told.get("Model name") or platform.processor() or platform.machine()
    return (f"{model} (family {told.get('CPU family', '?')}, model {told.get('Model', '?')}), "
            f"{torch.backends.cpu.get_cpu_capability()}, threads: {threads()}, torch {torch.__version__}")


def report(found: dict[str, list[Figures]]) -> None:
    """Prints each contestant's medians, and behind this project's seconds their ratios to the others'."""
    medians = {name: {unit: statistics.median(figures[unit] for figures in rounds) for unit in rounds[0]}
               for name, rounds in found.items()}
    for name, figures in medians.items():
        columns = [f"{value:10.4g} {unit}" for unit, value in figures.items()]
        ratios = [f"{figures['s'] / other['s']:.2f} x {peer}" for peer, other in medians.items()
                  if name.startswith("ours") and peer != name and "s" in figures]
        print(f"{name:16s}", *columns, *ratios, sep="  ")


def main() -> None:
    """Runs the contestants in turn and prints what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contestants alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--env", nargs="+", default=[], metavar="NAME=VALUE", help="in the environment of all of them")
    parser.add_argument("--openvino-python", metavar="PATH", help="the Python of OpenVINO's environment, see above")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure_one(args.kind, args.one)
        return
    names = args.only or KINDS[args.kind].contestants
    for name in names:
        if name not in KINDS[args.kind].contestants:
            parser.error(f"{args.kind} has no {name}: choose from {', '.join(KINDS[args.kind].contestants)}")
    without = [name for name in names if name.startswith("openvino") and not args.openvino_python]
    if without:
        print(f"{', '.join(without)}: left out, because there is no --openvino-python", file=sys.stderr)
    settings = {"OMP_NUM_THREADS": str(args.threads), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    for pair in args.env:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            parser.error(f"--env takes NAME=VALUE, not {pair!r}")
        settings[name] = value
    with tempfile.TemporaryDirectory() as folder:  # what the contestants leave behind goes with it
        os.environ.update(settings | {"TMPDIR": folder})
        print(describe_machine(), *args.env, sep=", ", flush=True)
        report(measure_all(args.kind, [name for name in names if name not in without], args.rounds,
                           args.openvino_python))


if __name__ == "__main__":
    main()
