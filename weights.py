"""Parameters in and out of files: our checkpoints, the chapter's, and the GPT-2 weights that OpenAI published.

What is read is checked before it is returned, and a file takes its name only when it is whole.
"""
import base64
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import requests
import torch
from requests.exceptions import ChunkedEncodingError
from torch import Tensor
from tqdm import tqdm

from gpt import GPT_CONFIG_124M, Config, Params, param_shapes

OptState = dict[str, Params]  # for each parameter its "step", "exp_avg" and "exp_avg_sq", made by train.init_optimizer

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
OPENAI_FILES = ("hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001")
# What OpenAI calls the parts of our names, to be replaced in this order.
OPENAI_NAMES = {"trf_blocks.": "h", "tok_emb.weight": "wte", "pos_emb.weight": "wpe", "final_norm": "ln_f",
                ".norm1": "/ln_1", ".norm2": "/ln_2", ".att.W_query": "/attn/c_attn", ".att.W_key": "/attn/c_attn",
                ".att.W_value": "/attn/c_attn", ".att.out_proj": "/attn/c_proj", ".ff.layers.0": "/mlp/c_fc",
                ".ff.layers.2": "/mlp/c_proj", ".weight": "/w", ".bias": "/b", ".scale": "/g", ".shift": "/b"}
RETRY_PAUSES = (1, 2, 4, 8, 16)  # seconds before each new attempt of a download that broke


class Checkpoint(NamedTuple):
    """What a checkpoint file holds. `run` is what was saved beside the model: by train.py, progress and settings."""
    params: Params
    config: Config
    opt_state: OptState | None
    run: dict[str, Any]


def assign(left: Tensor, right: Any) -> Tensor:
    """`right` as a contiguous tensor, if its shape is that of `left`; else a ValueError names both (section 5.5)."""
    given: Tensor = torch.as_tensor(right)
    if left.shape != given.shape:
        raise ValueError(f"shape mismatch: {tuple(left.shape)} is needed, {tuple(given.shape)} was given")
    return given.contiguous()


def check_params(params: Params, config: Config) -> Params:
    """The parameters of `config`, in its order; a ValueError names the first that is missing, unknown or misshapen.

    They are contiguous, as AdamW's fused kernel takes it for granted: the chapter saves OpenAI's weights transposed.
    """
    if config.n_layers > len(params):  # or a file of a few bytes could ask for any number of names
        raise ValueError(f"{len(params)} parameters are too few for n_layers {config.n_layers}")
    shapes = param_shapes(config)
    for name in shapes | params:
        tensor, shape = params.get(name), shapes.get(name, "absent")
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) and tensor.is_floating_point() else "no float tensor"
        if found != shape:
            raise ValueError(f"the parameter {name} has to be {shape}, but is {found}")
    checked = {name: params[name].contiguous() for name in shapes}
    if params["out_head.weight"].is_set_to(params["tok_emb.weight"]):  # the same memory: they are tied
        checked["out_head.weight"] = checked["tok_emb.weight"]
    return checked


@contextmanager
def write_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the name `path` when all of it is on the disk. OSError if that fails."""
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps what the disk said
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def save_checkpoint(path: str | Path, params: Params, config: Config, opt_state: OptState | None = None,
                    lr: float = 4e-4, weight_decay: float = 0.1, **run: Any) -> None:
    """Writes a file that `load_checkpoint`, the chapter's model and torch.optim.AdamW can read (section 5.4).

    lr and weight_decay are for torch.optim.AdamW alone. At every instant the file at `path` is the old one or the new
    one, whole. OSError if it can't be written.
    """
    content = {"model_state_dict": params, "config": asdict(config), "run": run}
    if opt_state is not None:
        optimizer = torch.optim.AdamW([torch.zeros(1)], lr=lr, weight_decay=weight_decay).state_dict()  # all options
        optimizer["param_groups"][0]["params"] = list(range(len(params)))
        content["optimizer_state_dict"] = optimizer | {"state": dict(enumerate(opt_state.values()))}
    with write_atomically(path) as file:
        torch.save(content, file)


def load_checkpoint(path: str | Path, n_heads: int | None = None) -> Checkpoint:
    """The content of a file of ours or of the chapter's: a state_dict, alone or with the optimizer's (section 5.4).

    A file of the chapter's does not tell its configuration: it is inferred from the shapes, with n_heads as given or
    emb_dim / 64. The tensors are mapped: read from the disk when used, copied when written to. Nothing in the file is
    ever run.
    FileNotFoundError if there is none, ValueError if it is damaged or something else.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load skips the checksums
            if archive.testzip() is not None:
                raise ValueError
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # whatever a foreign file makes the reader stumble over, it is no checkpoint
        raise ValueError(f"{path} is not a checkpoint, or it is damaged: nothing was loaded from it") from None
    try:
        params = content.get("model_state_dict", content)
        params = {name: tensor for name, tensor in params.items() if not name.endswith(".att.mask")}
        config = Config(**content["config"]) if "config" in content else infer_config(params, n_heads)
        params, optimizer = check_params(params, config), content.get("optimizer_state_dict")
        opt_state = read_adamw(optimizer, params) if optimizer and optimizer["state"] else None  # {} before a step
        return Checkpoint(params, config, opt_state, dict(content.get("run", {})))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):
        raise ValueError(f"{path} is not a checkpoint of a GPT model") from None


def infer_config(params: Params, n_heads: int | None = None) -> Config:
    """The configuration of parameters of these shapes, with the chapter's drop_rate; KeyError for unknown names."""
    (vocab_size, emb_dim), context_length = params["tok_emb.weight"].shape, len(params["pos_emb.weight"])
    return Config(vocab_size, context_length, emb_dim, n_heads=n_heads or max(1, emb_dim // 64),
                  n_layers=sum(name.endswith(".norm1.scale") for name in params), drop_rate=GPT_CONFIG_124M.drop_rate,
                  qkv_bias="trf_blocks.0.att.W_query.bias" in params)


def read_adamw(optimizer: dict[str, Any], params: Params) -> OptState:
    """The optimizer state by the parameters' names; torch.optim.AdamW keeps it by their number, in the same order."""
    return {name: {key: assign(left, optimizer["state"][i][key])
                   for key, left in (("step", torch.zeros(())), ("exp_avg", tensor), ("exp_avg_sq", tensor))}
            for i, (name, tensor) in enumerate(params.items())}


def download_openai(size: str, models_dir: str | Path = "gpt2", base_url: str = OPENAI_URL) -> Path:
    """The folder models_dir/size, after fetching into it what it lacks of OpenAI's checkpoint (section 5.5).

    What has come is kept in a .partial file, also over several runs: the next attempt goes on where it ended.
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
                hopeless = isinstance(error, ValueError) or (  # a URL that makes no sense
                    error.response is not None and error.response.status_code in (400, 401, 403, 404, 410))
                if hopeless or not pauses:
                    broke = isinstance(error, (requests.ConnectionError, requests.Timeout, ChunkedEncodingError))
                    reason = "there is no connection, or it broke" if broke else error
                    raise OSError(f"cannot download {url} ({reason}); what has come is kept for the next try. By hand: "
                                  f"put {', '.join(OPENAI_FILES)} of GPT-2 {size} into {folder}") from None
                time.sleep(pauses.pop(0))
    return folder


def download(url: str, path: Path) -> None:
    """Fetches a file, in one attempt; it takes its name when it is whole. requests.RequestException if it is not."""
    partial = Path(f"{path}.partial")
    start = max(0, partial.stat().st_size - 1) if partial.exists() else 0  # once more the last byte: it is surely there
    headers = {"Accept-Encoding": "identity", "x-ms-version": "2019-12-12"}  # the version: else no ranges
    with requests.get(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {}), stream=True,
                      timeout=30) as response:
        if response.status_code == 416:  # what we have is longer than the server's file
            partial.unlink()
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise requests.RequestException("a web page came in place of the file")
        start = start if response.status_code == 206 else 0  # else the server sends the whole, whatever was asked
        length, md5 = response.headers.get("Content-Length"), response.headers.get("x-ms-blob-content-md5")
        md5 = md5 if start else response.headers.get("Content-MD5")  # which is that of what is sent
        with open(partial, "r+b" if start else "wb") as file, tqdm(
                desc=path.name, initial=start, total=start + int(length) if length else None, unit="B",
                unit_scale=True) as bar:
            file.seek(start)
            # A chunk is all that a broken connection can lose; less than Content-Length is an error of urllib3's.
            for chunk in response.iter_content(chunk_size=2**13):
                bar.update(file.write(chunk))
    with open(partial, "rb") as file:
        if md5 and base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode() != md5:
            partial.unlink()  # a wrong beginning can't be mended: the next attempt starts anew
            raise requests.RequestException("what came is not what the server announced")
    os.replace(partial, path)


def load_openai(folder: str | Path) -> tuple[Params, Config]:
    """OpenAI's parameters and their configuration, from the folder of a TensorFlow checkpoint (section 5.5).

    out_head.weight is tok_emb.weight. The result is kept in folder/converted.pth: while the checkpoint stays the same,
    the next call maps that file into memory and needs no tensorflow. ValueError if something in the folder is damaged
    or does not fit hparams.json, FileNotFoundError if it is not there.
    """
    folder = Path(folder)
    converted = folder / "converted.pth"
    source = [[path.stat().st_size, path.stat().st_mtime_ns] for path in (folder / name for name in OPENAI_FILES)]
    with suppress(OSError, ValueError):  # there is none, or it is damaged: make it
        cached = load_checkpoint(converted)
        if cached.run.get("source") == source:
            return cached.params, cached.config
    params, config = read_openai(folder)
    with suppress(OSError):  # a folder that can't be written to costs time at the next start, nothing else
        save_checkpoint(converted, params, config, source=source)
    return params, config


def read_openai(folder: Path) -> tuple[Params, Config]:
    """OpenAI's parameters under our names, read by tensorflow, and their configuration; errors as in `load_openai`."""
    try:
        with quiet_stderr():
            import tensorflow as tf
            tf.config.set_visible_devices([], "GPU")
    except ImportError:
        raise ValueError("reading OpenAI's checkpoints takes tensorflow: pip install -r requirements.txt") from None
    at_fault, index, data = OPENAI_FILES  # at_fault: the file that is being read
    try:
        hparams = json.loads((folder / at_fault).read_bytes())
        config = Config(vocab_size=hparams["n_vocab"], context_length=hparams["n_ctx"], emb_dim=hparams["n_embd"],
                        n_heads=hparams["n_head"], n_layers=hparams["n_layer"], drop_rate=0.0, qkv_bias=True)
        variables = {name: openai_variable(name) for name in param_shapes(config) if name != "out_head.weight"}
        at_fault = index
        reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
        there = set(reader.get_variable_to_shape_map())
        at_fault = data
        params = {name: our_layout(name, reader.get_tensor(variable)) for name, variable in variables.items()
                  if variable in there}
    except (tf.errors.OpError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{folder / at_fault} is damaged: delete it to download it again") from None
    try:
        if wrong := there ^ set(variables.values()):
            raise ValueError(f"{min(wrong)} is {'more than is told there' if min(wrong) in there else 'missing'}")
        return check_params(params | {"out_head.weight": params["tok_emb.weight"]}, config), config
    except ValueError as error:
        raise ValueError(f"{folder / 'model.ckpt'} does not fit hparams.json: {error}") from None


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence on standard error: tensorflow greets with lines that no setting of its own keeps back."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def openai_variable(name: str) -> str:
    """The variable in which OpenAI keeps our parameter of that name; query, key and value share one (section 5.5)."""
    for ours, theirs in OPENAI_NAMES.items():
        name = name.replace(ours, theirs)
    return f"model/{name}"


def our_layout(name: str, value: np.ndarray) -> Tensor:
    """Our parameter of that name, out of the value of OpenAI's variable (section 5.5)."""
    for i, part in enumerate(("W_query", "W_key", "W_value")):
        if part in name:
            value = np.array_split(value, 3, axis=-1)[i]
    if value.ndim == 3:
        value = value[0].T  # of a linear layer: (1, in, out)
    return torch.from_numpy(np.ascontiguousarray(value))
