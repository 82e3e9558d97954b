"""Checkpoints, files of other tools, OpenAI's weights: files that those tools write, a real server, real damage."""
import argparse
import base64
import collections
import hashlib
import json
import os
import pickle
import platform
import random
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, Adafactor, AdamW, NAdam, RAdam, RMSprop

import sample
import train
import weights
from conftest import HERE, LONG, LONG_TESTS, ROUNDING, STORY, refused, same, seeded
from gpt import Config, cast, forward, init_params, map_params
from sample import generate
from train import init_optimizer, train_step
from weights import Checkpoint, load_checkpoint, load_model, load_openai, save_checkpoint

POSIX = pytest.mark.skipif(os.name != "posix", reason="links, permissions and signals are tried on POSIX systems")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE and /dev/full are tried on Linux")
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it takes glibc to keep what is freed")
SMALL = dict(n_vocab=97, n_ctx=16, n_embd=12, n_head=3, n_layer=2)
FULL = dict(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
CONFIG = Config(vocab_size=41, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.1, qkv_bias=True)
GPT2 = Config(vocab_size=50257, context_length=12, emb_dim=12, n_heads=2, n_layers=2, drop_rate=0.1, qkv_bias=True)
IDS = torch.randint(41, (2, 9), generator=seeded(3))


def close(one, two, roundings=100):
    """Whether nothing but the rounding of sums in another order parts them, measured by the largest value."""
    one, two = (torch.as_tensor(each).detach().double() for each in (one, two))
    return one.shape == two.shape and (one - two).abs().max() <= roundings * ROUNDING * two.abs().max()


def python(*arguments, **options):
    """What a new Python in the project's folder did."""
    options = dict(cwd=HERE, capture_output=True, text=True, timeout=300) | options
    return subprocess.run([sys.executable, *map(str, arguments)], **options)


# GPT-2's variables: OpenAI's names, ours, Hugging Face's

def openai_variables(hparams, seed=0):
    """Random arrays under the names and in the shapes of OpenAI's checkpoints."""
    E, draw = hparams["n_embd"], np.random.default_rng(seed).standard_normal
    shapes = {"wte": (hparams["n_vocab"], E), "wpe": (hparams["n_ctx"], E), "ln_f/g": (E,), "ln_f/b": (E,)}
    for i in range(hparams["n_layer"]):
        for name, fan_in, fan_out in (("attn/c_attn", E, 3 * E), ("attn/c_proj", E, E), ("mlp/c_fc", E, 4 * E),
                                      ("mlp/c_proj", 4 * E, E)):
            shapes |= {f"h{i}/{name}/w": (1, fan_in, fan_out), f"h{i}/{name}/b": (fan_out,)}
        shapes |= {f"h{i}/{norm}/{part}": (E,) for norm in ("ln_1", "ln_2") for part in "gb"}
    return {f"model/{name}": 0.3 * draw(shape, dtype=np.float32) for name, shape in shapes.items()}


def expected_params(hparams, variables):
    """Our names for OpenAI's arrays, by the table of section 5.5."""
    v = {name.removeprefix("model/"): array for name, array in variables.items()}
    params = {"tok_emb.weight": v["wte"], "pos_emb.weight": v["wpe"], "out_head.weight": v["wte"],
              "final_norm.scale": v["ln_f/g"], "final_norm.shift": v["ln_f/b"]}
    E = hparams["n_embd"]
    for i in range(hparams["n_layer"]):
        ours, theirs = f"trf_blocks.{i}", f"h{i}"
        for j, part in enumerate(("W_query", "W_key", "W_value")):
            params[f"{ours}.att.{part}.weight"] = v[f"{theirs}/attn/c_attn/w"][0][:, j * E:(j + 1) * E].T
            params[f"{ours}.att.{part}.bias"] = v[f"{theirs}/attn/c_attn/b"][j * E:(j + 1) * E]
        for name, variable in (("att.out_proj", "attn/c_proj"), ("ff.layers.0", "mlp/c_fc"),
                               ("ff.layers.2", "mlp/c_proj")):
            params[f"{ours}.{name}.weight"] = v[f"{theirs}/{variable}/w"][0].T
            params[f"{ours}.{name}.bias"] = v[f"{theirs}/{variable}/b"]
        for name, variable in (("norm1", "ln_1"), ("norm2", "ln_2")):
            params[f"{ours}.{name}.scale"] = v[f"{theirs}/{variable}/g"]
            params[f"{ours}.{name}.shift"] = v[f"{theirs}/{variable}/b"]
    return params


def huggingface_state(hparams, variables):
    """OpenAI's arrays as Hugging Face's GPT2Model has them: the same layout, written out name by name."""
    v = {name.removeprefix("model/"): torch.from_numpy(array) for name, array in variables.items()}
    state = {"wte.weight": v["wte"], "wpe.weight": v["wpe"]}
    for i in range(hparams["n_layer"]):
        state |= {f"h.{i}.ln_1.weight": v[f"h{i}/ln_1/g"], f"h.{i}.ln_1.bias": v[f"h{i}/ln_1/b"],
                  f"h.{i}.attn.c_attn.weight": v[f"h{i}/attn/c_attn/w"][0],
                  f"h.{i}.attn.c_attn.bias": v[f"h{i}/attn/c_attn/b"],
                  f"h.{i}.attn.c_proj.weight": v[f"h{i}/attn/c_proj/w"][0],
                  f"h.{i}.attn.c_proj.bias": v[f"h{i}/attn/c_proj/b"],
                  f"h.{i}.ln_2.weight": v[f"h{i}/ln_2/g"], f"h.{i}.ln_2.bias": v[f"h{i}/ln_2/b"],
                  f"h.{i}.mlp.c_fc.weight": v[f"h{i}/mlp/c_fc/w"][0], f"h.{i}.mlp.c_fc.bias": v[f"h{i}/mlp/c_fc/b"],
                  f"h.{i}.mlp.c_proj.weight": v[f"h{i}/mlp/c_proj/w"][0],
                  f"h.{i}.mlp.c_proj.bias": v[f"h{i}/mlp/c_proj/b"]}
    return state | {"ln_f.weight": v["ln_f/g"], "ln_f.bias": v["ln_f/b"]}


def numpy_forward(variables, ids, hparams, head="wte"):
    """GPT-2 from the paper's formulas, in double precision, for one row of ids."""
    v = {name.removeprefix("model/"): array.astype(np.float64) for name, array in variables.items()}

    def norm(x, name):
        normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return normal * v[name + "/g"] + v[name + "/b"]

    def project(x, name):
        return x @ v[name + "/w"][0] + v[name + "/b"]

    x, size = v["wte"][ids] + v["wpe"][:len(ids)], hparams["n_embd"] // hparams["n_head"]
    for i in range(hparams["n_layer"]):
        q, k, val = np.split(project(norm(x, f"h{i}/ln_1"), f"h{i}/attn/c_attn"), 3, axis=-1)
        heads = []
        for h in range(hparams["n_head"]):
            part = slice(h * size, (h + 1) * size)
            scores = np.where(np.tri(len(ids)), q[:, part] @ k[:, part].T / np.sqrt(size), -np.inf)
            exponents = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(exponents / exponents.sum(-1, keepdims=True) @ val[:, part])
        x = x + project(np.concatenate(heads, -1), f"h{i}/attn/c_proj")
        hidden = project(norm(x, f"h{i}/ln_2"), f"h{i}/mlp/c_fc")
        gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + project(gelu, f"h{i}/mlp/c_proj")
    return norm(x, "ln_f") @ v[head].T


def assert_bitwise(params, expected, tied=True):
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name].numpy(), array, err_msg=name, strict=True)
    assert (params["out_head.weight"] is params["tok_emb.weight"]) == tied


def assert_independent_forward_agrees(params, config, variables, hparams):
    ids = torch.randint(hparams["n_vocab"], (3, hparams["n_ctx"]), generator=seeded(1))
    theirs = np.stack([numpy_forward(variables, row, hparams) for row in ids.numpy()])
    assert close(forward(params, ids, config), theirs)


def write_tensorflow(folder, hparams, variables):
    """What OpenAI's folder holds, written by tensorflow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf = pytest.importorskip("tensorflow", reason="OpenAI's checkpoints are tensorflow's")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(hparams))
    tf.raw_ops.SaveV2(prefix=str(folder / "model.ckpt"), tensor_names=list(variables), tensors=list(variables.values()),
                      shape_and_slices=[""] * len(variables))
    return folder


@pytest.fixture(scope="module")
def openai_folder(tmp_path_factory):
    """A small checkpoint; tests copy it before they change anything."""
    variables = openai_variables(SMALL)
    return write_tensorflow(tmp_path_factory.mktemp("published") / "124M", SMALL, variables), variables


@pytest.fixture
def folder(openai_folder, tmp_path):
    return Path(shutil.copytree(openai_folder[0], tmp_path / "copy"))


# A server

class Server:
    """Serves a folder on 127.0.0.1 and misbehaves as told; with a certificate, over TLS."""

    def __init__(self, root, certificate=None):
        self.requests, self.connections, self.ranges, self.cuts, self.statuses = [], 0, True, {}, []
        self.md5, self.html = None, set()
        server = self

        class Http(ThreadingHTTPServer):
            daemon_threads = True

            def get_request(self):
                server.connections += 1
                return super().get_request()

        class Handler(BaseHTTPRequestHandler):
            timeout = 30

            def do_GET(self):
                name, asked = Path(self.path).name, self.headers.get("Range")
                server.requests.append((name, asked))
                if server.statuses:
                    status = server.statuses.pop(0)
                    if status != 200:
                        self.send_error(status)
                        return
                content = b"<html>sign in</html>" if name in server.html else (root / self.path[1:]).read_bytes()
                start = int(asked[6:-1]) if asked and server.ranges else 0
                if start > len(content) or (start and start == len(content)):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                if name in server.html:
                    self.send_header("Content-Type", "text/html; charset=utf-8")
                digest = server.md5 or hashlib.md5(content).digest()
                kind = "x-ms-blob-content-md5" if start else "Content-MD5"  # as Azure does: the latter is a body's
                self.send_header(kind, base64.b64encode(digest).decode())
                self.end_headers()
                body = content[start:]
                if server.cuts.get(name):
                    server.cuts[name] -= 1
                    body = body[:len(body) // 2]
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.http.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def fetched(self, name):
        return [asked for requested, asked in self.requests if requested == name]

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server over a folder. It ends with the test."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(weights, "RETRY_PAUSES", (0, 0))
    servers = []

    def start(root, certificate=None):
        servers.append(Server(root, certificate))
        return servers[-1]
    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(openai_folder, serve):
    return serve(openai_folder[0].parent)


def assert_whole(models, published):
    for path in (models / "124M").iterdir():
        assert path.suffix == ".partial" or path.read_bytes() == (published / path.name).read_bytes()


# Loading OpenAI's checkpoints

def test_what_openai_published_arrives_bit_for_bit(server, openai_folder, tmp_path):
    folder = weights.download_openai("124M", tmp_path, server.url)
    params, config = load_openai(folder)
    assert_bitwise(params, expected_params(SMALL, openai_folder[1]))
    assert config == Config(97, 16, 12, 3, 2, 0.0, True)
    again, _ = load_openai(folder)  # from the converted file
    assert_bitwise(again, expected_params(SMALL, openai_folder[1]))


def test_logits_equal_an_independent_forward_pass_over_the_same_arrays(folder, openai_folder):
    assert_independent_forward_agrees(*load_openai(folder), openai_folder[1], SMALL)


WITHOUT = """
import sys, weights
for load, path in zip((weights.load_openai, weights.load_checkpoint, weights.load_openai), sys.argv[1:]):
    try:
        print(len(load(path)), "values")
    except (OSError, ValueError) as error:
        print(error)
"""


@pytest.fixture(scope="module")
def without_packages(request, tmp_path_factory):
    """What is said where tensorflow and safetensors are missing: of a first start, a model's file, a second start."""
    folder = tmp_path_factory.mktemp("without")
    for name in ("first", "second", "lacking"):
        (folder / name).mkdir()
    for name in weights.OPENAI_FILES:
        (folder / "first" / name).write_bytes(b"{}")
    if find_spec("tensorflow"):
        shutil.copytree(request.getfixturevalue("openai_folder")[0], folder / "second", dirs_exist_ok=True)
        load_openai(folder / "second")
    for name in ("tensorflow", "safetensors"):
        (folder / "lacking" / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    done = python("-c", WITHOUT, folder / "first", folder / "model.safetensors", folder / "second",
                  env=os.environ | {"PYTHONPATH": str(folder / "lacking")})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_the_second_start_needs_no_tensorflow(without_packages, openai_folder):
    assert without_packages[2] == "2 values"


def test_a_first_start_without_tensorflow_names_this_python_and_the_file_that_does_without(without_packages):
    version = f"this Python {sys.version_info.major}.{sys.version_info.minor} "
    assert all(word in without_packages[0] for word in ("tensorflow", version, "model.safetensors"))


def test_a_file_of_safetensors_without_that_package_is_not_called_damaged(without_packages):
    message = without_packages[1].split("model.safetensors")[-1]
    assert "safetensors" in message and "damaged" not in message


@pytest.mark.parametrize("damage", [
    pytest.param(lambda b: b[:len(b) // 2], id="cut"),
    pytest.param(lambda b: b"garbage", id="garbage"),
    pytest.param(lambda b: b"", id="empty"),
    pytest.param(lambda b: b[:3000] + bytes([b[3000] ^ 1]) + b[3001:], id="one bit")])
def test_a_damaged_converted_file_is_made_again(folder, openai_folder, damage):
    load_openai(folder)
    converted = folder / "converted.pth"
    whole = converted.read_bytes()
    converted.write_bytes(damage(whole))
    assert_bitwise(load_openai(folder)[0], expected_params(SMALL, openai_folder[1]))
    assert len(converted.read_bytes()) == len(whole)


def test_a_changed_checkpoint_is_noticed(folder):
    load_openai(folder)
    other = openai_variables(SMALL, seed=1)
    write_tensorflow(folder, SMALL, other)
    assert_bitwise(load_openai(folder)[0], expected_params(SMALL, other))


def test_a_folder_that_cannot_keep_the_converted_file_is_read_all_the_same(folder, openai_folder):
    (folder / "converted.pth").mkdir()
    assert_bitwise(load_openai(folder)[0], expected_params(SMALL, openai_folder[1]))


@pytest.mark.parametrize("name, missing, words", [
    ("model/wte", "tok_emb.weight", ("tok_emb.weight", "(97, 12) is needed, (97, 11) was given")),
    ("model/h1/attn/c_attn/w", "1.att.W_query.weight", ("trf_blocks.1.att.W_value.weight", "(12, 12)", "(11, 12)")),
    ("model/h0/ln_2/b", "trf_blocks.0.norm2.shift", ("trf_blocks.0.norm2.shift", "(12,) is needed, (11,) was given")),
    ("model/ln_f/g", "final_norm.scale", ("final_norm.scale", "(12,) is needed, (11,) was given"))])
def test_a_missing_or_misshapen_variable_is_refused_by_its_name_and_both_shapes(tmp_path, name, missing, words):
    variables = openai_variables(SMALL)
    array = variables.pop(name)
    write_tensorflow(tmp_path / "a", SMALL, variables)
    refused(lambda: load_openai(tmp_path / "a"), f"{missing} is missing")
    write_tensorflow(tmp_path / "b", SMALL, variables | {name: array[..., :-1]})
    refused(lambda: load_openai(tmp_path / "b"), *words)


def test_a_variable_that_gpt2_lacks_is_refused_by_its_name(tmp_path):
    write_tensorflow(tmp_path / "a", SMALL, openai_variables(SMALL) | {"model/h0/more": np.zeros(1, np.float32)})
    refused(lambda: load_openai(tmp_path / "a"), "0.more is unknown")


@pytest.mark.parametrize("change", [
    dict(n_layer=1),
    dict(n_layer=3),
    dict(n_embd=24),
    dict(n_vocab=98),
    dict(n_ctx=8),
    dict(n_head=5),
    dict(n_head=None)])
def test_a_checkpoint_that_does_not_match_its_hparams_is_refused(folder, change):
    (folder / "hparams.json").write_text(json.dumps(SMALL | change))
    refused(lambda: load_openai(folder), "hparams.json", error=ValueError)
    assert not (folder / "converted.pth").exists()


def write_html(path):
    path.write_bytes(b"<html><body>Sign in to the hotel's network</body></html>")


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip_bits(path):
    content = bytearray(path.read_bytes())
    for place in range(100, len(content), 997):
        content[place] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("name, damage, named", [
    ("hparams.json", write_html, "hparams.json"),
    (INDEX, write_html, "model.ckpt"),
    (INDEX, cut, "model.ckpt"),
    (INDEX, flip_bits, "model.ckpt"),
    (DATA, write_html, "model.ckpt"),
    (DATA, cut, "model.ckpt"),
    (DATA, flip_bits, "model.ckpt")])
def test_a_damaged_file_of_a_checkpoint_is_named_in_one_line_that_says_to_delete_it(folder, name, damage, named):
    damage(folder / name)
    refused(lambda: load_openai(folder), str(folder / named), "is damaged", "delete it", error=ValueError)


def test_both_command_lines_start_from_what_openai_published(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hparams = SMALL | dict(n_vocab=50257, n_ctx=300)
    write_tensorflow(tmp_path / "published" / "355M", hparams, openai_variables(hparams))
    server = serve(tmp_path / "published")
    (tmp_path / "a.txt").write_text(STORY.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    openai = ["--weights", "openai", "--size", "355M", "--base-url", server.url]
    data = ["--data", "a.txt", "--train-ratio", "0.4", "--batch-size", "1", "--eval-iter", "1"]

    def command(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *arguments, *openai])
        assert main() == 0
        return capsys.readouterr().out
    assert command(sample.main, "--max-new-tokens", "3").startswith("Every effort moves you")
    assert command(train.main, *data, "--epochs", "0").startswith("Training loss ")
    log = command(train.main, *data, "--epochs", "1", "--drop-rate", "0.1")
    assert log.startswith("Ep 1 (Step 000000)") and len(server.requests) == 3
    loaded = load_checkpoint("model.pth")
    assert (loaded.config.context_length, loaded.config.drop_rate) == (300, 0.1)
    assert loaded.run["settings"]["context_length"] == 256
    assert loaded.params["out_head.weight"] is loaded.params["tok_emb.weight"]


@LONG
def test_of_two_processes_the_first_alone_downloads(serve, tmp_path):
    hparams = SMALL | dict(n_vocab=50257, n_ctx=300)
    write_tensorflow(tmp_path / "published" / "355M", hparams, openai_variables(hparams))
    server = serve(tmp_path / "published")
    done = python("-m", "torch.distributed.run", "--nproc-per-node", "2", HERE / "train.py", "--data", STORY,
                  "--epochs", "0", "--weights", "openai", "--size", "355M", "--base-url", server.url, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("Training loss") == 1
    assert [name for name, _ in server.requests] == list(weights.OPENAI_FILES)


# Downloading

def test_a_finished_file_is_not_fetched_again(server, tmp_path):
    weights.download_openai("124M", tmp_path, server.url)
    assert len(server.requests) == 3
    weights.download_openai("124M", tmp_path, server.url)
    assert len(server.requests) == 3


def test_a_cut_connection_goes_on_where_it_broke(server, openai_folder, tmp_path):
    server.cuts[DATA] = 1
    weights.download_openai("124M", tmp_path, server.url)
    assert server.fetched(DATA) == [None, "bytes=8191-"]
    assert_whole(tmp_path, openai_folder[0])


def test_a_connection_that_always_breaks_is_reported_and_a_later_run_goes_on(server, openai_folder, tmp_path):
    server.cuts[DATA] = 3
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), DATA, INDEX, "hparams.json", str(tmp_path),
            "kept for the next try")
    assert (tmp_path / "124M" / f"{DATA}.partial").exists() and not (tmp_path / "124M" / DATA).exists()
    weights.download_openai("124M", tmp_path, server.url)
    assert server.fetched(DATA)[-1] is not None
    assert_whole(tmp_path, openai_folder[0])


def test_a_server_without_ranges_sends_the_file_from_the_start(server, openai_folder, tmp_path):
    server.ranges, server.cuts[DATA] = False, 1
    weights.download_openai("124M", tmp_path, server.url)
    assert server.fetched(DATA) == [None, "bytes=8191-"]
    assert_whole(tmp_path, openai_folder[0])


def test_a_partial_file_that_is_whole_costs_one_byte(server, openai_folder, tmp_path):
    (tmp_path / "124M").mkdir()
    shutil.copy(openai_folder[0] / DATA, tmp_path / "124M" / f"{DATA}.partial")
    weights.download_openai("124M", tmp_path, server.url)
    assert server.fetched(DATA) == [f"bytes={(openai_folder[0] / DATA).stat().st_size - 1}-"]
    assert_whole(tmp_path, openai_folder[0])


def test_a_partial_file_longer_than_the_servers_is_thrown_away(server, openai_folder, tmp_path):
    (tmp_path / "124M").mkdir()
    (tmp_path / "124M" / f"{DATA}.partial").write_bytes(b"x" * 10**6)
    weights.download_openai("124M", tmp_path, server.url)
    assert_whole(tmp_path, openai_folder[0])


def test_a_wrong_beginning_is_noticed_by_its_md5_and_fetched_anew(server, openai_folder, tmp_path):
    (tmp_path / "124M").mkdir()
    (tmp_path / "124M" / f"{DATA}.partial").write_bytes(b"x" * 100)
    weights.download_openai("124M", tmp_path, server.url)
    assert server.fetched(DATA) == ["bytes=99-", None]
    assert_whole(tmp_path, openai_folder[0])


def test_a_file_with_the_wrong_md5_never_gets_its_name(server, tmp_path):
    server.md5 = hashlib.md5(b"another file").digest()
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), "hparams.json", "not what the server")
    assert list((tmp_path / "124M").iterdir()) == []


def test_a_file_that_is_not_there_is_reported_at_once_and_nothing_is_said_to_be_kept(server, tmp_path):
    server.statuses = [404]
    message = refused(lambda: weights.download_openai("124M", tmp_path, server.url), "404", "By hand", str(tmp_path))
    assert len(server.requests) == 1 and "kept" not in message


def test_an_error_of_the_servers_is_tried_again(server, openai_folder, tmp_path):
    server.statuses = [500]
    weights.download_openai("124M", tmp_path, server.url)
    assert_whole(tmp_path, openai_folder[0])


def test_a_web_page_in_place_of_a_file_is_refused(server, openai_folder, tmp_path):
    server.html.add(INDEX)
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), INDEX, "web page")
    assert_whole(tmp_path, openai_folder[0])


def test_without_a_network_the_error_says_what_to_put_where(serve, tmp_path):
    server = Server(tmp_path)
    server.close()
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), "no connection", "hparams.json", INDEX, DATA,
            str(tmp_path / "124M"))


def test_a_server_that_speaks_no_tls_is_reported_at_once(server, tmp_path):
    url = server.url.replace("http:", "https:")
    message = refused(lambda: weights.download_openai("124M", tmp_path, url), url, "By hand", "REQUESTS_CA_BUNDLE")
    assert server.connections == 1 and "kept" not in message


def test_an_unknown_certificate_is_reported_at_once_with_the_variable_that_makes_it_known(
        serve, openai_folder, tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    key, known = tmp_path / "both.pem", tmp_path / "known.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", known, "-days", "2", "-subj", "/CN=127.0.0.1",
                    "-addext", "subjectAltName=IP:127.0.0.1",
                    "-addext", "keyUsage=critical,digitalSignature,keyCertSign"],
                   check=True, capture_output=True, timeout=60)
    key.write_text(key.read_text() + known.read_text())
    server = serve(openai_folder[0].parent, certificate=key)
    message = refused(lambda: weights.download_openai("124M", tmp_path, server.url), server.url, "certificate",
                      "REQUESTS_CA_BUNDLE", "By hand")
    assert server.connections == 1 and "kept" not in message
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(known))
    weights.download_openai("124M", tmp_path, server.url)
    assert_whole(tmp_path, openai_folder[0])


def test_a_size_that_does_not_exist_lists_those_that_do(tmp_path):
    refused(lambda: weights.download_openai("125M", tmp_path), "124M, 355M, 774M, 1558M", error=ValueError)


def test_a_place_that_cannot_be_written_is_reported(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        weights.download_openai("124M", tmp_path / "file", server.url)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_reported_and_leaves_no_file(server, tmp_path):
    (tmp_path / "124M").mkdir()
    (tmp_path / "124M" / "hparams.json.partial").symlink_to("/dev/full")
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), "No space left", error=OSError)
    assert not (tmp_path / "124M" / "hparams.json").exists()


# The real thing, in full size

FULL_SIZE = """
import re, sys, time
import torch, weights
begin = time.perf_counter()
if sys.argv[2] == "first":
    import tensorflow
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # this process's alone
before = peak()
params, _ = weights.load_openai(sys.argv[1])
size = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in params.values()}.values())
print((peak() - before) / size, time.perf_counter() - begin)
"""


@LONG
@LINUX
def test_the_124M_shape_arrives_bit_for_bit_and_within_its_memory(tmp_path):
    variables = openai_variables(FULL)
    folder = write_tensorflow(tmp_path / "124M", FULL, variables)
    seconds = []
    for start in ("first", "second"):
        begin = time.perf_counter()
        done = python("-c", FULL_SIZE, folder, start)
        whole = time.perf_counter() - begin
        assert done.returncode == 0, done.stderr
        memory, loading = map(float, done.stdout.split())
        print(f"{start} start: {loading:.2f} s, with Python and torch {whole:.2f} s, peak memory {memory:.2f} x the "
              "parameters'")
        assert memory <= 1.3 and (memory > 0.5 or start == "second")
        seconds.append(loading)
    assert seconds[1] < seconds[0] / 4
    assert_bitwise(load_openai(folder)[0], expected_params(FULL, variables))


def test_openais_124M_gives_the_sentence_and_the_losses_of_section_5_5():
    data = HERE / "gpt2" / "124M" / DATA
    if not data.exists() or data.stat().st_size != 497_759_232:
        pytest.skip("gpt2/124M is not there: `python sample.py --weights openai` downloads it")
    sentence = python("sample.py", "--weights", "openai", "--top-k", "50", "--temperature", "1.5", encoding="utf-8")
    assert sentence.stdout == ("Every effort moves you toward finding an ideal new way to practice something!\n\n"
                               "What makes us want to be on top of that?\n")
    losses = python("train.py", "--weights", "openai", "--epochs", "0").stdout
    assert "3.75475" in losses and "3.55962" in losses


# assign

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(shapes, shapes)
def test_assign_accepts_equal_shapes_and_refuses_all_others_naming_both(left, right):
    if left == right:
        assert weights.assign(torch.zeros(left), np.ones(right, np.float32)).equal(torch.ones(right))
    else:
        refused(lambda: weights.assign(torch.zeros(left), torch.ones(right)), str(left), str(right), error=ValueError)


# Our checkpoints

def trained(steps=2, seed=0, config=CONFIG, tied=False):
    """Parameters and optimizer state after a few steps."""
    generator = seeded(seed)
    params = init_params(config, generator)
    if tied:
        params["out_head.weight"] = params["tok_emb.weight"]
    opt_state = init_optimizer(params)
    for _ in range(steps):
        ids = torch.randint(config.vocab_size, (2, 9), generator=generator)
        params, opt_state, _ = train_step(params, opt_state, ids[:, :-1], ids[:, 1:], config, generator)
    return params, opt_state


@st.composite
def configs(draw):
    heads, whole = draw(st.integers(1, 3)), st.integers(1, 5)
    return Config(draw(whole), draw(whole), heads * draw(whole), heads, draw(st.integers(1, 3)),
                  draw(st.floats(0, 1, exclude_max=True)), draw(st.booleans()))


plain = st.none() | st.booleans() | st.integers(-2**63, 2**63) | st.floats(allow_nan=False) | st.text()
tensors = st.sampled_from([torch.arange(6).view(2, 3), torch.arange(4, dtype=torch.uint8), torch.tensor(0.5)])
values = st.recursive(plain | tensors | st.lists(plain, max_size=3), lambda inner: st.tuples(inner, inner)
                      | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6)
runs = st.dictionaries(st.text(), values, max_size=4) | st.builds(
    lambda run, lr: run | {"settings": {"lr": lr, "data": ("a.txt",)}}, st.dictionaries(st.text(), values, max_size=4),
    st.floats(1e-9, 1))


@st.composite
def checkpoints(draw):
    config, generator = draw(configs()), seeded(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    params = cast(init_params(config, generator), dtype)
    if draw(st.booleans()):
        params["out_head.weight"] = params["tok_emb.weight"]

    def moments():
        return map_params(lambda tensor: torch.empty_like(tensor).normal_(generator=generator), params)
    opt_state = draw(st.none() | st.integers(0, 2**24).map(lambda step: weights.OptState(step, moments(), moments())))
    return Checkpoint(params, config, opt_state, draw(runs))


@given(checkpoints())
def test_what_is_loaded_equals_what_was_saved(tmp_path_factory, saved):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert same(loaded, saved)
    of_each = [(saved.params, loaded.params)]
    if saved.opt_state:
        of_each += list(zip(saved.opt_state[1:], loaded.opt_state[1:], strict=True))
    for before, after in of_each:
        assert list(before) == list(after)
        assert [tensor.dtype for tensor in before.values()] == [tensor.dtype for tensor in after.values()]
        tied = [each["out_head.weight"] is each["tok_emb.weight"] for each in (before, after)]
        assert tied[0] == tied[1]
    assert not path.with_name("any.pth.partial").exists()


def test_a_saved_checkpoint_is_one_file(tmp_path):
    save_checkpoint(tmp_path / "a.pth", Checkpoint(trained()[0], CONFIG))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_tied_weights_are_in_the_file_once(tmp_path):
    sizes = []
    for tied in (False, True):
        params, opt_state = trained(tied=tied)
        save_checkpoint(tmp_path / "a.pth", Checkpoint(params, CONFIG, opt_state))
        sizes.append((tmp_path / "a.pth").stat().st_size)
    assert sizes[0] - sizes[1] >= 3 * params["tok_emb.weight"].nbytes


def test_a_checkpoint_can_be_read_without_its_run(tmp_path):
    params, opt_state = trained()
    save_checkpoint(tmp_path / "a.pth", Checkpoint(params, CONFIG, opt_state, {"loss": 1.0, "settings": {}}))
    assert same(load_checkpoint(tmp_path / "a.pth", with_run=False), Checkpoint(params, CONFIG))


@LINUX
def test_a_file_whose_name_is_not_in_utf_8_is_read(tmp_path):
    checkpoint = Checkpoint(init_params(CONFIG, seeded()), CONFIG)
    save_checkpoint(tmp_path / "a.pth", checkpoint)
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4.pth"))
    (tmp_path / "a.pth").rename(other)
    assert same(load_checkpoint(other), checkpoint)


@pytest.mark.parametrize("settings", [None, 1, "lr", [1, 2], torch.zeros(2)])
def test_settings_that_are_no_dict_are_called_damaged(tmp_path, settings):
    save_checkpoint(tmp_path / "a.pth", Checkpoint(init_params(CONFIG, seeded()), CONFIG, run={"settings": settings}))
    refused(lambda: load_checkpoint(tmp_path / "a.pth"), "a.pth: its settings are damaged", error=ValueError)
    assert load_checkpoint(tmp_path / "a.pth", with_run=False).config == CONFIG  # whose parameters are whole


def test_200_damaged_checkpoints_are_refused_or_equal(tmp_path):
    params, opt_state = trained()
    path, rng = tmp_path / "a.pth", random.Random(0)
    saved = Checkpoint(params, CONFIG, opt_state, {"settings": {"lr": 0.1}})
    save_checkpoint(path, saved)
    whole = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello", "world")
    damaged = [b"", b"<html>Not found</html>", (tmp_path / "other.zip").read_bytes(), whole[:-1], whole + b"x"]
    damaged += [whole[:rng.randrange(len(whole))] for _ in range(60)]
    for _ in range(140):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 20])):
            content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        damaged.append(bytes(content))
    outcomes = {"refused": 0, "equal": 0}
    for content in damaged:
        path.write_bytes(content)
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes["refused"] += 1
        else:
            assert same(loaded, saved)
            outcomes["equal"] += 1
    print(outcomes)
    assert outcomes["refused"] > 100


def test_a_folder_in_place_of_a_file_is_an_error_of_the_systems(tmp_path):
    with pytest.raises(OSError):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [
    [1, 2],
    "text",
    {"a": 1},
    {},
    {"model_state_dict": 3},
    {"config": 1},
    {"tok_emb.weight": torch.zeros(3)},
    torch.zeros(2)], ids=str)
def test_a_file_with_something_else_in_it_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(lambda: load_checkpoint(tmp_path / "a.pth"), "a.pth", error=ValueError)


def test_missing_unknown_and_misshapen_parameters_are_refused_by_name(tmp_path):
    params, _ = trained()
    name = "trf_blocks.1.ff.layers.0.weight"
    for changed, *words in (({k: v for k, v in params.items() if k != name}, name, "missing"),
                            (params | {name: torch.zeros(2, 2)}, name, "(64, 16) is needed, (2, 2) was given"),
                            (params | {name: [1]}, name, "no tensor of floating point numbers"),
                            (params | {name: torch.zeros(64, 16, dtype=torch.long)}, name, "no tensor of floating"),
                            (params | {"more": torch.zeros(1)}, "more is unknown")):
        torch.save(changed, tmp_path / "a.pth")
        refused(lambda words=words: load_checkpoint(tmp_path / "a.pth"), *words, error=ValueError)


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize("config, words", [
    (asdict(CONFIG) | {"rope_base": 10_000}, ("'rope_base'",)),
    (without(asdict(CONFIG), "n_heads"), ("'n_heads'",)),
    (asdict(CONFIG) | {"n_heads": 5}, ("emb_dim 16", "n_heads 5")),
    (asdict(CONFIG) | {"drop_rate": "high"}, ("drop_rate", "'high'")),
    (asdict(CONFIG) | {"context_length": 9}, ("pos_emb.weight", "(9, 16)", "(8, 16)"))], ids=lambda value: None)
def test_a_configuration_that_does_not_fit_is_refused_by_the_name_of_what_is_wrong(tmp_path, config, words):
    torch.save({"model_state_dict": trained()[0], "config": config}, tmp_path / "a.pth")
    refused(lambda: load_checkpoint(tmp_path / "a.pth"), str(tmp_path / "a.pth"), *words, error=ValueError)


def test_a_transposed_view_is_not_taken_for_the_tensor_that_it_shows(tmp_path):
    config = Config(16, 8, 16, 2, 1, 0.0, False)  # the output head and the embedding are square
    params = init_params(config, seeded())
    torch.save(params | {"out_head.weight": params["tok_emb.weight"].T}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", n_heads=2).params
    assert torch.equal(loaded["out_head.weight"], params["tok_emb.weight"].T)


@pytest.mark.parametrize("content", [
    {"model_state_dict": {}, "config": asdict(CONFIG) | {"n_layers": 10**9}},
    init_params(CONFIG, seeded()) | {"trf_blocks.999999999.norm1.scale": torch.ones(16)},
    {"wte.weight": torch.ones(9, 8), "wpe.weight": torch.ones(9, 8), "h.999999999.ln_1.weight": torch.ones(8)}],
    ids=["config", "the chapter's", "Hugging Face's"])
def test_a_small_file_cannot_ask_for_a_billion_layers(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(lambda: load_checkpoint(tmp_path / "a.pth", n_heads=2), "a.pth", error=ValueError)


def test_a_number_of_heads_that_is_a_guess_is_told_in_a_note(tmp_path):
    params = init_params(Config(41, 8, 128, 2, 1, 0.0, False), seeded())
    torch.save(params, tmp_path / "a.pth")
    guess, told = load_checkpoint(tmp_path / "a.pth"), load_checkpoint(tmp_path / "a.pth", n_heads=4)
    assert guess.config.n_heads == 2 and told.config.n_heads == 4
    assert len(guess.notes) == 1 and told.notes == ()
    assert all(word in guess.notes[0] for word in (str(tmp_path / "a.pth"), "2", "--n-heads"))


def test_a_number_of_heads_that_contradicts_the_file_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pth", Checkpoint(init_params(GPT2, seeded()), GPT2))
    refused(lambda: load_model(str(tmp_path / "a.pth"), n_heads=4), "--n-heads 4", "a.pth", "2 there", error=ValueError)


def test_an_optimizer_before_its_first_step_has_no_state(tmp_path):
    params, _ = trained()
    optimizer = AdamW(params.values()).state_dict()
    torch.save({"model_state_dict": params, "optimizer_state_dict": optimizer}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", n_heads=2)
    assert loaded.opt_state is None and loaded.notes == ()


def test_parameters_saved_transposed_train_as_others_do(tmp_path):
    params, opt_state = trained()
    torch_format = partial(map_params, lambda tensor: tensor.T.contiguous().T if tensor.ndim == 2 else tensor)
    losses = []
    for change in (dict, torch_format):
        moments = weights.OptState(2, *map(change, opt_state[1:]))
        save_checkpoint(tmp_path / "a.pth", Checkpoint(change(params), CONFIG, moments))
        loaded = load_checkpoint(tmp_path / "a.pth")
        losses.append(our_losses(loaded.params, loaded.opt_state, CONFIG))
    assert losses[0] == losses[1]


# Writing

@POSIX
def test_a_symbolic_link_stays_one_and_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real.pth").write_bytes(b"old")
    (tmp_path / "a.pth").symlink_to(Path("disk") / "real.pth")
    with weights.write_atomically(tmp_path / "a.pth") as file:
        file.write(b"new")
        assert (tmp_path / "disk" / "real.pth").read_bytes() == b"old"
    assert (tmp_path / "a.pth").is_symlink() and (tmp_path / "disk" / "real.pth").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.pth", "disk", "real.pth"]


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
def test_the_permissions_of_a_file_that_is_there_are_kept(tmp_path, mode):
    (tmp_path / "a.pth").write_bytes(b"old")
    (tmp_path / "a.pth").chmod(mode)
    with weights.write_atomically(tmp_path / "a.pth") as file:
        file.write(b"new")
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == mode and (tmp_path / "a.pth").read_bytes() == b"new"


def test_a_missing_folder_is_named_as_the_user_wrote_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = os.path.join("no", "such", "a.pth")
    with pytest.raises(FileNotFoundError) as caught:
        save_checkpoint(path, Checkpoint(trained()[0], CONFIG))
    assert caught.value.filename == path and list(tmp_path.iterdir()) == []


def test_a_program_that_fails_while_it_writes_leaves_the_old_file(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), weights.write_atomically(tmp_path / "a.pth") as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"] and (tmp_path / "a.pth").read_bytes() == b"old"


SAVER = """
import sys, torch
from gpt import Config, init_params
from train import init_optimizer
from weights import Checkpoint, save_checkpoint
config = Config(2000, 8, 128, 2, 2, 0.0, False)
params = init_params(config, torch.Generator())
for value in range(1, 10**6):
    params = {name: torch.full_like(tensor, value) for name, tensor in params.items()}
    print(value, flush=True)
    save_checkpoint(sys.argv[1], Checkpoint(params, config, init_optimizer(params)))
"""


def only_value(path):
    """The number that all parameters of a file consist of."""
    params = load_checkpoint(path).params.values()
    values = {float(tensor.min()) for tensor in params} | {float(tensor.max()) for tensor in params}
    assert len(values) == 1
    return values.pop()


def stop_within_a_write(saver, unfinished, draw_size):
    """Stops the process while it writes, when so many bytes are there."""
    while True:
        wanted = draw_size()
        while wanted > 0:
            assert saver.poll() is None
            with suppress(FileNotFoundError):
                wanted = 0 if unfinished.stat().st_size >= wanted else wanted
        saver.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(saver.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        if unfinished.exists():
            return
        saver.send_signal(signal.SIGCONT)


@POSIX
def test_a_process_killed_while_saving_leaves_the_old_checkpoint_and_a_reader_finds_it_or_the_new_one(tmp_path):
    path, unfinished, rng = tmp_path / "a.pth", tmp_path / "a.pth.partial", random.Random(0)
    for _ in range(100 if LONG_TESTS else 1):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, path], cwd=HERE, stdout=subprocess.PIPE, text=True)
        watchdog = threading.Timer(120, saver.kill)
        watchdog.start()
        try:
            for line in saver.stdout:
                if int(line) == 3:
                    break
            assert only_value(path) >= 2  # it goes on saving while we read
            stop_within_a_write(saver, unfinished, lambda: rng.random() * path.stat().st_size)
        finally:
            saver.kill()
            latest = max([3, *(int(line) for line in saver.stdout if line.strip())])
            saver.wait(60)
            watchdog.cancel()
        assert unfinished.exists() and only_value(path) == latest - 1


@LINUX
def test_a_limit_on_file_size_and_a_full_disk_leave_the_old_checkpoint_and_no_litter(tmp_path):
    import resource
    checkpoint = Checkpoint(trained()[0], CONFIG)
    save_checkpoint(tmp_path / "a.pth", checkpoint)
    old = (tmp_path / "a.pth").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        refused(lambda: save_checkpoint(tmp_path / "a.pth", checkpoint), "File too large", str(tmp_path / "a.pth"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (tmp_path / "a.pth.partial").symlink_to("/dev/full")
    refused(lambda: save_checkpoint(tmp_path / "a.pth", checkpoint), "No space left", str(tmp_path / "a.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"] and (tmp_path / "a.pth").read_bytes() == old


# Memory that is short

SHORT_OF_MEMORY = """
import re, resource, sys, torch
from train import tune_allocator
from weights import load_checkpoint

def limit(room):
    size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1])
    resource.setrlimit(resource.RLIMIT_AS, (size + room if room else resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def attempt(load):
    try:
        return type(load(sys.argv[1])).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]

load_checkpoint(sys.argv[1], n_heads=2)
limit(2**22)
print(attempt(load_checkpoint))
limit(None)
tune_allocator()
torch.ones(3 * 2**23)  # the memory of what is freed stays: there is room for the tensors, but for no mapping
limit(2**22)
print(attempt(lambda path: torch.load(path, mmap=True)))
print(attempt(lambda path: load_checkpoint(path, n_heads=2)))
limit(None)
print(load_checkpoint(sys.argv[1], n_heads=2).params["pos_emb.weight"].sum().item())
"""


@pytest.fixture(scope="module")
def short_of_memory(tmp_path_factory):
    """What becomes of a file of 20 MB where there is no room for it, and then where there is none to map it."""
    path = tmp_path_factory.mktemp("memory") / "a.pth"
    torch.save(map_params(torch.ones_like, init_params(Config(20_000, 8, 128, 2, 1, 0.0, False), seeded())), path)
    done = python("-c", SHORT_OF_MEMORY, path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@LINUX
@GLIBC
def test_a_file_that_cannot_be_mapped_is_read(short_of_memory):
    _, mapped, read, total = short_of_memory
    assert "mmap" in mapped and (read, float(total)) == ("Checkpoint", 8 * 128)


@LINUX
@GLIBC
def test_a_file_that_does_not_fit_into_memory_is_not_called_damaged(short_of_memory):
    assert "memory" in short_of_memory[0].lower() and "damaged" not in short_of_memory[0]


# Files of other tools: models

def ids_of(config):
    return torch.randint(config.vocab_size, (2, 8), generator=seeded(1))


def assert_same_model(loaded, logits_of):
    """The parameters give the logits, and the greedy continuation, that logits_of gives for tokens."""
    params, ids = cast(loaded.params, torch.float32), ids_of(loaded.config)
    with torch.no_grad():
        assert close(forward(params, ids, loaded.config), logits_of(ids))
        continued = ids
        for _ in range(3):
            continued = torch.cat([continued, logits_of(continued)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(params, ids, loaded.config, 3), continued)


@pytest.fixture(scope="module")
def ch04():
    return pytest.importorskip("llms_from_scratch.ch04", reason="needs `pip install --no-deps llms-from-scratch`")


def chapter_model(ch04, config, tied=False):
    """The chapter's own model. Its biases are not zero, so that they count."""
    torch.manual_seed(5)
    model = ch04.GPTModel(asdict(config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if tied:
        model.out_head.weight = model.tok_emb.weight
    return model


def with_optimizer(model):
    """What the chapter saves in section 5.4, after a step."""
    optimizer = AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    torch_losses(model, optimizer, steps=1)
    return {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}


parallel = torch.nn.DataParallel


@pytest.mark.parametrize("content", [
    pytest.param(lambda model: model.state_dict(), id="state_dict alone"),
    pytest.param(with_optimizer, id="with its optimizer"),
    pytest.param(lambda model: {"model_state_dict": model.state_dict()}, id="model_state_dict alone"),
    pytest.param(lambda model: dict(model.named_parameters(remove_duplicate=False)), id="parameters without masks"),
    pytest.param(lambda model: torch.compile(model).state_dict(), id="torch.compile"),
    pytest.param(lambda model: parallel(model).state_dict(), id="DataParallel"),
    pytest.param(lambda model: torch.compile(parallel(model)).state_dict(), id="torch.compile of DataParallel"),
    pytest.param(lambda model: parallel(torch.compile(model)).state_dict(), id="DataParallel of torch.compile"),
    pytest.param(lambda model: model.half().float().half().state_dict(), id="float16"),
    pytest.param(lambda model: model.bfloat16().state_dict(), id="bfloat16"),
    pytest.param(lambda model: model.double().state_dict(), id="float64")])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_file_of_the_chapters_model_gives_that_model(ch04, tmp_path, content, tied):
    model = chapter_model(ch04, GPT2, tied)
    torch.save(content(model), tmp_path / "model.pth")
    loaded = load_model(str(tmp_path / "model.pth"), n_heads=2)
    assert (loaded.config, loaded.opt_state, loaded.run, loaded.notes) == (GPT2, None, {}, ())
    assert (loaded.params["out_head.weight"] is loaded.params["tok_emb.weight"]) == tied
    assert_same_model(loaded, model.float().cpu())  # DataParallel takes a model to the GPU, where there is one


def test_a_file_in_the_format_before_2020_gives_its_model(ch04, tmp_path):
    model = chapter_model(ch04, GPT2)
    torch.save(model.state_dict(), tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "model.pth")
    assert_same_model(load_model(str(tmp_path / "model.pth"), n_heads=2), model)


def test_the_chapters_faster_model_is_refused_by_the_name_of_its_first_unknown_parameter(ch04, tmp_path):
    model = ch04.GPTModelFast(asdict(GPT2))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    unknown = next(name for name in model.state_dict() if "qkv" in name)
    refused(lambda: load_model(str(tmp_path / "a.pth"), n_heads=2), f"the parameter {unknown} is unknown")


class Payload:
    """What pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["", "in the format before 2020"])
@pytest.mark.parametrize("thing, name", [
    (lambda mark: Payload(f"touch {mark}"), f"{os.name}.system"),
    (lambda mark: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    (lambda mark: AdamW([torch.zeros(1)]), "torch.optim.adamw.AdamW"),
    (lambda mark: argparse.Namespace(lr=1), "argparse.Namespace"),
    (lambda mark: np.float64(3), "numpy._core.multiarray.scalar"),
    (lambda mark: collections.defaultdict(list), "collections.defaultdict")], ids=lambda value: None)
def test_a_file_with_another_object_in_it_is_refused_by_its_class_and_runs_nothing(tmp_path, thing, name, zipped):
    torch.save({"model_state_dict": trained()[0], "more": thing(tmp_path / "mark")}, tmp_path / "a.pth",
               _use_new_zipfile_serialization=zipped)
    refused(lambda: load_checkpoint(tmp_path / "a.pth"), str(tmp_path / "a.pth"), name, "could run code",
            error=ValueError)
    assert not (tmp_path / "mark").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Payload(f"touch {tmp_path / 'mark'}"), protocol))
    refused(lambda: load_checkpoint(tmp_path / "a.pkl"), str(tmp_path / "a.pkl"), error=ValueError)
    assert not (tmp_path / "mark").exists()


def test_a_saved_module_is_refused_by_its_class(ch04, tmp_path):
    torch.save(chapter_model(ch04, CONFIG), tmp_path / "a.pth")
    refused(lambda: load_checkpoint(tmp_path / "a.pth"), "llms_from_scratch.ch04.GPTModel", "state_dict()")


def save_safetensors(state, path):
    pytest.importorskip("safetensors.torch").save_file({key: value.contiguous() for key, value in state.items()}, path)


save_old = partial(torch.save, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, save_old, save_safetensors], ids=["zip", "before 2020", "safetensors"])
def test_half_a_file_of_any_format_is_called_damaged(tmp_path, save):
    save(trained()[0], tmp_path / "a.pth")
    cut(tmp_path / "a.pth")
    refused(lambda: load_checkpoint(tmp_path / "a.pth"), str(tmp_path / "a.pth"), "damaged", error=ValueError)


# Files of other tools: Hugging Face's GPT-2

def prefixed(state):
    return {f"transformer.{name}": tensor for name, tensor in state.items()}


def with_masks(state):
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    return state | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


def with_tied_head(state):
    return prefixed(state) | {"lm_head.weight": state["wte.weight"]}


@pytest.mark.parametrize("change, save", [
    pytest.param(dict, save_safetensors, id="without lm_head, safetensors"),
    pytest.param(dict, torch.save, id="without lm_head"),
    pytest.param(prefixed, save_safetensors, id="transformer., safetensors"),
    pytest.param(prefixed, torch.save, id="transformer."),
    pytest.param(with_masks, save_safetensors, id="masks, safetensors"),
    pytest.param(with_masks, torch.save, id="masks"),
    pytest.param(with_tied_head, torch.save, id="tied lm_head"),
    pytest.param(with_tied_head, save_old, id="tied lm_head, before 2020"),
    pytest.param(lambda state: {"model_state_dict": with_tied_head(state)}, torch.save, id="in a model_state_dict")])
def test_hugging_faces_names_and_layout_become_ours_bit_for_bit(tmp_path, change, save):
    variables = openai_variables(SMALL)
    save(change(huggingface_state(SMALL, variables)), tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model", n_heads=3)
    assert loaded.config == Config(97, 16, 12, 3, 2, 0.0, True) and loaded.notes == ()
    assert_bitwise(loaded.params, expected_params(SMALL, variables))
    assert_independent_forward_agrees(loaded.params, loaded.config, variables, SMALL)


def test_a_head_of_its_own_stays_its_own(tmp_path):
    variables, head = openai_variables(SMALL), openai_variables(SMALL, seed=1)["model/wte"]
    state = huggingface_state(SMALL, variables) | {"lm_head.weight": torch.from_numpy(head)}
    torch.save(state, tmp_path / "model.bin")
    loaded = load_checkpoint(tmp_path / "model.bin", n_heads=3)
    assert_bitwise(loaded.params, expected_params(SMALL, variables) | {"out_head.weight": head}, tied=False)
    ids = torch.arange(16)
    theirs = numpy_forward(variables | {"model/head": head}, ids.numpy(), SMALL, head="head")
    assert close(forward(loaded.params, ids[None], loaded.config)[0], theirs)


@pytest.mark.parametrize("change, words", [
    (lambda state: without(state, "h.1.mlp.c_fc.bias"), ("trf_blocks.1.ff.layers.0.bias is missing",)),
    (lambda state: state | {"h.1.cross.bias": torch.ones(12)}, ("1.cross.bias is unknown",)),
    (lambda state: state | {"ln_f.weight": torch.ones(11)}, ("final_norm.scale", "(12,)", "(11,)"))],
    ids=["missing", "unknown", "misshapen"])
def test_another_model_under_hugging_faces_names_is_refused_by_name(tmp_path, change, words):
    torch.save(change(huggingface_state(SMALL, openai_variables(SMALL))), tmp_path / "model.bin")
    refused(lambda: load_checkpoint(tmp_path / "model.bin", n_heads=3), str(tmp_path / "model.bin"), *words)


def huggingface_folder(folder, save=torch.save, file="pytorch_model.bin", **told):
    """A folder with GPT-2 as Hugging Face has it, and its variables."""
    hparams = SMALL | dict(n_vocab=50257)
    variables = openai_variables(hparams)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 3} | told))
    save(prefixed(huggingface_state(hparams, variables)), folder / file)
    return hparams, variables


@pytest.mark.parametrize("save, file", [
    (torch.save, "pytorch_model.bin"),
    (save_safetensors, "model.safetensors")])
def test_a_folder_is_loaded_with_the_number_of_heads_that_its_config_tells(tmp_path, save, file):
    hparams, variables = huggingface_folder(tmp_path / "gpt2", save, file)
    for name in (tmp_path / "gpt2", tmp_path / "gpt2" / file):
        loaded = load_model(str(name))
        assert (loaded.config, loaded.notes) == (Config(50257, 16, 12, 3, 2, 0.0, True), ())
        assert_bitwise(loaded.params, expected_params(hparams, variables))
    assert_independent_forward_agrees(loaded.params, loaded.config, variables, hparams)
    refused(lambda: load_model(str(tmp_path / "gpt2"), n_heads=4), "--n-heads 4", "3 there")


@pytest.mark.parametrize("told, word", [
    ({"activation_function": "gelu"}, "activation"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx")], ids=str)
def test_a_config_that_asks_for_another_function_than_gpt2s_is_refused_by_name(tmp_path, told, word):
    huggingface_folder(tmp_path / "gpt2", **told)
    refused(lambda: load_model(str(tmp_path / "gpt2")), "config.json", word, error=ValueError)


@pytest.mark.parametrize("n_head, words", [
    (5, "n_heads 5"),
    ("many", "'many'"),
    (-3, "-3")], ids=str)
def test_a_number_of_heads_that_makes_no_sense_is_refused(tmp_path, n_head, words):
    huggingface_folder(tmp_path / "gpt2", n_head=n_head)
    refused(lambda: load_model(str(tmp_path / "gpt2")), words, error=ValueError)


def test_a_config_that_leaves_the_number_of_heads_open_lets_the_user_choose(tmp_path):
    huggingface_folder(tmp_path / "gpt2", n_head=None)
    assert load_model(str(tmp_path / "gpt2"), n_heads=3).config.n_heads == 3


def test_a_damaged_config_is_named(tmp_path):
    huggingface_folder(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").write_text("{")
    refused(lambda: load_model(str(tmp_path / "gpt2")), "config.json is damaged", error=ValueError)


def test_what_is_no_model_of_gpt2s_vocabulary_is_refused_with_the_reason(tmp_path):
    refused(lambda: load_model(str(tmp_path / "a.pth")), "a.pth", "train.py --checkpoint", error=ValueError)
    refused(lambda: load_model(str(tmp_path)), "no model.safetensors", str(tmp_path), error=ValueError)
    save_checkpoint(tmp_path / "a.pth", Checkpoint(trained()[0], CONFIG))
    refused(lambda: load_model(str(tmp_path / "a.pth")), "41 tokens", "50257", error=ValueError)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs `pip install transformers`")


def transformers_model(transformers, **options):
    """A small GPT2LMHeadModel in which every parameter counts."""
    torch.manual_seed(5)
    config = transformers.GPT2Config(n_positions=16, n_embd=12, n_layer=2, n_head=3, **options)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_pretrained(model, folder):
    model.save_pretrained(folder)
    return folder


def save_file(model, folder):
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def save_bin(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def save_bare(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.transformer.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def save_bare_pretrained(model, folder):
    model.transformer.save_pretrained(folder)
    return folder


def save_compiled(model, folder):
    model.config.save_pretrained(folder)
    torch.save(torch.compile(model).state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}], ids=["", "head of its own"])
@pytest.mark.parametrize("save", [save_pretrained, save_file, save_bin, save_bare, save_bare_pretrained, save_compiled])
def test_what_transformers_saves_gives_its_logits(transformers, tmp_path, save, options):
    model = transformers_model(transformers, **options)
    if options and save in (save_bare, save_bare_pretrained):
        pytest.skip("a GPT2Model has no head")
    loaded = load_model(str(save(model, tmp_path)))
    assert (loaded.config, loaded.notes) == (Config(50257, 16, 12, 3, 2, 0.0, True), ())
    assert (loaded.params["out_head.weight"] is loaded.params["tok_emb.weight"]) == (not options)
    assert_same_model(loaded, lambda ids: model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("save", [save_pretrained, save_bin])
def test_what_transformers_saves_in_16_bits_gives_the_logits_of_the_rounded_model(transformers, tmp_path, save, dtype):
    model = transformers_model(transformers).to(dtype)
    loaded = load_model(str(save(model, tmp_path)))
    assert_same_model(loaded, lambda ids: model.float()(ids).logits)


def test_a_model_of_transformers_with_its_optimizer_is_loaded_without_that(transformers, tmp_path):
    model = transformers_model(transformers)
    optimizer = AdamW(model.parameters())
    model(ids_of(GPT2)).logits.sum().backward()
    optimizer.step()
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()},
               tmp_path / "a.pth")
    assert_same_model(load_model(str(tmp_path / "a.pth"), n_heads=3), lambda ids: model(ids).logits)
    loaded = load_checkpoint(tmp_path / "a.pth", n_heads=3)
    assert loaded.opt_state is None and "moments start anew" in loaded.notes[0]


# Files of other tools: optimizers

class Module(torch.nn.Module):
    """A module with our parameters, registered in the order of the dict. It computes what `forward` does."""

    def __init__(self, params, config):
        super().__init__()
        self.config = config
        for name, parameter in map_params(torch.nn.Parameter, params).items():
            module, *path, last = self, *name.split(".")
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, parameter)

    def forward(self, ids):
        return forward(dict(self.named_parameters(remove_duplicate=False)), ids, self.config)


def torch_losses(module, optimizer, steps=5):
    """The losses of steps of torch's optimizer."""
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(module(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_losses(params, opt_state, config, steps=5, **options):
    """The losses of steps of ours; the tensors that are passed are written into."""
    params, opt_state = map_params(torch.clone, params), weights.OptState(
        opt_state.step, *(map_params(torch.clone, moments) for moments in opt_state[1:]))
    losses = []
    for _ in range(steps):
        params, opt_state, loss = train_step(params, opt_state, IDS[:, :-1], IDS[:, 1:], config, **options)
        losses.append(loss.item())
    return losses


def value_first(params):
    """The same parameters in another order: value before key before query."""
    swapped = {"W_query": "W_value", "W_value": "W_query"}
    names = [".".join(swapped.get(part, part) for part in name.split(".")) for name in params]
    return {name: params[name] for name in names}


def as_they_are(module):
    return module.parameters()


def decay_or_not(module):
    return [{"params": [each for each in module.parameters() if each.ndim > 1], "weight_decay": 0.2},
            {"params": [each for each in module.parameters() if each.ndim < 2], "weight_decay": 0.0}]


def assert_notes_tell_of_two_decays(notes, told):
    words = "several values of weight_decay: all parameters get 0.2"
    assert len(notes) == told and all(words in note for note in notes)


def named(module):
    return module.named_parameters()


def named_groups(module):
    """Groups that split the blocks, which the shapes alone could not tell apart."""
    pairs = list(module.named_parameters())
    return [{"params": [pair for pair in pairs if "blocks.1" in pair[0]]},
            {"params": [pair for pair in pairs if "blocks.1" not in pair[0]]}]


def named_by_compile(module):
    return torch.compile(module).named_parameters()


PLAIN = Config(vocab_size=41, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=False)


def stepped(parameters_of=as_they_are, order=dict, tied=False, config=PLAIN, dtype=torch.float32, steps=3, **options):
    """A module and its AdamW after some steps."""
    params = cast(init_params(config, seeded()), dtype)
    if tied:
        params["out_head.weight"] = params["tok_emb.weight"]
    module = Module(order(params), config)
    optimizer = AdamW(parameters_of(module), **dict(lr=1e-3, weight_decay=0.2) | options)
    torch_losses(module, optimizer, steps)
    return module, optimizer


def save_both(module, optimizer_state, path):
    torch.save({"model_state_dict": module.state_dict(), "optimizer_state_dict": optimizer_state}, path)


def assert_moments_are(opt_state, module, optimizer, steps=3):
    """The moments are those that torch's optimizer keeps for the parameter of that name."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    assert opt_state.step == steps
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = getattr(opt_state, kind)
        assert moments.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert torch.equal(moments[name], optimizer.state[parameter][kind]), name


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("order", [dict, value_first])
@pytest.mark.parametrize("parameters_of", [as_they_are, decay_or_not, named, named_groups, named_by_compile])
def test_the_moments_arrive_under_the_names_of_their_parameters(tmp_path, parameters_of, order, tied):
    module, optimizer = stepped(parameters_of, order, tied)
    save_both(module, optimizer.state_dict(), tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", n_heads=2)
    assert_notes_tell_of_two_decays(loaded.notes, parameters_of is decay_or_not)
    assert_moments_are(loaded.opt_state, module, optimizer)
    for moments in loaded.opt_state[1:]:
        assert (moments["out_head.weight"] is moments["tok_emb.weight"]) == tied


@pytest.mark.parametrize("order", [dict, value_first])
@pytest.mark.parametrize("parameters_of", [as_they_are, decay_or_not])
def test_the_moments_arrive_where_names_are_the_keys(tmp_path, parameters_of, order):
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    module, optimizer = stepped(parameters_of, order)
    state = dcp.get_optimizer_state_dict(module, optimizer)
    assert "tok_emb.weight" in state["state"]
    save_both(module, state, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", n_heads=2)
    assert_notes_tell_of_two_decays(loaded.notes, parameters_of is decay_or_not)
    assert_moments_are(loaded.opt_state, module, optimizer)


def reversed_blocks(module):
    """One group a block, the last block first."""
    parts = [module.tok_emb, module.pos_emb, module.trf_blocks.get_submodule("1"), module.trf_blocks.get_submodule("0"),
             module.final_norm, module.out_head]
    return [{"params": list(part.parameters())} for part in parts]


def biases_first(module):
    """Groups that have shapes in common, in another order than the model's."""
    parameters = list(module.parameters())
    return [{"params": parameters[5:]}, {"params": parameters[:5]}]


@pytest.mark.parametrize("parameters_of", [reversed_blocks, biases_first])
def test_moments_whose_owner_the_file_does_not_tell_start_anew(tmp_path, parameters_of):
    module, optimizer = stepped(parameters_of)
    save_both(module, optimizer.state_dict(), tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", n_heads=2)
    assert loaded.opt_state is None and len(loaded.notes) == 1 and "moments start anew" in loaded.notes[0]


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("order", [dict, value_first])
@pytest.mark.parametrize("parameters_of", [as_they_are, named_groups])
def test_five_more_steps_are_those_of_torch(tmp_path, parameters_of, order, tied):
    for dtype, roundings in ((torch.float32, 5 * 20), (torch.float64, 1e-3)):  # of 5 steps; in float64 next to none
        module, optimizer = stepped(parameters_of, order, tied, dtype=dtype)
        save_both(module, optimizer.state_dict(), tmp_path / "a.pth")
        loaded = load_checkpoint(tmp_path / "a.pth", n_heads=2)
        ours = our_losses(loaded.params, loaded.opt_state, PLAIN, dtype=dtype, **loaded.run["settings"])
        theirs = torch_losses(module, optimizer)
        assert theirs[4] < theirs[0] and close(torch.tensor(ours), torch.tensor(theirs), roundings)


def test_the_rate_and_the_decay_of_the_first_group_become_settings_and_its_other_options_a_note(tmp_path):
    for options in (dict(), dict(betas=(0.9, 0.95)), dict(eps=1e-6)):
        module, optimizer = stepped(decay_or_not, lr=0.003, **options)
        save_both(module, optimizer.state_dict(), tmp_path / "a.pth")
        loaded = load_checkpoint(tmp_path / "a.pth", n_heads=2)
        assert loaded.run == {"settings": {"lr": 0.003, "weight_decay": 0.2}}
        assert_notes_tell_of_two_decays(loaded.notes[len(options):], True)
        assert loaded.opt_state.step == 3
        for value in options.values():
            words = (str(value), str(tmp_path / "a.pth"), "(0.9, 0.999)", "1e-08")
            assert all(word in loaded.notes[0] for word in words)


def all_of(kind, **options):
    """An optimizer over all parameters, after two steps."""
    def make(module):
        optimizer = kind(module.parameters(), **options)
        torch_losses(module, optimizer, 2)
        return optimizer
    return make


def frozen_and_left_out(module):
    module.tok_emb.requires_grad_(False)
    optimizer = AdamW([parameter for parameter in module.parameters() if parameter.requires_grad])
    torch_losses(module, optimizer, 2)
    return optimizer


def frozen(module):
    module.tok_emb.requires_grad_(False)
    return all_of(AdamW)(module)


@pytest.mark.parametrize("make", [
    pytest.param(all_of(SGD, lr=0.1), id="SGD"),
    pytest.param(all_of(SGD, lr=0.1, momentum=0.9), id="SGD with momentum"),
    pytest.param(all_of(Adafactor), id="Adafactor"),
    pytest.param(all_of(RMSprop, lr=1e-3), id="RMSprop"),
    pytest.param(all_of(NAdam), id="NAdam"),
    pytest.param(all_of(RAdam), id="RAdam"),
    pytest.param(all_of(AdamW, amsgrad=True), id="amsgrad"),
    pytest.param(frozen, id="a frozen parameter"),
    pytest.param(frozen_and_left_out, id="a frozen parameter that is left out")])
def test_an_optimizer_that_is_not_adamw_over_all_parameters_is_told_in_a_note_and_sampling_never_minds(tmp_path, make):
    config = Config(50257, 12, 8, 2, 1, 0.1, False)
    module = Module(init_params(config, seeded()), config)
    save_both(module, make(module).state_dict(), tmp_path / "a.pth")
    loaded = load_model(str(tmp_path / "a.pth"), n_heads=2)
    assert (loaded.config, loaded.opt_state, loaded.run, loaded.notes) == (config, None, {}, ())
    assert_same_model(loaded, module)
    loaded = load_checkpoint(tmp_path / "a.pth", n_heads=2)
    assert loaded.opt_state is None and len(loaded.notes) == 1
    assert all(word in loaded.notes[0] for word in (str(tmp_path / "a.pth"), "not AdamW", "start anew"))


# The chapter's own model and optimizer

WIDE = Config(vocab_size=41, context_length=8, emb_dim=128, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=False)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("config", [WIDE, CONFIG], ids=["", "qkv_bias"])
def test_the_chapters_model_opens_our_file_strictly(ch04, tmp_path, config, tied):
    params, opt_state = trained(config=config, tied=tied)
    save_checkpoint(tmp_path / "a.pth", Checkpoint(params, config, opt_state))
    model = chapter_model(ch04, config, tied)
    masks = {name: mask.clone() for name, mask in model.state_dict().items() if name.endswith("mask")}
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    model.load_state_dict(content["model_state_dict"], strict=True)
    for name, mask in masks.items():
        assert torch.equal(mask, content["model_state_dict"][name])
    assert close(model(IDS[:, :-1]), forward(params, IDS[:, :-1], config))
    assert content["model_state_dict"].keys() == model.state_dict().keys()


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_the_chapters_model_and_optimizer_go_on_from_our_file(ch04, tmp_path, tied):
    params, opt_state = trained(config=WIDE, tied=tied)
    run = {"settings": {"lr": 0.002, "weight_decay": 0.3}}
    save_checkpoint(tmp_path / "a.pth", Checkpoint(params, WIDE, opt_state, run))
    model = chapter_model(ch04, WIDE, tied)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    model.load_state_dict(content["model_state_dict"])
    optimizer = AdamW(model.parameters(), lr=1.0)
    optimizer.load_state_dict(content["optimizer_state_dict"])
    ours = our_losses(params, opt_state, WIDE, **run["settings"])
    assert close(torch_losses(model, optimizer), ours, roundings=5 * 20)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_we_go_on_from_the_chapters_files(ch04, tmp_path, tied):
    model = chapter_model(ch04, WIDE, tied)
    optimizer = AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    torch_losses(model, optimizer)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    save_both(model, optimizer.state_dict(), tmp_path / "both.pth")
    alone, both = load_checkpoint(tmp_path / "model.pth"), load_checkpoint(tmp_path / "both.pth")
    assert alone.opt_state is None and alone.config == both.config
    assert (both.config.n_heads, both.config.n_layers, both.config.qkv_bias) == (2, 2, False)
    assert load_checkpoint(tmp_path / "model.pth", n_heads=4).config.n_heads == 4
    assert close(forward(alone.params, IDS[:, :-1], WIDE), model(IDS[:, :-1]))
    assert_moments_are(both.opt_state, model, optimizer, steps=5)
    ours = our_losses(both.params, both.opt_state, WIDE, **both.run["settings"])
    assert close(ours, torch_losses(model, optimizer), roundings=5 * 20)
