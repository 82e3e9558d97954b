"""Parameters in and out of files: our checkpoints, the chapter's, Hugging Face's, and the ones that OpenAI published.

A checkpoint is a value and a file holds a dict: `to_content` and `from_content` make one of the other. What is read is
checked before it is returned, and nothing in a file is ever run.
"""
import itertools
import json
import math
import os
import re
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import requests
import torch
from requests.exceptions import ProxyError, SSLError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from gpt import EMBEDDINGS, GPT_CONFIG_124M, QUERY_KEY_VALUE, Config, Params, distinct, map_params, param_shapes

PADDED_VOCABULARY = 50304  # nanoGPT's, a multiple of 64: no token has the last rows, which are cut off
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 4e-4, 0.1, (0.9, 0.999), 1e-8  # of AdamW in the chapter
GPT2_SETTINGS = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
# Our names for the parts of Hugging Face's names. What is missing here, c_attn, is query, key and value in one.
GPT2_NAMES = {"h.": "trf_blocks.", "wte.": "tok_emb.", "wpe.": "pos_emb.", "lm_head.": "out_head.",
              "ln_1.weight": "norm1.scale", "ln_1.bias": "norm1.shift", "ln_2.weight": "norm2.scale",
              "ln_2.bias": "norm2.shift", "ln_f.weight": "final_norm.scale", "ln_f.bias": "final_norm.shift",
              "attn.c_proj.": "att.out_proj.", "mlp.c_fc.": "ff.layers.0.", "mlp.c_proj.": "ff.layers.2."}
# Our names for the fields of OpenAI's hparams.json, Hugging Face's config.json and nanoGPT's model_args.
CONFIG_NAMES = {"n_vocab": "vocab_size", "vocab_size": "vocab_size", "n_ctx": "context_length",
                "n_positions": "context_length", "block_size": "context_length", "n_embd": "emb_dim",
                "n_head": "n_heads", "n_layer": "n_layers"}


class OptState(NamedTuple):
    """AdamW's state: its number of steps, and a running mean of each gradient and one of its square."""
    step: int
    exp_avg: Params
    exp_avg_sq: Params


class SavedRun(NamedTuple):
    """What a run goes on from, besides parameters and AdamW's state: see `Run` and `State` in train.py."""
    settings: dict[str, Any]
    fingerprint: str
    generator_state: Tensor
    order_seed: int | None
    evaluations: tuple[tuple[int, float, float], ...]


class Checkpoint(NamedTuple):
    """What a checkpoint file holds: a model, perhaps the state of its optimizer, and perhaps the rest of a run."""
    params: Params
    config: Config
    opt_state: OptState | None = None
    run: SavedRun | None = None


# Saving and loading (section 5.4)
def assign(left: Tensor, right: Any) -> Tensor:
    """`right` as a contiguous tensor of the shape of `left`; a ValueError names both shapes if they differ (5.5)."""
    given: Tensor = torch.as_tensor(right)
    if left.shape != given.shape:
        raise ValueError(f"shape mismatch: {tuple(left.shape)} is needed, {tuple(given.shape)} was given")
    return given.detach().contiguous()


def check_params(params: Params, config: Config) -> Params:
    """The parameters of `config`, in its order; a ValueError names one that is missing, unknown or misshapen.

    They are contiguous, where the chapter saves OpenAI's weights transposed. An output head that equals the token
    embedding is tied to it; in the chapter it is a copy.
    """
    needed, given = param_shapes(config), {name: tuple(tensor.shape) for name, tensor in params.items()}
    for name in sorted(needed.keys() | given.keys()):
        if needed.get(name) != given.get(name):
            raise ValueError(f"the shape of {name} is {given.get(name)}, and {needed.get(name)} is needed")
    checked = {name: params[name].detach().contiguous() for name in needed}
    if torch.equal(checked["out_head.weight"], checked["tok_emb.weight"]):
        checked["out_head.weight"] = checked["tok_emb.weight"]
    return checked


def to_content(checkpoint: Checkpoint) -> dict[str, Any]:
    """The dict that a file holds of a checkpoint: state_dicts of the chapter's model and of AdamW (section 5.4)."""
    params, config, opt_state, run = checkpoint
    # The chapter's model registers a causal mask in each block, and its load_state_dict wants them. A file holds one.
    mask = torch.ones(config.context_length, config.context_length, dtype=torch.float32).triu(1)
    masks = {f"trf_blocks.{i}.att.mask": mask for i in range(config.n_layers)}
    optimizer = {"optimizer_state_dict": adamw_state_dict(opt_state, run.settings if run else {})} if opt_state else {}
    progress = {"run": run._asdict()} if run else {}
    return {"model_state_dict": params | masks, "config": asdict(config)} | optimizer | progress


def from_content(content: dict[str, Any]) -> Checkpoint:
    """The checkpoint in such a dict, checked; a ValueError says what is wrong with it (section 5.4).

    The optimizer and the run may be missing. An optimizer that does not fit is left out, but a run needs its own.
    """
    state = {name: tensor for name, tensor in content["model_state_dict"].items() if not name.endswith(".att.mask")}
    config = Config(**content["config"])
    params, opt_state = check_params(state, config), None
    if "optimizer_state_dict" in content:
        opt_state = read_adamw(content["optimizer_state_dict"], {name: params[name] for name in state})
    if "run" in content and opt_state is None:
        raise ValueError("it holds a run without the state of its optimizer")
    return Checkpoint(params, config, opt_state, read_run(content["run"]) if "run" in content else None)


def adamw_state_dict(opt_state: OptState, settings: dict[str, Any]) -> dict[str, Any]:
    """A state_dict for torch.optim.AdamW, which knows a parameter by its number, in the order of the parameters."""
    pairs = zip(distinct(opt_state.exp_avg), distinct(opt_state.exp_avg_sq), strict=True)
    state = {number: {"step": torch.tensor(opt_state.step, dtype=torch.float32), "exp_avg": mean, "exp_avg_sq": squares}
             for number, (mean, squares) in enumerate(pairs)}
    group = {"lr": settings.get("lr", LEARNING_RATE), "betas": BETAS, "eps": EPS,
             "weight_decay": settings.get("weight_decay", WEIGHT_DECAY), "params": list(state)}
    return {"state": state, "param_groups": [group]}


def read_adamw(optimizer: Any, params: Params) -> OptState | None:
    """AdamW's state out of an optimizer's state_dict, for these parameters, which are in the optimizer's order.

    A state that does not fit them, or has several groups or step counts, is left out with a warning.
    """
    try:
        [group] = optimizer["param_groups"]
        entries = dict(zip(distinct(params), [optimizer["state"][key] for key in group["params"]], strict=True))
        [step] = {int(entry["step"]) for entry in entries.values()}
        return OptState(step, map_params(lambda tensor: assign(tensor, entries[tensor]["exp_avg"]), params),
                        map_params(lambda tensor: assign(tensor, entries[tensor]["exp_avg_sq"]), params))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        warnings.warn("its optimizer is not AdamW over these parameters in order: AdamW starts anew", stacklevel=2)
        return None


def read_run(run: Any) -> SavedRun:
    """The run that was saved; ValueError if a part is missing or is none."""
    try:
        generator, seed = torch.Generator(), run["order_seed"]
        generator.set_state(run["generator_state"])
        torch.Generator().manual_seed(0 if seed is None else seed)  # it can be one
        evaluations = tuple((int(step), float(train), float(val)) for step, train, val in run["evaluations"])
        return SavedRun(dict(run["settings"]), str(run["fingerprint"]), generator.get_state(), seed, evaluations)
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"its run is damaged or of another version: {type(error).__name__} {error}") from None


# GPT-2 as it was published (section 5.5)
def from_gpt2(given: Iterable[tuple[str, Tensor]]) -> Params:
    """Our parameters out of GPT-2's own, each with its name at Hugging Face: load_weights_into_gpt of section 5.5.

    GPT-2 keeps the weights of a block's linear layers as (in, out). The token embedding is also its output head: one
    tensor under two names, where the chapter makes a copy.
    """
    params: Params = {}
    for name, value in given:
        for theirs, ours in GPT2_NAMES.items():
            name = name.replace(theirs, ours)
        value = value.T if name.startswith("trf_blocks") and value.ndim == 2 else value  # (out, in)
        # c_attn is query, key and value, one below the other: now (3 E, E) or, of a bias, (3 E,).
        names = dict.fromkeys(name.replace("attn.c_attn.", f"att.{part}.") for part in QUERY_KEY_VALUE)  # three or one
        params |= zip(names, value.tensor_split(len(names)), strict=True)
    return {"out_head.weight": params["tok_emb.weight"]} | params


def load_openai(folder: str | Path) -> tuple[Params, Config]:
    """The parameters and the configuration in a folder of OpenAI's, a TensorFlow checkpoint (section 5.5).

    TensorFlow finds the newest checkpoint of the folder and compares each variable with its checksum. What is not the
    model's, such as an optimizer's variables, is left alone. ValueError if something is damaged or does not fit
    hparams.json, ImportError without tensorflow.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # without it tensorflow greets with a page of notices
    try:
        import tensorflow
    except Exception as error:  # a broken installation fails in a way of its own
        raise ImportError(f"tensorflow reads OpenAI's files, and can't be imported: {error}") from None
    try:
        reader = tensorflow.train.load_checkpoint(tensorflow.train.latest_checkpoint(folder) or f"{folder}/model.ckpt")
        # The largest first: while it is read, memory holds it twice.
        names = sorted(reader.get_variable_to_shape_map(), key=lambda name: name != "model/wte")
        given = ((huggingface_name(name), torch.as_tensor(reader.get_tensor(name)).squeeze(0))
                 for name in names if re.fullmatch(r"model/(.+/[wgb]|w[tp]e)", name))
        params = from_gpt2(given)  # a weight was (1, in, out)
        config = infer_config(params, our_names(json.loads(Path(folder, "hparams.json").read_bytes())))
        return check_params(params, config), config
    except (IndexError, KeyError, RuntimeError, ValueError, tensorflow.errors.OpError) as error:
        raise ValueError(f"OpenAI's model in {folder} can't be used: {str(error).splitlines()[0]}") from None


def huggingface_name(variable: str) -> str:
    """What Hugging Face calls a variable of OpenAI's: "h.0.attn.c_attn.weight" for "model/h0/attn/c_attn/w"."""
    name = re.sub(r"(w[tp]e)$", r"\1/w", variable.removeprefix("model/")).replace("/", ".")
    return re.sub(r"\.[wg]$", ".weight", re.sub(r"\.b$", ".bias", re.sub(r"^h(\d+)", r"h.\1", name)))


def our_names(stated: Any) -> dict[str, Any]:
    """A configuration, whoever wrote it, by the names in `Config`. What is none states nothing."""
    items: Iterable[tuple[str, Any]] = stated.items() if isinstance(stated, dict) else ()
    named = {CONFIG_NAMES.get(name, name): value for name, value in items}
    return named if "emb_dim" in named else {}


def infer_config(params: Params, stated: dict[str, Any], n_heads: int | None = None) -> Config:
    """The configuration of parameters of these shapes; ValueError if what is stated contradicts them.

    The shapes leave the number of heads open. Where it is not stated, it is n_heads, or a guess that a warning names.
    """
    if not params.keys() >= set(EMBEDDINGS):
        raise ValueError(f"there is no GPT-2 among its {len(params)} tensors")
    (vocab_size, emb_dim), (context_length, _) = (params[name].shape for name in EMBEDDINGS)
    n_layers = len({name.split(".")[1] for name in params if name.startswith("trf_blocks.")})
    heads = n_heads or stated.get("n_heads") or math.gcd(emb_dim, emb_dim // 64 or 1)  # one for each 64, if possible
    found = {"vocab_size": vocab_size, "context_length": context_length, "emb_dim": emb_dim, "n_heads": heads,
             "n_layers": n_layers, "qkv_bias": "trf_blocks.0.att.W_query.bias" in params}
    for name, value in (GPT2_SETTINGS | found).items():
        if stated.get(name) not in (None, value, PADDED_VOCABULARY):
            raise ValueError(f"its configuration states {name} {stated[name]}, where {value} is right")
    if not (n_heads or stated.get("n_heads")):
        warnings.warn(f"the file does not state its heads: {heads} are assumed, --n-heads changes it", stacklevel=2)
    return Config(**{"drop_rate": stated.get("drop_rate", GPT_CONFIG_124M.drop_rate)} | found)


# ---- The chapter ends here. What follows is about files: no half-written ones, other people's, and downloads. ----

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
OPENAI_FILES = ("hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001")
PAUSES = (1, 2, 4, 8, 16)  # seconds before each new attempt of a download that broke
MASKS = (".att.mask", ".attn.bias", ".attn.masked_bias")  # the chapter's and Hugging Face's
# The names of a model's parameters, ours or Hugging Face's, after whatever stands before them.
PARAMETER = re.compile(r"(?:^|\.)((?:tok_emb|pos_emb|trf_blocks|final_norm|out_head|wte|wpe|h|ln_f|lm_head)\..+)")


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a file for `load_checkpoint` and the chapter's code; OSError if it can't be written (section 5.4)."""
    content = to_content(checkpoint)
    with write_atomically(path) as file:
        torch.save(content, file)


@contextmanager
def write_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into, which replaces the one at `path` when all of it is on the disk. OSError if that fails.

    At every instant the file is the old one or the new one, whole. A symbolic link stays: its target is replaced.
    """
    unfinished = Path(f"{os.path.realpath(path)}.partial")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, os.path.realpath(path))
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of what the disk says
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path} can't be written: {cause}") from None
    finally:
        with suppress(OSError):  # it is not there any more, or never came to be
            unfinished.unlink()


def load_checkpoint(path: str | Path, n_heads: int | None = None) -> Checkpoint:
    """What a file holds: ours, the chapter's, Hugging Face's or nanoGPT's, or a folder of Hugging Face's (section 5.4).

    n_heads is for a file that does not state its heads. Tensors are mapped where that is possible: read from the disk
    when they are used. To replace the file, as our saving does, is safe; to write into it changes the loaded tensors.
    OSError if it can't be read, ValueError with the reason if it can't be used.
    """
    path = Path(path)
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin")) or [path]
    try:
        content = {name: value for file in files for name, value in read_tensors(file).items()}
        return from_content(as_ours(content, files[0].parent, n_heads))
    except ValueError as error:
        raise ValueError(f"nothing was loaded from {path}: {error}") from None


def read_tensors(path: Path) -> dict[str, Any]:
    """What torch.save or safetensors wrote into a file, without running anything in it. OSError or ValueError."""
    with open(path, "rb") as file:
        start = file.read(9)
    is_zip = start[:2] == b"PK"  # before 2020 it was none
    try:
        if start[8:] == b"{":
            return load_file(path)
        if is_zip and (damaged := zipfile.ZipFile(path).testzip()):  # torch.load does not look at the checksums
            raise ValueError(f"the checksum of {damaged} in it is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip))
    except Exception as error:  # whatever a foreign file makes the readers stumble over
        words, objects = f"{type(error).__name__} {error}".split("\n")[0], re.findall(r"GLOBAL (\S+)", str(error))
        is_told = isinstance(error, (MemoryError, OSError, RuntimeError))  # for example that memory is short
        raise ValueError(words if is_told else f"it is damaged, or holds more than tensors: {objects}") from None


def as_ours(content: dict[str, Any], folder: Path, n_heads: int | None) -> dict[str, Any]:
    """The content of anyone's file as `from_content` wants it; ValueError without a GPT-2. It lies in `folder`."""
    holders = [content.get(key) for key in ("model_state_dict", "state_dict", "model", "module")] + [content]
    stated = our_names(content.get("model_args", content.get("config")))
    given, others = {}, []
    for name, tensor in next(holder for holder in holders if isinstance(holder, dict)).items():
        if isinstance(tensor, Tensor) and tensor.ndim and tensor.is_floating_point() and not str(name).endswith(MASKS):
            if (parameter := PARAMETER.search(str(name))) and parameter[1] not in given:
                given[parameter[1]] = tensor
            else:
                others.append(name)
    if "wte.weight" in given:
        given, path = from_others(given, folder), folder / "config.json"
        stated = {"drop_rate": 0.0} | stated | our_names(json.loads(path.read_bytes()) if path.exists() else {})
    config = infer_config(given, stated, n_heads)
    if others:
        warnings.warn(f"{others} are no part of GPT-2, or in it twice, and are left out", stacklevel=2)
    return content | {"model_state_dict": given, "config": asdict(config)}


def from_others(given: Params, folder: Path) -> Params:
    """Our parameters out of a file of Hugging Face's or nanoGPT's; ValueError if they are not GPT-2's."""
    for path in (folder / name for name in ("vocab.json", "encoder.json", "tokenizer.json")):
        if path.exists() and not re.search(rb'"(\\u0120|\xc4\xa0)the": ?262\b', path.read_bytes()):  # " the"
            raise ValueError(f"the vocabulary beside it, {path}, is not GPT-2's")
    bias = given.get("h.0.attn.c_attn.bias")
    if bias is None:
        raise ValueError("its linear layers have no biases, and GPT-2's have")
    if given.get("h.0.attn.c_attn.weight", bias).shape[:1] == bias.shape:  # nanoGPT's, already (out, in)
        given |= {name: tensor.T for name, tensor in given.items() if name.startswith("h.") and tensor.ndim == 2}
    given |= {name: given[name][:GPT_CONFIG_124M.vocab_size] for name in ("wte.weight", "lm_head.weight")
              if given.get(name, bias).shape[:1] == (PADDED_VOCABULARY,)}
    return from_gpt2(given.items())


def load_model(name: str | Path, n_heads: int | None = None, size: str = "124M", models_dir: str | Path = "gpt2",
               base_url: str = OPENAI_URL) -> Checkpoint:
    """The model of that name, for GPT-2's tokens: `openai`, a file, or a folder of Hugging Face's or of OpenAI's."""
    path = download_openai(size, models_dir, base_url) if name == "openai" else Path(name)
    loaded = load_kept(path) if (path / OPENAI_FILES[0]).is_file() else load_checkpoint(path, n_heads)
    if loaded.config.vocab_size != GPT_CONFIG_124M.vocab_size:
        raise ValueError(f"{name} has {loaded.config.vocab_size} tokens, and GPT-2 {GPT_CONFIG_124M.vocab_size}")
    return loaded


def load_kept(folder: Path) -> Checkpoint:
    """OpenAI's model in a folder. It is kept there in converted.pth, which is read while that is the newest file."""
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_ctime_ns)  # its ctime shows that a file was replaced
    with suppress(OSError, ValueError):  # it is damaged, or can't be read: make it again
        if newest.name == "converted.pth":
            return load_checkpoint(newest)
    made = Checkpoint(*load_openai(folder))
    with suppress(OSError):  # a folder that can't be written to costs time at the next start, nothing else
        save_checkpoint(folder / "converted.pth", made)
    return made


def download_openai(size: str, models_dir: str | Path = "gpt2", base_url: str = OPENAI_URL) -> Path:
    """The folder models_dir/size, after fetching into it what it lacks of OpenAI's checkpoint (section 5.5).

    An unfinished download stays as .partial, where the next attempt, also of another run, goes on. OSError if a file
    can't be fetched, with the reason and what to put where by hand.
    """
    folder = Path(models_dir, size)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pause in itertools.product(OPENAI_FILES, (*PAUSES, None)):
        try:
            if not (folder / name).exists():
                download(f"{base_url.rstrip('/')}/{size}/{name}", folder / name)
        except OSError as error:  # only a connection that broke, or a server's own error, is worth another attempt
            status = getattr(getattr(error, "response", None), "status_code", 500)
            is_lost = isinstance(error, requests.RequestException) and status >= 500
            if pause is None or not is_lost or isinstance(error, (ProxyError, SSLError, ValueError)):
                raise OSError(f"{name} can't be downloaded ({error}). By hand: put {', '.join(OPENAI_FILES)} of GPT-2 "
                              f"{size} into {folder}") from None
            time.sleep(pause)
    return folder


def download(url: str, path: Path) -> None:
    """Fetches a file in one attempt; it takes its name when it is whole. requests.RequestException if it breaks."""
    unfinished = Path(f"{path}.partial")
    # The last byte is fetched again, because a range that starts there is never empty.
    start = max(0, unfinished.stat().st_size - 1) if unfinished.exists() else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-", "x-ms-version": "2019-12-12"}  # for ranges
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416:  # there is more than the server's file has: the next run begins anew
            unfinished.unlink(missing_ok=True)
        response.raise_for_status()
        start = start if response.status_code == 206 else 0  # else the server sends the whole, whatever was asked
        length = start + int(response.headers.get("Content-Length", 0))
        with open(unfinished, "r+b" if start else "wb") as file, tqdm(
                desc=path.name, initial=start, total=length, unit="B", unit_scale=True, disable=None) as bar:
            file.seek(start)
            # A chunk is all that a broken connection can lose; less than Content-Length is an error of urllib3's.
            for chunk in response.iter_content(chunk_size=2**13):
                bar.update(file.write(chunk))
    os.replace(unfinished, path)
