"""Parameters in and out of files: our checkpoints, the chapter's, Hugging Face's, and the ones that OpenAI published.

What is read is checked before it is returned, and nothing in a file is ever run. What is written has another name until
it is whole.
"""
import base64
import hashlib
import json
import math
import os
import pickle
import re
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import requests
import torch
from requests.exceptions import ChunkedEncodingError, SSLError
from torch import Tensor
from tqdm import tqdm

from gpt import EMBEDDINGS, GPT_CONFIG_124M, QUERY_KEY_VALUE, Config, Params, distinct, param_shapes

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
OPENAI_FILES = ("hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001")
RETRY_PAUSES = (1, 2, 4, 8, 16)  # seconds before each new attempt of a download that broke
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS = 4e-4, 0.1, (0.9, 0.999), 1e-8  # of AdamW in the chapter

# Our names for the parts of Hugging Face's names. What is missing here, c_attn, is query, key and value in one.
GPT2_NAMES = {"h.": "trf_blocks.", "wte.": "tok_emb.", "wpe.": "pos_emb.", "lm_head.": "out_head.",
              "ln_1.weight": "norm1.scale", "ln_1.bias": "norm1.shift", "ln_2.weight": "norm2.scale",
              "ln_2.bias": "norm2.shift", "ln_f.weight": "final_norm.scale", "ln_f.bias": "final_norm.shift",
              "attn.c_proj.": "att.out_proj.", "mlp.c_fc.": "ff.layers.0.", "mlp.c_proj.": "ff.layers.2."}


# What GPT-2 has where Hugging Face's config.json tells these. With other values it would be another model.
HUGGINGFACE_SETTINGS = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
                        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}


class OptState(NamedTuple):
    """AdamW's state: how many steps it has done, and its two running means of each parameter's gradient.

    exp_avg is the mean of the gradients and exp_avg_sq that of their squares. Tied parameters have one of each.
    """
    step: int
    exp_avg: Params
    exp_avg_sq: Params


class Checkpoint(NamedTuple):
    """What a checkpoint file holds. `load_checkpoint` gives what `save_checkpoint` was given.

    `run` is what else the run depends on, as `train.to_checkpoint` makes it. `notes` are sentences about what was not
    in the file, or could not be used: someone should read them.
    """
    params: Params
    config: Config
    opt_state: OptState | None = None
    run: dict[str, Any] = {}  # noqa: RUF012 (no one writes into it)
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, by their names; not checked yet."""
        settings: dict[str, Any] = self.run.get("settings", {})
        return settings


def assign(left: Tensor, right: Any) -> Tensor:
    """`right` as a contiguous tensor, if its shape is that of `left`; else a ValueError names both (section 5.5)."""
    given: Tensor = torch.as_tensor(right)
    if left.shape != given.shape:
        raise ValueError(f"shape mismatch: {tuple(left.shape)} is needed, {tuple(given.shape)} was given")
    return given.detach().contiguous()


def check_params(params: dict[str, Any], config: Config) -> Params:
    """The parameters of `config`, in its order; a ValueError names the first that is missing, unknown or misshapen.

    They are contiguous, because AdamW's fused kernel needs that and the chapter saves OpenAI's weights transposed.
    """
    if config.n_layers > len(params):  # otherwise a file of a few bytes could ask for any number of names
        raise ValueError(f"{len(params)} parameters are too few for n_layers {config.n_layers}")
    shapes, checked = param_shapes(config), {}
    for name in params:
        if name not in shapes:
            raise ValueError(f"the parameter {name} is unknown")
    for name, shape in shapes.items():
        if name not in params:
            raise ValueError(f"the parameter {name} is missing")
        if not isinstance(params[name], Tensor) or not params[name].is_floating_point():
            raise ValueError(f"the parameter {name} is no tensor of floating point numbers")
        try:
            checked[name] = assign(torch.empty(shape, device="meta"), params[name])
        except ValueError as error:
            raise ValueError(f"the parameter {name}: {error}") from None
    if params["out_head.weight"].is_set_to(params["tok_emb.weight"]):  # both are the same memory: they are tied
        checked["out_head.weight"] = checked["tok_emb.weight"]
    return checked


def from_fields(kind: type, values: dict[str, Any]) -> Any:
    """kind(**values); a ValueError names a value that is unknown or, without a default, missing."""
    names = {field.name for field in fields(kind)}
    for name in values:
        if name not in names:
            raise ValueError(f"{kind.__name__} has no {name!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from None


# Saving

@contextmanager
def write_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the name `path` when all of it is on the disk. OSError if that fails.

    A symbolic link stays one: the file that it points to is replaced. The permissions of a file that is there are kept.
    """
    target = Path(os.path.realpath(path))
    unfinished = Path(f"{target}.partial")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):  # there is none yet, or this file system has no permissions
            os.chmod(unfinished, target.stat().st_mode)
        os.replace(unfinished, target)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps what the disk said
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a file that `load_checkpoint`, the chapter's model and torch.optim.AdamW can read (section 5.4).

    Tied parameters have one entry in the optimizer's state, as they have in an optimizer over a tied model.
    At every instant the file at `path` is the old one or the new one, whole. OSError if it can't be written.
    """
    params, config, opt_state, run, _ = checkpoint
    content = {"model_state_dict": params | causal_masks(config), "config": asdict(config), "run": run}
    if opt_state is not None:
        content["optimizer_state_dict"] = adamw_state_dict(opt_state, checkpoint.settings)
    with write_atomically(path) as file:
        torch.save(content, file)


def causal_masks(config: Config) -> Params:
    """The masks that the chapter's model registers, one a block, so that its load_state_dict takes the file."""
    mask = torch.ones(config.context_length, config.context_length).triu(1)  # a file holds this one tensor once
    return {f"trf_blocks.{i}.att.mask": mask for i in range(config.n_layers)}


def adamw_state_dict(opt_state: OptState, settings: dict[str, Any]) -> dict[str, Any]:
    """The state_dict of torch.optim.AdamW. It knows a parameter by its number, in the order of the parameters."""
    moments = zip(distinct(opt_state.exp_avg), distinct(opt_state.exp_avg_sq), strict=True)
    state = {i: {"step": torch.tensor(float(opt_state.step)), "exp_avg": mean, "exp_avg_sq": mean_of_squares}
             for i, (mean, mean_of_squares) in enumerate(moments)}
    example = torch.optim.AdamW([torch.zeros(1)], lr=settings.get("lr", LEARNING_RATE), betas=BETAS, eps=EPS,
                                weight_decay=settings.get("weight_decay", WEIGHT_DECAY))  # it knows all other options
    return {"state": state, "param_groups": [example.state_dict()["param_groups"][0] | {"params": list(state)}]}


# Loading

def load_checkpoint(path: str | Path, n_heads: int | None = None, with_run: bool = True) -> Checkpoint:
    """The content of a file of ours, of the chapter's or of Hugging Face's GPT-2 (section 5.4).

    A file of others does not tell its configuration. That is taken from the shapes, from n_heads and from a config.json
    beside the file. The tensors are mapped where that is possible: read from the disk when used. Our own saving
    replaces the file and leaves them as they are; another program that writes into the same file changes them.
    With with_run=False, what is there of an optimizer or a run is left alone.
    FileNotFoundError if there is none, ValueError with the reason if it can't be used.
    """
    path = Path(path)
    content = read_tensors(path)
    try:
        state = content.get("model_state_dict", content)
        given = {plain_name(name): tensor for name, tensor in state.items() if not is_mask(name)}
        notes: list[str] = []
        if "config" in content:
            config = from_fields(Config, content["config"])
        else:
            config = infer_config(given, path.with_name("config.json"), n_heads, notes)
        params = check_params(from_gpt2(given.items()) if "wte.weight" in given else given, config)
        opt_state, run = None, dict(content.get("run", {}) if with_run else {})
        if not isinstance(run.get("settings", {}), dict):
            raise ValueError("its settings are damaged")
        if with_run and "optimizer_state_dict" in content:
            opt_state, options = read_adamw(content["optimizer_state_dict"], list(given), params, config, notes)
            if opt_state is not None and "run" not in content:
                run["settings"] = {name: float(options[name]) for name in ("lr", "weight_decay")}
        return Checkpoint(params, config, opt_state, run, tuple(f"{path}: {note}" for note in notes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        raise ValueError(f"{path} is not a checkpoint of a GPT model") from None


def read_tensors(path: Path) -> dict[str, Any]:
    """What torch.save or safetensors wrote into a file; errors as in `load_checkpoint`."""
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{":
            from safetensors.torch import load_file
            return load_file(path)
        return read_torch(path, zipped=start[:2] == b"PK")
    except (OSError, MemoryError):
        raise
    except ImportError as error:
        raise ValueError(f"{path}: {error}: pip install safetensors") from None
    except Exception as error:  # whatever a foreign file makes the readers stumble over
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise MemoryError(f"{path} does not fit into memory") from None
        unknown = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if unknown is None:
            raise ValueError(f"{path} is not a checkpoint, or it is damaged: nothing was loaded from it") from None
        raise ValueError(f"{path} holds a Python object besides tensors, {unknown[1]}, that could run code, so it is "
                         "not loaded: save the model's state_dict() alone") from None


def read_torch(path: Path, zipped: bool) -> dict[str, Any]:
    """What torch.save wrote, without running anything in it; before 2020 it was no zip file."""
    if zipped:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    content: dict[str, Any]
    try:
        content = load(mmap=zipped)
    except (RuntimeError, UnicodeEncodeError) as error:
        if isinstance(error, RuntimeError) and "mmap" not in str(error):
            raise
        content = load()  # a file system, a limit on memory, or a name, not in UTF-8, that allows no mapping
    return content


def plain_name(name: str) -> str:
    """The name of a parameter without what torch.compile, parallel models and transformers put before it."""
    return re.sub(r"^((_orig_mod|module|transformer)\.)+", "", name)


def is_mask(name: str) -> bool:
    """Whether this is a causal mask, the chapter's or transformers', and no parameter."""
    return name.endswith((".att.mask", ".attn.bias", ".attn.masked_bias"))


def infer_config(given: Params, config_file: Path, n_heads: int | None, notes: list[str]) -> Config:
    """The configuration of parameters of these shapes; KeyError or ValueError if they are those of no GPT model.

    A note tells if the number of heads is a guess.
    """
    gpt2 = "wte.weight" in given
    tok_emb, pos_emb = (given[name] for name in (("wte.weight", "wpe.weight") if gpt2 else EMBEDDINGS))
    vocab_size, emb_dim = tok_emb.shape
    told = read_json(config_file) if gpt2 and config_file.exists() else {}
    for name, values in HUGGINGFACE_SETTINGS.items():
        if told.get(name, values[0]) not in values:
            raise ValueError(f"{config_file} has {name} {told[name]}, but GPT-2 has {values[0]}")
    if not (n_heads := told.get("n_head") or n_heads):
        n_heads = usual_heads(emb_dim)
        notes.append(f"it does not tell its number of heads: {n_heads} (one for each 64 of {emb_dim}) are assumed. "
                     "--n-heads gives another number")
    blocks = [int(block[1]) for name in given if (block := re.match(r"(?:trf_blocks|h)\.(\d+)\.", name))]
    return Config(vocab_size, len(pos_emb), emb_dim, n_heads, n_layers=1 + max(blocks),
                  drop_rate=0.0 if gpt2 else GPT_CONFIG_124M.drop_rate,
                  qkv_bias=gpt2 or "trf_blocks.0.att.W_query.bias" in given)


def usual_heads(emb_dim: int) -> int:
    """The number of heads that GPT-2 has for embeddings of this size: their size is 64."""
    return max(1, emb_dim // 64)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError if it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        return {**content}
    except (RecursionError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged: it is not a JSON object") from None


def read_adamw(optimizer: dict[str, Any], names: list[str], params: Params, config: Config,
               notes: list[str]) -> tuple[OptState | None, dict[str, Any]]:
    """AdamW's state out of an optimizer's state_dict, and the options of its first group.

    `names` are those of the file, in its order. None if the optimizer had done no step, or, which a note tells, if it
    is not AdamW over these parameters.
    """
    groups, state = optimizer["param_groups"], optimizer["state"]
    if not state and "amsgrad" in groups[0]:
        return None, groups[0]
    tied = params["out_head.weight"] is params["tok_emb.weight"]
    names = [name for name in names if not (tied and name == "out_head.weight")]
    try:
        keys = [key for group in groups for key in group["params"]]
        group_shapes = [[tuple(state[key]["exp_avg"].shape) for key in group["params"]] for group in groups]
        owners = match_parameters(groups, group_shapes, names, params)
        steps = {int(state[key]["step"]) for key in keys}
        if len(steps) > 1 or min(steps) < 0 or any(group.get("amsgrad", True) for group in groups):
            raise ValueError("it is not AdamW with one number of steps")
        moments = []
        for kind in ("exp_avg", "exp_avg_sq"):
            found = {name: state[key][kind] for name, key in zip(owners, keys, strict=True)}
            if tied:
                found["out_head.weight"] = found["tok_emb.weight"]
            moments.append(check_params(found, config))
    except (AttributeError, KeyError, OverflowError, StopIteration, TypeError, ValueError):
        notes.append("its optimizer is not AdamW over all of these parameters: AdamW's moments start anew")
        return None, groups[0]
    if tuple(groups[0].get("betas", BETAS)) != BETAS or groups[0].get("eps", EPS) != EPS:
        notes.append(f"its AdamW has betas {groups[0].get('betas')} and eps {groups[0].get('eps')}, which become "
                     f"{BETAS} and {EPS}")
    first = groups[0]
    notes += [f"its AdamW has several values of {name}: all parameters get {first.get(name)}"
              for name in ("lr", "weight_decay") if any(group.get(name) != first.get(name) for group in groups)]
    return OptState(steps.pop(), *moments), groups[0]


def match_parameters(groups: list[dict[str, Any]], group_shapes: list[list[tuple[int, ...]]], names: list[str],
                     params: Params) -> list[str]:
    """The name of the parameter behind each number of an optimizer, whose moments have these shapes in each group.

    The file tells the names, or they follow from the order: an optimizer counts its parameters group by group and,
    within a group, in the model's order. With one group for matrices, which decay, and one for the rest, the first
    matrix of a shape in its group is the first of that shape in the model, and so on. ValueError if two groups share a
    shape, because that leaves a doubt.
    """
    owners = [owner for group in groups for owner in group.get("param_names", group["params"])]
    if all(isinstance(owner, str) for owner in owners):
        return [plain_name(owner) for owner in owners]
    if group_shapes == [[tuple(params[name].shape) for name in names]]:
        return names
    owners, waiting = [], list(names)
    for i, shapes in enumerate(group_shapes):
        for shape in shapes:
            if any(shape in others for others in group_shapes[:i]):
                raise ValueError("two groups have parameters of the same shape")
            owner = next(name for name in waiting if params[name].shape == shape)
            waiting.remove(owner)
            owners.append(owner)
    return owners


def load_model(name: str, n_heads: int | None = None, size: str = "124M", models_dir: str | Path = "gpt2",
               base_url: str = OPENAI_URL, with_run: bool = False) -> Checkpoint:
    """The model of that name: `openai`, a file, or a folder with a Hugging Face model or OpenAI's files in it.

    with_run adds an optimizer's state and a run, where the file has them. ValueError if it is not to be had.
    """
    path = Path(name)
    if name == "openai":
        path = download_openai(size, models_dir, base_url)
    if path.is_dir():
        files = [path / file for file in ("model.safetensors", "pytorch_model.bin") if (path / file).is_file()]
        if (path / OPENAI_FILES[0]).is_file():
            loaded = Checkpoint(*load_openai(path))
        elif files:
            loaded = load_checkpoint(files[0], n_heads, with_run)
        else:
            raise ValueError(f"there is no model.safetensors and no pytorch_model.bin in the folder {name}")
    elif path.is_file():
        loaded = load_checkpoint(path, n_heads, with_run)
    else:
        way = f": `python train.py --checkpoint {name}` makes it" if name.endswith(".pth") else ""
        raise ValueError(f"there is no {name}{way}")
    if n_heads not in (None, loaded.config.n_heads):
        raise ValueError(f"--n-heads {n_heads} contradicts {name}: {loaded.config.n_heads} there")
    if loaded.config.vocab_size != GPT_CONFIG_124M.vocab_size:
        raise ValueError(f"{name} knows {loaded.config.vocab_size} tokens, but GPT-2's vocabulary has "
                         f"{GPT_CONFIG_124M.vocab_size}")
    return loaded


# GPT-2 as it was published

def from_gpt2(given: Iterable[tuple[str, Tensor]]) -> Params:
    """Our parameters out of GPT-2's own, each with the name that it has at Hugging Face (section 5.5).

    GPT-2 keeps the weights of a block's linear layers as (in, out). It has no output head of its own: the token
    embedding serves as one. They are tied, one tensor under two names, where the chapter makes a copy.
    """
    params = {}
    for name, value in given:
        for theirs, ours in GPT2_NAMES.items():
            name = name.replace(theirs, ours)
        if name.startswith("trf_blocks") and value.ndim == 2:
            value = value.T  # (out, in)
        if "attn.c_attn." in name:  # now (3 E, E) or, of a bias, (3 E,): query, key and value, one below the other
            for part, third in zip(QUERY_KEY_VALUE, value.tensor_split(3), strict=True):
                params[name.replace("attn.c_attn.", f"att.{part}.")] = third.contiguous()
        else:
            params[name] = value.contiguous()
    if "tok_emb.weight" in params:
        params.setdefault("out_head.weight", params["tok_emb.weight"])
    return params


def load_openai(folder: str | Path) -> tuple[Params, Config]:
    """OpenAI's parameters and their configuration, from the folder of a TensorFlow checkpoint (section 5.5).

    out_head.weight is tok_emb.weight. The result is kept in folder/converted.pth: while the checkpoint stays the same,
    the next call maps that file into memory and needs no tensorflow. ValueError if something in the folder is damaged
    or does not fit hparams.json, FileNotFoundError if it is not there.
    """
    folder = Path(folder)
    converted = folder / "converted.pth"
    original = [[path.stat().st_size, path.stat().st_mtime_ns] for path in (folder / name for name in OPENAI_FILES)]
    with suppress(OSError, ValueError):  # there is none, or it is damaged: make it
        kept = load_checkpoint(converted)
        if kept.run.get("original") == original:
            return kept.params, kept.config
    params, config = read_openai(folder)
    with suppress(OSError):  # a folder that can't be written to costs time at the next start, nothing else
        save_checkpoint(converted, Checkpoint(params, config, run={"original": original}))
    return params, config


def read_openai(folder: Path) -> tuple[Params, Config]:
    """OpenAI's parameters under our names, read by tensorflow, and their configuration; errors as in `load_openai`."""
    try:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # without it tensorflow greets with a page of notices
        import tensorflow as tf
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        raise ValueError(f"reading OpenAI's checkpoint takes tensorflow, which this Python {version} lacks: "
                         "`pip install tensorflow` with Python 3.11 to 3.13, or use Hugging Face's file with --weights "
                         "model.safetensors") from None
    try:
        hparams = read_json(folder / "hparams.json")
        config = Config(vocab_size=hparams["n_vocab"], context_length=hparams["n_ctx"], emb_dim=hparams["n_embd"],
                        n_heads=hparams["n_head"], n_layers=hparams["n_layer"], drop_rate=0.0, qkv_bias=True)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder / 'hparams.json'} is damaged ({error}): delete it to download it again") from None
    try:
        reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
        sizes = {name: math.prod(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        # One at a time, and the largest first: while it is read, memory holds it twice.
        arrays = ((name, reader.get_tensor(name)) for name in sorted(sizes, key=lambda name: -sizes[name]))
        params = from_gpt2((huggingface_name(name), torch.from_numpy(array[0] if array.ndim == 3 else array))
                           for name, array in arrays)  # a weight is (1, in, out)
    except Exception as error:  # tensorflow's errors have no common class
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{folder / 'model.ckpt'} is damaged ({reason}): delete it to download it again") from None
    try:
        return check_params(params, config), config
    except ValueError as error:
        raise ValueError(f"{folder / 'model.ckpt'} does not fit hparams.json: {error}") from None


def huggingface_name(variable: str) -> str:
    """What Hugging Face calls a variable of OpenAI's: "h.0.attn.c_attn.weight" for "model/h0/attn/c_attn/w"."""
    name = variable.removeprefix("model/").replace("/", ".")
    name = re.sub(r"^h(?=\d)", "h.", name)
    name = re.sub(r"\.[wg]$|(?<=wte|wpe)$", ".weight", name)
    return re.sub(r"\.b$", ".bias", name)


def download_openai(size: str, models_dir: str | Path = "gpt2", base_url: str = OPENAI_URL) -> Path:
    """The folder models_dir/size, after fetching into it what it lacks of OpenAI's checkpoint (section 5.5).

    An unfinished download stays as .partial, and the next attempt, also in another run, goes on where it ended.
    ValueError for a size that does not exist. OSError if a file can't be had, with what to put where by hand.
    """
    if size not in OPENAI_SIZES:
        raise ValueError(f"there is no GPT-2 of size {size}: choose from {', '.join(OPENAI_SIZES)}")
    folder = Path(models_dir) / size
    folder.mkdir(parents=True, exist_ok=True)
    for name in OPENAI_FILES:
        url, pauses = f"{base_url.rstrip('/')}/{size}/{name}", list(RETRY_PAUSES)
        while not (folder / name).exists():
            try:
                download(url, folder / name)
            except requests.RequestException as error:
                if not pauses or is_hopeless(error):
                    raise OSError(f"cannot download {url} ({reason_of(error)}). By hand: put {', '.join(OPENAI_FILES)} "
                                  f"of GPT-2 {size} into {folder}") from None
                time.sleep(pauses.pop(0))
    return folder


def is_hopeless(error: requests.RequestException) -> bool:
    """Whether another attempt would fail in the same way."""
    refused = error.response is not None and error.response.status_code in (400, 401, 403, 404, 410)
    return refused or isinstance(error, (SSLError, ValueError))  # ValueError: a URL that makes no sense


def reason_of(error: requests.RequestException) -> str:
    """Why a download failed, in a few words."""
    if isinstance(error, SSLError):
        return ("the server's certificate was not accepted; if your network has one of its own, name its file in the "
                "environment variable REQUESTS_CA_BUNDLE")
    if isinstance(error, (requests.ConnectionError, requests.Timeout, ChunkedEncodingError)):
        return "there is no connection, or it broke; what has come is kept for the next try"
    return str(error)


def download(url: str, path: Path) -> None:
    """Fetches a file, in one attempt; it takes its name when it is whole. requests.RequestException if it is not."""
    unfinished = Path(f"{path}.partial")
    start = 0
    if unfinished.exists():  # its last byte is fetched again, because that one surely is there
        start = max(0, unfinished.stat().st_size - 1)
    headers = {"Accept-Encoding": "identity", "x-ms-version": "2019-12-12"}  # the version: else no ranges
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416:  # what we have is longer than the server's file
            unfinished.unlink()
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise requests.RequestException("a web page came in place of the file")
        start = start if response.status_code == 206 else 0  # else the server sends the whole, whatever was asked
        length = response.headers.get("Content-Length")
        # Content-MD5 is that of what is sent, so it is the file's only if the whole file is sent.
        md5 = response.headers.get("x-ms-blob-content-md5") if start else response.headers.get("Content-MD5")
        with open(unfinished, "r+b" if start else "wb") as file, tqdm(
                desc=path.name, initial=start, total=start + int(length) if length else None, unit="B",
                unit_scale=True, disable=None) as bar:
            file.seek(start)
            # A chunk is all that a broken connection can lose; less than Content-Length is an error of urllib3's.
            for chunk in response.iter_content(chunk_size=2**13):
                bar.update(file.write(chunk))
    with open(unfinished, "rb") as file:
        if md5 and base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode() != md5:
            unfinished.unlink()  # a wrong beginning can't be mended: the next attempt starts anew
            raise requests.RequestException("what came is not what the server announced")
    os.replace(unfinished, path)
