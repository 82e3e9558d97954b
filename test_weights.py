"""Checkpoints and OpenAI's weights: real files that tensorflow writes, a real HTTP server, real damage."""
import base64
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
import train
import weights
from gpt import Config, forward, init_params
from train import init_optimizer, train_step

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")
LONG = pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="takes minutes: set LONG_TESTS=1")
HERE = Path(__file__).parent
SMALL = dict(n_vocab=97, n_ctx=16, n_embd=12, n_head=3, n_layer=2)
FULL = dict(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"


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


def write_checkpoint(folder, hparams, variables):
    """What OpenAI's folder holds, written by tensorflow."""
    import tensorflow as tf
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(hparams))
    tf.raw_ops.SaveV2(prefix=str(folder / "model.ckpt"), tensor_names=list(variables), tensors=list(variables.values()),
                      shape_and_slices=[""] * len(variables))
    return folder


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


def assert_bitwise(params, expected):
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name].numpy(), array, err_msg=name, strict=True)
    assert params["out_head.weight"] is params["tok_emb.weight"]


@pytest.fixture(scope="module")
def openai_folder(tmp_path_factory):
    """A small checkpoint; tests copy it before they change anything."""
    variables = openai_variables(SMALL)
    return write_checkpoint(tmp_path_factory.mktemp("published") / "124M", SMALL, variables), variables


@pytest.fixture
def folder(openai_folder, tmp_path):
    return Path(shutil.copytree(openai_folder[0], tmp_path / "copy"))


class Server:
    """Serves a folder on 127.0.0.1 and misbehaves as told."""

    def __init__(self, root):
        self.requests, self.ranges, self.cuts, self.statuses = [], True, {}, []
        self.md5, self.html, self.forget = None, set(), {}
        server = self

        class Handler(BaseHTTPRequestHandler):
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

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def fetched(self, name):
        return [asked for requested, asked in self.requests if requested == name]


@pytest.fixture
def server(openai_folder, monkeypatch):
    monkeypatch.setattr(weights, "RETRY_PAUSES", (0, 0))
    server = Server(openai_folder[0].parent)
    yield server
    server.http.shutdown()
    server.http.server_close()


def assert_whole(models, published):
    for path in (models / "124M").iterdir():
        assert path.suffix == ".partial" or path.read_bytes() == (published / path.name).read_bytes()


def refused(action, *words, error=(ValueError, OSError)):
    """The message of the error that the action ends in: one line with these words."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


# Loading OpenAI's checkpoints

def test_what_openai_published_arrives_bit_for_bit(server, openai_folder, tmp_path):
    folder = weights.download_openai("124M", tmp_path, server.url)
    params, config = weights.load_openai(folder)
    assert_bitwise(params, expected_params(SMALL, openai_folder[1]))
    assert config == Config(97, 16, 12, 3, 2, 0.0, True)
    again, _ = weights.load_openai(folder)  # from the converted file
    assert_bitwise(again, expected_params(SMALL, openai_folder[1]))


def numpy_forward(v, ids, hparams):
    """GPT-2 from the paper's formulas, in double precision, for one row of ids."""
    v = {name.removeprefix("model/"): array.astype(np.float64) for name, array in v.items()}

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
    return norm(x, "ln_f") @ v["wte"].T


def test_logits_equal_an_independent_forward_pass_over_the_same_arrays(folder, openai_folder):
    params, config = weights.load_openai(folder)
    ids = torch.randint(97, (3, 16), generator=torch.Generator().manual_seed(1))
    logits = forward(params, ids, config)
    for row in range(3):
        np.testing.assert_allclose(logits[row], numpy_forward(openai_folder[1], ids[row].numpy(), SMALL), atol=1e-4)


def test_the_first_start_is_silent_and_the_second_needs_no_tensorflow(folder):
    program = "import sys, weights; weights.load_openai(sys.argv[1]); print('tensorflow' in sys.modules)"
    for needed in ("True", "False"):
        done = subprocess.run([sys.executable, "-c", program, folder], cwd=HERE, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, needed + "\n", "")


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"garbage", lambda b: b"",
                                    lambda b: b[:3000] + bytes([b[3000] ^ 1]) + b[3001:]])
def test_a_damaged_converted_file_is_made_again(folder, openai_folder, damage):
    weights.load_openai(folder)
    converted = folder / "converted.pth"
    whole = converted.read_bytes()
    converted.write_bytes(damage(whole))
    assert_bitwise(weights.load_openai(folder)[0], expected_params(SMALL, openai_folder[1]))
    assert len(converted.read_bytes()) == len(whole)


def test_a_changed_checkpoint_is_noticed(folder):
    weights.load_openai(folder)
    other = openai_variables(SMALL, seed=1)
    write_checkpoint(folder, SMALL, other)
    assert_bitwise(weights.load_openai(folder)[0], expected_params(SMALL, other))


def test_a_folder_that_cannot_keep_the_converted_file_is_read_all_the_same(folder, openai_folder):
    (folder / "converted.pth").mkdir()
    assert_bitwise(weights.load_openai(folder)[0], expected_params(SMALL, openai_folder[1]))


@pytest.mark.parametrize("name, words", [
    ("model/wte", "tok_emb.weight has to be (97, 12), but is (97, 11)"),
    ("model/h1/attn/c_attn/w", "trf_blocks.1.att.W_value.weight has to be (12, 12), but is (11, 12)"),
    ("model/h0/ln_2/b", "trf_blocks.0.norm2.shift has to be (12,), but is (11,)"),
    ("model/ln_f/g", "final_norm.scale has to be (12,), but is (11,)")])
def test_a_missing_or_misshapen_variable_is_refused_by_its_name_and_both_shapes(tmp_path, name, words):
    variables = openai_variables(SMALL)
    array = variables.pop(name)
    write_checkpoint(tmp_path / "a", SMALL, variables)
    refused(lambda: weights.load_openai(tmp_path / "a"), f"{name} is missing")
    write_checkpoint(tmp_path / "b", SMALL, variables | {name: array[..., :-1]})
    refused(lambda: weights.load_openai(tmp_path / "b"), words)


@pytest.mark.parametrize("change", [dict(n_layer=1), dict(n_layer=3), dict(n_embd=24), dict(n_vocab=98), dict(n_ctx=8),
                                    dict(n_head=5), dict(n_head=None)])
def test_a_checkpoint_that_does_not_match_its_hparams_is_refused(folder, change):
    (folder / "hparams.json").write_text(json.dumps(SMALL | change))
    refused(lambda: weights.load_openai(folder), "hparams.json")
    assert not (folder / "converted.pth").exists()


def damage_html(path):
    path.write_bytes(b"<html><body>Sign in to the hotel's network</body></html>")


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    for place in range(100, len(content), 997):
        content[place] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("name, damage", [
    ("hparams.json", damage_html), (INDEX, damage_html), (INDEX, damage_cut), (INDEX, damage_flip), (DATA, damage_html),
    (DATA, damage_cut), (DATA, damage_flip)])
def test_a_damaged_file_of_a_checkpoint_is_named_in_one_line(folder, name, damage):
    damage(folder / name)
    refused(lambda: weights.load_openai(folder), name, "delete it", error=ValueError)


def test_both_command_lines_start_from_what_openai_published(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hparams = SMALL | dict(n_vocab=50257, n_ctx=300)
    write_checkpoint(tmp_path / "published" / "355M", hparams, openai_variables(hparams))
    server = Server(tmp_path / "published")
    openai = ["--weights", "openai", "--size", "355M", "--base-url", server.url]
    data = ["--data", str(HERE / "the-verdict.txt"), "--eval-iter", "1"]

    def command(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *arguments, *openai])
        assert main() == 0
        return capsys.readouterr().out
    monkeypatch.setattr(train, "tune_allocator", lambda: None)
    monkeypatch.setattr(train, "catch_signals", list)
    try:
        assert command(sample.main, "--max-new-tokens", "3").startswith("Every effort moves you")
        assert command(train.main, *data, "--epochs", "0").startswith("Training loss ")
        log = command(train.main, *data, "--epochs", "1", "--drop-rate", "0.1")
    finally:
        server.http.shutdown()
        server.http.server_close()
    assert log.startswith("Ep 1 (Step 000000)") and len(server.requests) == 3
    params, config, _, run = weights.load_checkpoint("model.pth")
    assert (config.context_length, config.drop_rate, run["settings"]["context_length"]) == (300, 0.1, 256)
    assert params["out_head.weight"] is params["tok_emb.weight"]


@pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="takes 15 s: set LONG_TESTS=1")
def test_of_two_processes_the_first_alone_downloads(tmp_path):
    hparams = SMALL | dict(n_vocab=50257, n_ctx=300)
    write_checkpoint(tmp_path / "published" / "355M", hparams, openai_variables(hparams))
    server = Server(tmp_path / "published")
    options = ["--data", str(HERE / "the-verdict.txt"), "--epochs", "0",
               "--weights", "openai", "--size", "355M", "--base-url", server.url]
    try:
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                               str(HERE / "train.py"), *options], cwd=tmp_path, capture_output=True, text=True)
    finally:
        server.http.shutdown()
        server.http.server_close()
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
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), DATA, INDEX, "hparams.json", str(tmp_path))
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


def test_a_file_that_is_not_there_is_reported_at_once(server, tmp_path):
    server.statuses = [404]
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), "404", "By hand", str(tmp_path))
    assert len(server.requests) == 1


def test_an_error_of_the_servers_is_tried_again(server, openai_folder, tmp_path):
    server.statuses = [500]
    weights.download_openai("124M", tmp_path, server.url)
    assert_whole(tmp_path, openai_folder[0])


def test_a_web_page_in_place_of_a_file_is_refused(server, openai_folder, tmp_path):
    server.html.add(INDEX)
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), INDEX, "web page")
    assert_whole(tmp_path, openai_folder[0])


def test_without_a_network_the_error_says_what_to_put_where(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    refused(lambda: weights.download_openai("124M", tmp_path, server.url), "no connection", "hparams.json", INDEX, DATA,
            str(tmp_path / "124M"))


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

@LONG
def test_the_124M_shape_arrives_bit_for_bit_and_within_its_memory(tmp_path):
    variables = openai_variables(FULL)
    folder = write_checkpoint(tmp_path / "124M", FULL, variables)
    program = """
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
    seconds = []
    for start in ("first", "second"):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program, folder, start], cwd=HERE, capture_output=True, text=True)
        whole = time.perf_counter() - begin
        assert done.returncode == 0, done.stderr
        memory, loading = map(float, done.stdout.split())
        print(f"{start} start: {loading:.2f} s, with Python and torch {whole:.2f} s, peak memory {memory:.2f} x the "
              "parameters'")
        assert memory <= 1.3 and (memory > 0.5 or start == "second")
        seconds.append(loading)
    assert seconds[1] < seconds[0] / 4
    assert_bitwise(weights.load_openai(folder)[0], expected_params(FULL, variables))


def test_openais_124M_gives_the_sentence_and_the_losses_of_section_5_5():
    data = HERE / "gpt2" / "124M" / DATA
    if not data.exists() or data.stat().st_size != 497_759_232:
        pytest.skip("gpt2/124M is not there: `python sample.py --weights openai` downloads it")

    def command(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, encoding="utf-8").stdout
    assert command("sample.py", "--weights", "openai", "--top-k", "50", "--temperature", "1.5") == (
        "Every effort moves you toward finding an ideal new way to practice something!\n\n"
        "What makes us want to be on top of that?\n")
    assert "3.75475" in (losses := command("train.py", "--weights", "openai", "--epochs", "0")) and "3.55962" in losses


# assign

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(shapes, shapes)
def test_assign_accepts_equal_shapes_and_refuses_all_others_naming_both(left, right):
    if left == right:
        assert weights.assign(torch.zeros(left), np.ones(right, np.float32)).equal(torch.ones(right))
    else:
        refused(lambda: weights.assign(torch.zeros(left), torch.ones(right)), str(left), str(right), error=ValueError)


# Our checkpoints

CONFIG = Config(vocab_size=41, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.1, qkv_bias=True)


def trained(steps=2, seed=0, config=CONFIG):
    """Parameters and optimizer state after a few steps."""
    generator = torch.Generator().manual_seed(seed)
    params = init_params(config, generator)
    opt_state = init_optimizer(params)
    for _ in range(steps):
        ids = torch.randint(config.vocab_size, (2, 9), generator=generator)
        params, opt_state, _ = train_step(params, opt_state, ids[:, :-1], ids[:, 1:], config, generator)
    return params, opt_state


def flat(params, opt_state):
    return {**params, **{f"{key}.{name}": tensor for name, state in opt_state.items() for key, tensor in state.items()}}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    params, opt_state = trained()
    weights.save_checkpoint(tmp_path / "a.pth", params, CONFIG, opt_state, progress=dict(step=2), settings=dict(lr=0.1))
    loaded = weights.load_checkpoint(tmp_path / "a.pth")
    assert equal(flat(params, opt_state), flat(loaded.params, loaded.opt_state))
    assert loaded.config == CONFIG and loaded.run == dict(progress=dict(step=2), settings=dict(lr=0.1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_tied_weights_are_tied_after_loading(tmp_path):
    params, _ = trained()
    params["out_head.weight"] = params["tok_emb.weight"]
    weights.save_checkpoint(tmp_path / "a.pth", params, CONFIG)
    loaded = weights.load_checkpoint(tmp_path / "a.pth").params
    assert loaded["out_head.weight"] is loaded["tok_emb.weight"]
    params["out_head.weight"] = params["tok_emb.weight"].detach()  # as the state_dict of a module has them
    torch.save(params, tmp_path / "a.pth")
    loaded = weights.load_checkpoint(tmp_path / "a.pth").params
    assert loaded["out_head.weight"] is loaded["tok_emb.weight"]


def test_200_damaged_checkpoints_are_refused_or_equal(tmp_path):
    params, opt_state = trained()
    path, rng = tmp_path / "a.pth", random.Random(0)
    weights.save_checkpoint(path, params, CONFIG, opt_state)
    whole, original = path.read_bytes(), flat(params, opt_state)
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
            loaded = weights.load_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes["refused"] += 1
        else:
            assert equal(flat(loaded.params, loaded.opt_state), original) and loaded.config == CONFIG
            outcomes["equal"] += 1
    print(outcomes)
    assert outcomes["refused"] > 100
    with pytest.raises(OSError):
        weights.load_checkpoint(tmp_path)


class Payload:
    """What pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_checkpoint_that_carries_code_is_refused_and_runs_nothing(tmp_path):
    import pickle
    payload = Payload(f"touch {tmp_path / 'mark'}")
    torch.save({"model_state_dict": trained()[0], "run": payload}, tmp_path / "zip.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(payload))
    for name in ("zip.pth", "bare.pth"):
        refused(lambda name=name: weights.load_checkpoint(tmp_path / name), name, "not a checkpoint", error=ValueError)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [[1, 2], "text", {"a": 1}, {}, {"model_state_dict": 3}, {"config": 1},
                                     {"tok_emb.weight": torch.zeros(3)}, torch.zeros(2)])
def test_a_file_with_something_else_in_it_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(lambda: weights.load_checkpoint(tmp_path / "a.pth"), "a.pth", error=ValueError)


def test_missing_unknown_and_misshapen_parameters_are_refused_by_name(tmp_path):
    params, _ = trained()
    name = "trf_blocks.1.ff.layers.0.weight"
    for changed, word in (({k: v for k, v in params.items() if k != name}, "no float tensor"),
                          (params | {name: torch.zeros(2, 2)}, "has to be (64, 16), but is (2, 2)"),
                          (params | {name: [1]}, "no float tensor"), (params | {"more": torch.zeros(1)}, "more")):
        torch.save(changed, tmp_path / "a.pth")
        refused(lambda: weights.load_checkpoint(tmp_path / "a.pth"), word, error=ValueError)


def test_a_transposed_view_is_not_taken_for_the_tensor_that_it_shows(tmp_path):
    config = Config(16, 8, 16, 2, 1, 0.0, False)  # the output head and the embedding are square
    params = init_params(config, torch.Generator())
    torch.save(params | {"out_head.weight": params["tok_emb.weight"].T}, tmp_path / "a.pth")
    loaded = weights.load_checkpoint(tmp_path / "a.pth", n_heads=2).params
    assert torch.equal(loaded["out_head.weight"], params["tok_emb.weight"].T)


def test_a_small_file_cannot_ask_for_a_billion_layers(tmp_path):
    torch.save({"model_state_dict": {}, "config": asdict(CONFIG) | {"n_layers": 10**9}}, tmp_path / "a.pth")
    refused(lambda: weights.load_checkpoint(tmp_path / "a.pth"), "n_layers", error=ValueError)


def test_a_plain_state_dict_has_heads_of_64_unless_told(tmp_path):
    params = init_params(Config(41, 8, 128, 2, 1, 0.0, False), torch.Generator())
    torch.save(params, tmp_path / "a.pth")
    assert weights.load_checkpoint(tmp_path / "a.pth").config.n_heads == 2
    assert weights.load_checkpoint(tmp_path / "a.pth", n_heads=4).config.n_heads == 4


def test_an_optimizer_before_its_first_step_has_no_state(tmp_path):
    params, _ = trained()
    optimizer = torch.optim.AdamW(params.values()).state_dict()
    torch.save({"model_state_dict": params, "optimizer_state_dict": optimizer}, tmp_path / "a.pth")
    assert weights.load_checkpoint(tmp_path / "a.pth").opt_state is None


def test_parameters_saved_transposed_train_as_others_do(tmp_path):
    params, opt_state = trained()
    weights.save_checkpoint(tmp_path / "rows.pth", params, CONFIG, opt_state)
    columns, *states = [{name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in each.items()}
                        for each in (params, *opt_state.values())]
    weights.save_checkpoint(tmp_path / "columns.pth", columns, CONFIG, dict(zip(opt_state, states, strict=True)))
    losses = []
    for name in ("rows.pth", "columns.pth"):
        loaded = weights.load_checkpoint(tmp_path / name)
        losses.append(our_five_losses(loaded.params, loaded.opt_state, CONFIG, IDS))
    assert losses[0] == losses[1]


SAVER = """
import sys, torch, weights
from gpt import Config, init_params
from train import init_optimizer
config = Config(2000, 8, 128, 2, 2, 0.0, False)
params = init_params(config, torch.Generator())
for value in range(1, 10**6):
    params = {name: torch.full_like(tensor, value) for name, tensor in params.items()}
    print(value, flush=True)
    weights.save_checkpoint(sys.argv[1], params, config, init_optimizer(params))
"""


def test_a_process_killed_while_saving_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    path, partial, rng = tmp_path / "a.pth", tmp_path / "a.pth.partial", random.Random(0)
    during = 0
    for _ in range(100 if os.environ.get("LONG_TESTS") else 5):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, path], cwd=HERE, stdout=subprocess.PIPE, text=True)
        for line in saver.stdout:
            if int(line) == 3:
                break
        written = rng.random() * path.stat().st_size
        while written > 0:  # until that much of the third file, or of one after it, is there
            with suppress(FileNotFoundError):
                written = 0 if partial.stat().st_size >= written else written
        saver.kill()
        latest = max([3, *(int(line) for line in saver.stdout if line.strip())])
        saver.wait()
        during += partial.exists()
        values = {float(tensor.min()) for tensor in weights.load_checkpoint(path).params.values()} | {
            float(tensor.max()) for tensor in weights.load_checkpoint(path).params.values()}
        assert len(values) == 1 and values <= {float(latest - 1), float(latest)}
    print(during, "kills fell into the write")
    assert during


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE and /dev/full are tried on Linux")
def test_a_limit_on_file_size_and_a_full_disk_leave_the_old_checkpoint_and_no_litter(tmp_path):
    params, opt_state = trained()
    weights.save_checkpoint(tmp_path / "a.pth", params, CONFIG, opt_state)
    old = (tmp_path / "a.pth").read_bytes()
    save = lambda: weights.save_checkpoint(tmp_path / "a.pth", params, CONFIG, opt_state)  # noqa: E731
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        refused(save, "File too large", str(tmp_path / "a.pth"), error=OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (tmp_path / "a.pth.partial").symlink_to("/dev/full")
    refused(save, "No space left", str(tmp_path / "a.pth"), error=OSError)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"] and (tmp_path / "a.pth").read_bytes() == old


# The chapter's own model and optimizer

def chapter_model(config):
    ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="needs `pip install --no-deps llms-from-scratch`")
    torch.manual_seed(5)
    return ch04.GPTModel(asdict(config))


def five_losses(model, optimizer, ids):
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def our_five_losses(params, opt_state, config, ids):
    losses = []
    for _ in range(5):
        params, opt_state, loss = train_step(params, opt_state, ids[:, :-1], ids[:, 1:], config)
        losses.append(loss.item())
    return losses


PLAIN = Config(vocab_size=41, context_length=8, emb_dim=128, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=False)
IDS = torch.randint(41, (2, 9), generator=torch.Generator().manual_seed(3))


def test_the_chapters_model_and_optimizer_go_on_from_our_file(tmp_path):
    model = chapter_model(PLAIN)
    params, opt_state = trained(config=PLAIN)
    weights.save_checkpoint(tmp_path / "a.pth", params, PLAIN, opt_state)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    missing, unexpected = model.load_state_dict(content["model_state_dict"], strict=False)
    assert not unexpected and all(name.endswith("att.mask") for name in missing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    optimizer.load_state_dict(content["optimizer_state_dict"])
    torch.testing.assert_close(model(IDS[:, :-1]), forward(params, IDS[:, :-1], PLAIN), atol=1e-5, rtol=1e-5)
    assert five_losses(model, optimizer, IDS) == pytest.approx(our_five_losses(params, opt_state, PLAIN, IDS), abs=1e-5)


def test_we_go_on_from_the_chapters_files(tmp_path):
    model = chapter_model(PLAIN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    five_losses(model, optimizer, IDS)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()},
               tmp_path / "both.pth")
    alone, both = weights.load_checkpoint(tmp_path / "model.pth"), weights.load_checkpoint(tmp_path / "both.pth")
    assert alone.opt_state is None and alone.config == both.config
    assert (both.config.n_heads, both.config.n_layers, both.config.qkv_bias) == (2, 2, False)
    assert weights.load_checkpoint(tmp_path / "model.pth", n_heads=4).config.n_heads == 4
    torch.testing.assert_close(model(IDS[:, :-1]), forward(alone.params, IDS[:, :-1], PLAIN), atol=1e-5, rtol=1e-5)
    ours = our_five_losses(both.params, both.opt_state, PLAIN, IDS)
    assert five_losses(model, optimizer, IDS) == pytest.approx(ours, abs=1e-5)
