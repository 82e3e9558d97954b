"""Times this project beside what its users would pick instead: `python bench/compare.py KIND`

    train     a training step of GPT-2 124M, 2 x 256 tokens, dropout 0.1. `floor` is its bare matrix products, each by
              the faster of MKL and oneDNN: what no step can do without
    decode    a token of one sequence: 200 after a prompt of 8, drawn with top-k 50. `read` adds up the float32 weights
    run       the whole of section 5.2, from the start of the process to its end, and its peak memory
    corpus    a text of 100 MB in a file to windows, and the peak memory of the process
    versions  a step and a token by this checkout beside another: `python bench/compare.py versions FOLDER`

All models have random weights. The peers come from the package registry, and one that is not there is left out.
OpenVINO needs another transformers, so it gets an environment of its own, in which torchvision would stop the import.

    pip install transformers==5.24.0 ctranslate2==4.8.5 && pip install --no-deps llms-from-scratch==1.0.19
    python -m venv ov && ov/bin/pip install torch==2.13.0 optimum==2.3.0 "optimum-intel[openvino]==2.2.0" tiktoken
    ov/bin/pip uninstall -y torchvision && python bench/compare.py decode --openvino-python ov/bin/python

Each contestant runs in a process of its own, in turn (A B C, then C B A, ...), so that a drift of the machine's speed
hits all alike. Read the ratios rather than the times. Nothing else should run on the machine meanwhile.
"""
import argparse
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, os.getenv("CHECKOUT", str(Path(__file__).resolve().parents[1])))  # CHECKOUT: of `versions`

import gpt
import sample
import train

ROOT, FOLDER = Path(__file__).resolve().parents[1], Path(tempfile.gettempdir())  # FOLDER: for converted models
BATCH, LENGTH, PROMPT, NEW = 2, 256, 8, 200  # windows and tokens of a step; tokens of a prompt, and those after it
Work = Callable[[], object]
Figures = dict[str, float]  # each under its unit; s and ms are compared


def median_seconds(work: Work, warmup: int, repeats: int) -> float:
    """The median seconds that the work takes, once warm."""
    return statistics.median(timeit.repeat(work, number=1, repeat=warmup + repeats)[warmup:])


def random_tokens(*shape: int) -> torch.Tensor:
    """Always the same token ids."""
    return torch.randint(0, 50257, shape, generator=torch.Generator().manual_seed(0))


def seconds_and_peak(start: float, who: int) -> Figures:
    """The seconds since `start`, and the peak memory, which Linux counts in units of 1024 bytes."""
    return {"s": time.perf_counter() - start, "GB": resource.getrusage(who).ru_maxrss * 1024 / 1e9}


# A training step
def step(make_work: Callable[..., Work], *arguments: object) -> Figures:
    units = torch.cpu.get_capabilities()
    if "bfloat16" in arguments and not (units.get("avx512_bf16") or units.get("amx_bf16")):
        raise SystemExit("without instructions for bfloat16 a step takes many times longer")
    return {"s": median_seconds(make_work(*arguments), 2, 5)}


def our_step(dtype: str) -> Work:
    train.tune_allocator()
    config, generator = gpt.GPT_CONFIG_124M, torch.Generator().manual_seed(123)
    params, tokens = gpt.init_params(config, generator), random_tokens(BATCH, LENGTH + 1)
    opt_state = train.init_optimizer(params)

    def work() -> None:
        nonlocal params, opt_state
        params, opt_state, loss = train.train_step(params, opt_state, tokens[:, :-1], tokens[:, 1:], config, generator,
                                                   dtype=getattr(torch, dtype))
        loss.item()
    return work


def peer_step(make_model: Callable[[], torch.nn.Module], fused: bool, dtype: str = "float32") -> Work:
    """The training step of a module."""
    model, tokens = make_model(), random_tokens(BATCH, LENGTH + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=fused)

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            output = model(tokens[:, :-1])
            logits = getattr(output, "logits", output)  # transformers has them in an object
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        loss.item()
    return work


def book_model() -> torch.nn.Module:
    from llms_from_scratch.ch04 import GPTModel
    return GPTModel(asdict(gpt.GPT_CONFIG_124M))


def hf_model(length: int = LENGTH) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(n_positions=length)).train()  # its dropout is 0.1, too


def matrix_products() -> Work:
    """All that a training step multiplies by its linear layers: the product and the two gradients of each."""
    train.tune_allocator()
    libraries = [torch.nn.functional.linear, *[gpt.onednn_product] * gpt.ONEDNN]  # the first one takes MKL
    products = []
    for name, shape in gpt.param_shapes(gpt.GPT_CONFIG_124M).items():
        if len(shape) == 2 and name not in gpt.EMBEDDINGS:
            weight, gradient, x = torch.randn(shape), *(torch.randn(BATCH * LENGTH, size) for size in shape)
            # The layer's product, the gradient of its input, and the one of its weight, each as a b^T.
            for a, b in ((x, weight), (gradient, weight.t()), (gradient.t(), x.t())):
                works = [partial(library, a, b, None) for library in libraries]
                products.append(min(works, key=lambda work: median_seconds(work, 1, 5)))
    return lambda: [product() for product in products]


# A token
def token(make_work: Callable[..., Work], *arguments: object) -> Figures:
    work = make_work(*arguments)
    with torch.inference_mode():
        return {"ms": median_seconds(work, 1, 3) / NEW * 1000}


def our_tokens(dtype: str) -> Work:
    config = replace(gpt.GPT_CONFIG_124M, context_length=1024, drop_rate=0.0, qkv_bias=True)  # OpenAI's
    generator = torch.Generator().manual_seed(0)
    params = gpt.map_params(lambda tensor: tensor.to(getattr(torch, dtype)), gpt.init_params(config, generator))
    return partial(sample.generate, params, random_tokens(1, PROMPT), config, NEW, temperature=1.0, top_k=50,
                   generator=generator)


def hf_tokens(make_model: Callable[[], torch.nn.Module]) -> Work:
    """The generation of transformers, which drives OpenVINO's model too."""
    return partial(make_model().generate, random_tokens(1, PROMPT), max_new_tokens=NEW, min_new_tokens=NEW,
                   do_sample=True, top_k=50, pad_token_id=0)


def hf_folder() -> str:
    """A folder with the model of transformers and a tokenizer, to be converted. It is made once."""
    folder, end = FOLDER / "gpt2", "<|endoftext|>"
    if not folder.exists():
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50256)} | {end: 50256}, unk_token=end))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token=end, bos_token=end,
                                eos_token=end).save_pretrained(folder)
        hf_model(1024).save_pretrained(folder)
    return str(folder)


def ct2_tokens(dtype: str) -> Work:
    import ctranslate2
    folder = FOLDER / f"ct2-{dtype}"
    if not folder.exists():
        ctranslate2.converters.TransformersConverter(hf_folder()).convert(str(folder), quantization=dtype)
    engine = ctranslate2.Generator(str(folder), compute_type=dtype, intra_threads=torch.get_num_threads())
    return partial(engine.generate_batch, [[f"w{i}" for i in range(PROMPT)]], max_length=NEW, min_length=NEW,
                   sampling_topk=50, include_prompt_in_result=False)


def openvino_model(dtype: str) -> torch.nn.Module:
    from optimum.intel import OVModelForCausalLM
    folder = FOLDER / f"openvino-{dtype}"
    if not folder.exists():
        OVModelForCausalLM.from_pretrained(hf_folder(), export=True, load_in_8bit=dtype == "int8",
                                           compile=False).save_pretrained(folder)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": "f32"} if dtype == "float32" else {}  # else bfloat16 where there are units
    torch.set_num_threads(1)  # torch only draws the token: more of its threads would be in the way of OpenVINO's
    return OVModelForCausalLM.from_pretrained(folder, ov_config=settings)


def read_weights() -> Work:
    """Adds up as many float32 numbers as NEW tokens read, one token after the other."""
    shapes = gpt.param_shapes(gpt.GPT_CONFIG_124M)
    weights = torch.ones(sum(math.prod(shape) for name, shape in shapes.items() if name not in gpt.EMBEDDINGS))
    return lambda: [weights.sum() for _ in range(NEW)]


# Whole processes
def run(*command: str) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return seconds_and_peak(start, resource.RUSAGE_CHILDREN)


def book_run() -> None:
    """What `python train.py` does, by the chapter's package: section 5.2, the picture, and a file."""
    from llms_from_scratch import ch05
    from llms_from_scratch.ch02 import GPTDatasetV1
    torch.manual_seed(123)
    model, tokenizer, text = book_model(), sample.gpt2_tokenizer(), train.read_text([])
    middle = int(0.9 * len(text))
    train_loader, val_loader = (torch.utils.data.DataLoader(
        GPTDatasetV1(part, tokenizer, LENGTH, LENGTH), batch_size=BATCH, shuffle=first, drop_last=first)
        for part, first in ((text[:middle], True), (text[middle:], False)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    train_losses, val_losses, tokens_seen = ch05.train_model_simple(
        model, train_loader, val_loader, optimizer, torch.device("cpu"), num_epochs=10, eval_freq=5, eval_iter=5,
        start_context="Every effort moves you", tokenizer=tokenizer)
    ch05.plot_losses(torch.linspace(0, 10, len(train_losses)), tokens_seen, train_losses, val_losses)
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, "model.pth")


def corpus() -> Figures:
    with tempfile.NamedTemporaryFile() as file:
        file.write((ROOT / "the-verdict.txt").read_bytes() * 4900)
        file.flush()
        start = time.perf_counter()
        train.make_run(train.read_text([file.name]), gpt.GPT_CONFIG_124M, train.Settings(data=(file.name,)))
        return seconds_and_peak(start, resource.RUSAGE_SELF)


# The comparison
IMPORT = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import compare; "  # in a new process
WORKS = {"step-fp32": partial(step, our_step, "float32"), "step-bf16": partial(step, our_step, "bfloat16"),
         "token-fp32": partial(token, our_tokens, "float32"), "token-bf16": partial(token, our_tokens, "bfloat16")}
KINDS: dict[str, dict[str, Callable[[], Figures]]] = {  # what measures each contestant; this project's are ours-...
    "train": {"ours-fp32": WORKS["step-fp32"], "ours-bf16": WORKS["step-bf16"], "floor": partial(step, matrix_products),
              "book": partial(step, peer_step, book_model, False),
              "book-fused": partial(step, peer_step, book_model, True),
              "book-fused-bf16": partial(step, peer_step, book_model, True, "bfloat16"),
              "hf-fused": partial(step, peer_step, hf_model, True)},
    "decode": {"ours-fp32": WORKS["token-fp32"], "ours-bf16": WORKS["token-bf16"],
               "hf-fp32": partial(token, hf_tokens, lambda: hf_model(1024).eval()),
               "hf-bf16": partial(token, hf_tokens, lambda: hf_model(1024).eval().bfloat16()),
               "ct2-fp32": partial(token, ct2_tokens, "float32"), "ct2-int8": partial(token, ct2_tokens, "int8"),
               "openvino-fp32": partial(token, hf_tokens, partial(openvino_model, "float32")),
               "openvino-int8": partial(token, hf_tokens, partial(openvino_model, "int8")),
               "read": partial(token, read_weights)},
    "run": {"ours": partial(run, str(ROOT / "train.py"), "--device", "cpu"),
            "book": partial(run, "-c", f"{IMPORT}compare.book_run()")},
    "corpus": {"ours": corpus},
    "versions": {f"{whose}-{what}": work for what, work in WORKS.items() for whose in ("ours", "other")},
}


def measured(name: str, args: argparse.Namespace, folder: str) -> list[Figures]:
    """The figures of a contestant, from a process of its own; none if it fails. They are printed at once."""
    python = args.openvino_python if name.startswith("openvino") else sys.executable
    spin = {"GOMP_SPINCOUNT": "10000"} if name.startswith(("ours", "other")) else {}  # as both scripts set it
    environment = {"OMP_NUM_THREADS": "2"} | spin | os.environ | {"TMPDIR": folder, "HF_HUB_OFFLINE": "1"}
    environment |= {"CHECKOUT": args.checkout} if name.startswith("other") else {}
    command = [python, "-P", "-c", f"{IMPORT}print(json.dumps(compare.KINDS[{args.kind!r}][{name!r}]()))"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{name:16s}  left out: {(done.stderr.splitlines() or ['no reason'])[-1]}", flush=True)
        return []
    figures = json.loads(done.stdout.splitlines()[-1])
    print(line(name, figures), flush=True)
    return [figures]


def line(name: str, figures: Figures, *ratios: str) -> str:
    return "  ".join([f"{name:16s}", *(f"{value:8.4g} {unit}" for unit, value in figures.items()), *ratios])


def main() -> None:
    """Prints what each contestant took, and then the medians and the ratios of this project's to the others'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("checkout", nargs="?", default="FOLDER", help="the folder of another checkout, for `versions`")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contestants alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--openvino-python", metavar="PATH", default=sys.executable, help="see above")
    args = parser.parse_args()
    processor = re.findall(r"(?m)^(?:cpu family|model|model name)\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(*processor[:3], torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}", sep=", ", flush=True)
    found: dict[str, list[Figures]] = {name: [] for name in args.only or KINDS[args.kind]}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name in list(found)[::(-1) ** number]:
                found[name] += measured(name, args, folder)
                if not found[name]:
                    del found[name]
    medians = {name: {unit: statistics.median(each[unit] for each in every) for unit in every[0]}
               for name, every in found.items()}
    print("Medians:")
    for name, figures in medians.items():
        ratios = (f"{figures[unit] / other[unit]:.2f} x {peer}" for peer, other in medians.items()
                  for unit in {"s", "ms"} & figures.keys() & other.keys() if name.startswith("ours") and peer != name)
        print(line(name, figures, *ratios))


if __name__ == "__main__":
    main()
