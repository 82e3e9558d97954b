"""Times this project beside what its users would pick instead, in one run: `python bench/compare.py KIND`

    train    one training step, GPT-2 124M, 2 x 256 tokens, dropout 0.1
    decode   one sequence, 200 new tokens, top-k 50; read-fp32 reads the bytes that a float32 token needs, and adds them
    rows     8 sequences together beside one, seconds for each token of each
    growth   the 900th new token beside the 100th
    prompt   a prompt of 1000 tokens and the token after it
    start    `python sample.py` until its first token, beside `import torch` and reading the file
    split    a step of 8 x 256 tokens by two processes with a core each, beside one process with both
    corpus   reading and tokenizing a text of 100 MB, and the process's peak memory
    run      the whole of section 5.2, from the start of the process to its end, and its peak memory

The peers come from the package registry:

    pip install --no-deps llms-from-scratch==1.0.19
    pip install transformers ctranslate2

Every contestant runs in a process of its own, in turn (A B C, A B C, ...), on two threads, so that a drift of the
machine's speed hits all alike. Read the ratios rather than the times. Nothing else should run on the machine meanwhile.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
THREADS = os.environ.get("BENCH_THREADS", "2")
NEW, PROMPT = 200, 8  # tokens, in `decode` and `rows`
CONTESTANTS = {
    "train": ["ours-fp32", "ours-bf16", "book", "book-fused", "book-fast-fused", "hf-fused", "book-fused-bf16"],
    "decode": ["ours-fp32", "ours-bf16", "book", "hf-fp32", "hf-bf16", "ct2-fp32", "ct2-int8", "read-fp32"],
    "rows": ["ours-1", "ours-8"],
    "growth": ["ours-100th", "ours-900th"],
    "prompt": ["ours-fp32", "hf-fp32"],
    "start": ["ours-sample", "import-and-read"],
    "split": ["ours-one", "ours-two"],
    "corpus": ["ours"],
    "run": ["ours-fp32", "ours-bf16", "book"],
}
Work = Callable[..., object]


def repeated(work: Work, warmup: int, repeats: int) -> float:
    """The median seconds that the work takes, once warm."""
    def seconds() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    return statistics.median([seconds() for _ in range(warmup + repeats)][warmup:])


def train(name: str) -> float:
    """Seconds for a training step."""
    import torch
    import torch.nn.functional as F
    torch.manual_seed(0)
    x, y = torch.randint(0, 50257, (2, 256)), torch.randint(0, 50257, (2, 256))
    bf16 = name.endswith("bf16")
    if name.startswith("ours"):
        import gpt
        import train
        train.tune_allocator()
        generator = torch.Generator().manual_seed(123)
        params = gpt.init_params(gpt.GPT_CONFIG_124M, generator)
        state = [params, train.init_optimizer(params)]

        def step() -> None:
            state[0], state[1], loss = train.train_step(*state, x, y, gpt.GPT_CONFIG_124M, generator,
                                                        dtype=torch.bfloat16 if bf16 else torch.float32)
            loss.item()
        return repeated(step, 2, 5)
    if name.startswith("book"):
        model = book_model(fast="fast" in name)
        loss_of = lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    else:
        from transformers import GPT2Config, GPT2LMHeadModel
        model = GPT2LMHeadModel(GPT2Config(n_positions=256)).train()
        loss_of = lambda: model(input_ids=x, labels=y).loss  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused="fused" in name)

    def peer_step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        loss.item()
    return repeated(peer_step, 2, 5)


def book_model(fast: bool = False, **changes: object) -> Any:
    """The model of the chapter's package, in its training configuration but for the changes."""
    from llms_from_scratch.ch04 import GPTModel, GPTModelFast

    import gpt
    return (GPTModelFast if fast else GPTModel)({**asdict(gpt.GPT_CONFIG_124M), **changes})


def ours(dtype: str = "float32") -> tuple[Any, Any, Work]:
    """Parameters of OpenAI's 124M shape, their configuration, and our generate."""
    import torch

    import gpt
    import sample
    config = replace(gpt.GPT_CONFIG_124M, context_length=1024, drop_rate=0.0, qkv_bias=True)
    params = gpt.init_params(config, torch.Generator().manual_seed(0))
    return gpt.cast(params, getattr(torch, dtype)), config, sample.generate


def decode(name: str) -> float:
    """Seconds for a new token of one sequence, drawn with top-k 50."""
    import torch
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (1, PROMPT))
    if name == "read-fp32":
        from gpt import EMBEDDINGS
        count = sum(tensor.numel() for key, tensor in ours()[0].items() if key not in EMBEDDINGS)
        weights = torch.ones(count)
        return repeated(lambda: weights.sum(), 2, 20)
    if name.startswith("ours"):
        params, config, generate = ours("bfloat16" if name.endswith("bf16") else "float32")
        generator = torch.Generator().manual_seed(1)
        work = lambda: generate(params, ids, config, NEW, temperature=1.0, top_k=50, generator=generator)  # noqa: E731
    elif name == "book":
        from llms_from_scratch.ch05 import generate
        model = book_model(context_length=1024, qkv_bias=True).eval()
        work = lambda: generate(model, ids, NEW, 1024, temperature=1.0, top_k=50)  # noqa: E731
    elif name.startswith("hf"):
        model = hf_model().bfloat16() if name.endswith("bf16") else hf_model()
        work = lambda: model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=50,  # noqa: E731
                                      pad_token_id=0)
    else:
        work = ctranslate2_work(name)
    with torch.inference_mode():
        return repeated(work, 1, 2) / NEW


def hf_model() -> Any:
    """The model of transformers, in OpenAI's 124M shape."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config()).eval()


def ctranslate2_work(name: str) -> Work:
    """CTranslate2's generation; the model is converted once and kept."""
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    kind = {"ct2-fp32": None, "ct2-int8": "int8"}[name]
    folder = os.path.join(tempfile.gettempdir(), "bench-" + name)
    if not os.path.isdir(folder):
        source = tempfile.mkdtemp()
        hf_model().save_pretrained(source)
        words = {f"w{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
        end = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(source)
        ctranslate2.converters.TransformersConverter(source).convert(folder, quantization=kind)
    engine = ctranslate2.Generator(folder, device="cpu", intra_threads=int(THREADS), inter_threads=1,
                                   compute_type=kind or "float32")
    prompt = [f"w{i}" for i in range(PROMPT)]
    return lambda: engine.generate_batch([prompt], max_length=NEW, min_length=NEW, sampling_topk=50,
                                         include_prompt_in_result=False)


def rows(name: str) -> float:
    """Seconds for a new token, of one sequence or of 8 together."""
    import torch
    count = int(name[-1])
    params, config, generate = ours()
    ids = torch.randint(0, 50257, (count, PROMPT), generator=torch.Generator().manual_seed(0))
    return repeated(lambda: generate(params, ids, config, NEW), 1, 2) / (NEW * count)


def growth(name: str) -> float:
    """Seconds for a new token: the median of the 20 around the 100th or the 900th of one sequence."""
    import torch

    import sample
    params, config, _ = ours()
    middle, times = int(name.split("-")[1][:-2]), [time.perf_counter()]
    for _ in sample.stream(params, torch.zeros(1, 1, dtype=torch.long), config, middle + 10):
        times.append(time.perf_counter())
    return statistics.median(end - start for start, end in zip(times[-21:-1], times[-20:], strict=True))


def prompt(name: str) -> float:
    """Seconds to read a prompt of 1000 tokens and choose the next."""
    import torch
    ids = torch.randint(0, 50257, (1, 1000), generator=torch.Generator().manual_seed(0))
    if name.startswith("ours"):
        params, config, generate = ours()
        return repeated(lambda: generate(params, ids, config, 1), 2, 5)
    model = hf_model()
    with torch.inference_mode():
        return repeated(lambda: model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0), 2, 5)


def start(name: str) -> float:
    """Seconds from the start of a process until it has written its first token, or has read the file."""
    import torch

    import gpt
    import train
    from weights import save_checkpoint
    path = Path(tempfile.gettempdir(), "bench-model.pth")
    if not path.exists():
        params = gpt.init_params(gpt.GPT_CONFIG_124M, torch.Generator().manual_seed(0))
        save_checkpoint(path, params, gpt.GPT_CONFIG_124M, train.init_optimizer(params))
    read = f"import torch; open({str(path)!r}, 'rb').read(); print(' ' * 99, flush=True)"
    command = [str(ROOT / "sample.py"), "--weights", str(path)] if name.startswith("ours") else ["-c", read]

    def until_first_token() -> float:
        begin = time.perf_counter()
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.read(len("Every effort moves you") + 1)
            seconds = time.perf_counter() - begin
            process.kill()
        return seconds
    return statistics.median([until_first_token() for _ in range(4)][1:])


def split(name: str) -> float:
    """Seconds for a training step of 8 x 256 tokens: by what an epoch over four stories takes longer than over one."""
    import train
    tokenizer = train.sample.gpt2_tokenizer()
    launcher, threads = (["-m", "torch.distributed.run", "--nproc-per-node", "2"], "1") if "two" in name else ([], "2")

    def epoch(stories: int) -> tuple[float, int]:
        data = [str(ROOT / "the-verdict.txt")] * stories
        steps = len(train.read_windows(train.Settings(data=data), tokenizer)[0]) // 8
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, *launcher, str(ROOT / "train.py"), "--data", *data, "--batch-size", "8",
                            "--eval-iter", "1", "--eval-freq", "1000", "--epochs", "1"], cwd=folder, check=True,
                           capture_output=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        return time.perf_counter() - begin, steps
    (short, few), (long, many) = epoch(1), epoch(4)
    return (long - short) / (many - few)


def corpus(_name: str) -> tuple[float, float]:
    """Seconds from a text of 100 MB in a file to its windows, and the process's peak memory in GB."""
    import random

    import train
    story = (ROOT / "the-verdict.txt").read_text(encoding="utf-8").split(" ")
    draw = random.Random(0)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        while file.tell() < 10**8:
            file.write(" ".join(draw.choices(story, k=10**5)) + "\n")
        file.flush()
        begin = time.perf_counter()
        train.read_windows(train.Settings(data=[file.name]), train.sample.gpt2_tokenizer())
        return time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run(name: str) -> tuple[float, float]:
    """Seconds for the whole of section 5.2, and the process's peak memory in GB."""
    command = [str(ROOT / "train.py"), "--data", str(ROOT / "the-verdict.txt"),
               "--dtype", "bfloat16" if name.endswith("bf16") else "float32"]
    if name == "book":
        command = [__file__, "run", "--one", "book-itself"]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def book_run() -> None:
    """Nothing: what section 5.2 does and `python train.py` does, by the chapter's package."""
    import torch
    from llms_from_scratch import ch05
    from llms_from_scratch.ch02 import GPTDatasetV1

    import sample
    torch.manual_seed(123)
    model, tokenizer = book_model(), sample.gpt2_tokenizer()
    text = (ROOT / "the-verdict.txt").read_text(encoding="utf-8")
    split = int(0.9 * len(text))
    parts = [GPTDatasetV1(part, tokenizer, 256, 256) for part in (text[:split], text[split:])]
    train, val = (torch.utils.data.DataLoader(part, batch_size=2, shuffle=first, drop_last=first)
                  for part, first in zip(parts, (True, False), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    train_losses, val_losses, tokens_seen = ch05.train_model_simple(
        model, train, val, optimizer, torch.device("cpu"), num_epochs=10, eval_freq=5, eval_iter=5,
        start_context="Every effort moves you", tokenizer=tokenizer)
    ch05.plot_losses(torch.linspace(0, 10, len(train_losses)), tokens_seen, train_losses, val_losses)
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, "model.pth")


def main() -> None:
    """Runs the contestants in turn and prints each one's median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CONTESTANTS)
    parser.add_argument("--only", nargs="+", help="these contestants alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one == "book-itself":
        return book_run()
    if args.one:
        measured = globals()[args.kind](args.one)
        return print(json.dumps(measured if isinstance(measured, tuple) else [measured]))
    names = args.only or CONTESTANTS[args.kind]
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            done = subprocess.run([sys.executable, __file__, args.kind, "--one", name], capture_output=True, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": THREADS, "TRANSFORMERS_VERBOSITY": "error"})
            try:
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
            except (IndexError, ValueError):
                print(f"{name}: failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)]
               for name, runs in found.items() if runs}
    for name, (seconds, *memory) in medians.items():
        ratios = "  ".join(f"{seconds / other[0]:.2f} x {peer}" for peer, other in medians.items() if peer != name)
        print(f"{name:16s}{seconds:10.4f} s" + "".join(f"{gigabytes:7.2f} GB" for gigabytes in memory) + f"  {ratios}")
    return None


if __name__ == "__main__":
    main()
