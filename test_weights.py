"""What a file of parameters promises: it comes back equal or not at all, and others' tools read ours as we read theirs.

Sections 5.4 and 5.5, saving, loading and OpenAI's weights; then files that people have, damage, the disk, downloads.
"""
import gzip
import json
import os
import re
import sys
import threading
import warnings
from dataclasses import asdict, replace
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.optim import AdamW

import weights
from conftest import HERE, ROUNDING, SMALL, TINY, assert_refused, command, configs, examples, same, seeded, seeds, tie
from gpt import calc_loss, distinct, forward, init_params, map_params
from train import choose, init_optimizer, train_step
from weights import (Checkpoint, OptState, SavedRun, assign, download_openai, infer_config, load_checkpoint, load_model,
                     load_openai, save_checkpoint, to_content, write_atomically)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="tries Linux's pipes, links, mappings and full disks")
HPARAMS, INDEX, DATA = weights.OPENAI_FILES
any_of, MISSING = st.sampled_from, object()
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
plain = st.none() | st.booleans() | st.integers(-2**63, 2**63) | st.floats(allow_nan=False) | st.text()
evaluations = st.lists(st.tuples(seeds, *2 * [st.floats(allow_nan=False)])).map(tuple)
INPUTS, TARGETS = examples(TINY, 8)
EXACT = replace(TINY, drop_rate=0.0)
exactly = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)  # in float64, whose roundings are far smaller
GPT2 = replace(SMALL, n_layers=2, drop_rate=0.0, qkv_bias=True)
MODEL = tie({name: torch.randn(tensor.shape, generator=seeded(i))
             for i, (name, tensor) in enumerate(init_params(GPT2, seeded()).items())})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file that each test, and each of its examples, writes anew."""
    return tmp_path_factory.mktemp("file") / "a.pth"


def assert_equals(loaded, saved):
    """The same tensors, bit for bit and of the same type, contiguous; a head that equals the embedding is it."""
    assert same(loaded, saved)
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in saved.items())
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in loaded.values())
    is_equal = torch.equal(saved["out_head.weight"], saved["tok_emb.weight"])
    assert (loaded["out_head.weight"] is loaded["tok_emb.weight"]) == is_equal


# Section 5.4: saving and loading
@given(st.tuples(shapes, shapes) | shapes.map(lambda shape: (shape, shape)))
def test_assign_accepts_equal_shapes_and_refuses_others_naming_both(pair):
    shape, other = pair
    left, right = torch.zeros(shape), np.ones(other[::-1], np.float32).T  # transposed, so not contiguous
    if shape == other:
        assert same(assign(left, right), torch.ones(shape)) and assign(left, right).is_contiguous()
        assert not assign(left, left.requires_grad_()).requires_grad
    else:
        assert_refused(lambda: assign(left, right), str(shape), str(other), error=ValueError)


@st.composite
def checkpoints(draw):
    """Of any shape and type, in any order, tied or not, with optimizer and run or not; the tensors lie transposed."""
    config, generator = draw(configs), seeded(draw(seeds))
    dtype = draw(any_of([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    is_tied, has_optimizer, has_run = (draw(st.booleans()) for _ in range(3))

    def drawn(tensor):
        return torch.randn(tensor.shape[::-1], generator=generator).to(dtype).permute(*range(tensor.ndim)[::-1])
    params = dict(draw(st.permutations([*init_params(config, generator).items()])))
    params = map_params(drawn, tie(params) if is_tied else params)
    opt_state = OptState(draw(st.integers(0, 2**24)), map_params(drawn, params), map_params(drawn, params))
    progress = SavedRun(draw(st.dictionaries(st.text(), plain, max_size=3)), draw(st.text()), generator.get_state(),
                        draw(st.none() | seeds), draw(evaluations))
    return Checkpoint(params, config, opt_state if has_optimizer else None,
                      progress if has_optimizer and has_run else None)


@given(checkpoints())
def test_what_is_loaded_equals_what_was_saved(path, saved):
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert same(loaded, saved) and not Path(f"{path}.partial").exists()
    assert list(loaded.params) == list(init_params(saved.config, seeded()))  # in the model's order, whatever the file's
    assert_equals(loaded.params, saved.params)
    if saved.opt_state:
        assert_equals(loaded.opt_state.exp_avg, saved.opt_state.exp_avg)
        assert_equals(loaded.opt_state.exp_avg_sq, saved.opt_state.exp_avg_sq)


def five_steps(params, opt_state, rates):
    for _ in range(5):
        params, opt_state, _ = train_step(params, opt_state, INPUTS, TARGETS, EXACT, dtype=torch.float64, **rates)
    return params, opt_state


@pytest.mark.parametrize("rates, has_run", [
    ({"lr": 4e-4, "weight_decay": 0.1}, False), ({"lr": 0.002, "weight_decay": 0.3}, True)])
@pytest.mark.parametrize("tie_or_not", [dict, tie])
def test_pytorchs_adamw_goes_on_from_our_file_and_we_from_its(path, tie_or_not, rates, has_run):
    params = map_params(torch.Tensor.double, tie_or_not(init_params(EXACT, seeded())))
    params, opt_state = five_steps(params, init_optimizer(params), rates)
    progress = SavedRun(rates, "", seeded().get_state(), None, ()) if has_run else None
    save_checkpoint(path, Checkpoint(params, EXACT, opt_state, progress))

    content = torch.load(path, weights_only=True)
    theirs = map_params(lambda tensor: tensor.clone().requires_grad_(), params)
    optimizer = AdamW(distinct(theirs), lr=1.0)
    optimizer.load_state_dict(content["optimizer_state_dict"])
    assert optimizer.state_dict()["param_groups"] == AdamW(distinct(theirs), **rates).state_dict()["param_groups"]
    for _ in range(5):
        optimizer.zero_grad()
        calc_loss(theirs, INPUTS, TARGETS, EXACT).backward()
        optimizer.step()

    torch.save({"model_state_dict": theirs, "optimizer_state_dict": optimizer.state_dict()}, path)
    loaded, (params, opt_state) = load_checkpoint(path, n_heads=2), five_steps(params, opt_state, rates)
    exactly(loaded.params, params)
    exactly(five_steps(loaded.params, loaded.opt_state, rates)[0], five_steps(params, opt_state, rates)[0])


@pytest.mark.parametrize("tie_or_not", [dict, tie])
def test_the_chapters_model_loads_our_file_and_we_load_its(path, tie_or_not):
    ch04 = pytest.importorskip("llms_from_scratch.ch04")
    params, model = tie_or_not(init_params(EXACT, seeded())), ch04.GPTModel(asdict(EXACT))
    save_checkpoint(path, Checkpoint(params, EXACT))
    state = torch.load(path, weights_only=True)["model_state_dict"]
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(model(INPUTS), forward(params, INPUTS, EXACT), **ROUNDING)
    assert len({mask.data_ptr() for name, mask in state.items() if "mask" in name}) == 1  # not one for each block
    torch.save(model.state_dict(), path)
    assert same(load_checkpoint(path, n_heads=2), Checkpoint(params, replace(EXACT, drop_rate=0.1)))


@cache
def whole():
    """A checkpoint with all its parts."""
    params = init_params(TINY, seeded())
    params, opt_state, _ = train_step(params, init_optimizer(params), INPUTS, TARGETS, TINY)
    return Checkpoint(params, TINY, opt_state, SavedRun({"lr": 0.1}, "a", seeded().get_state(), 5, ((1, 2.0, 3.0),)))


@pytest.mark.parametrize("change", [
    lambda groups, state: groups.append({"params": [groups[0]["params"].pop()]}),
    lambda groups, state: groups[0]["params"].reverse(), lambda groups, state: groups[0]["params"].pop(),
    lambda groups, state: groups[0]["params"].append(0), lambda groups, state: state.clear(),
    lambda groups, state: state[3].update(exp_avg=torch.zeros(2)), lambda groups, state: state[3].update(exp_avg={}),
    *(lambda groups, state, step=step: state[3].update(step=torch.tensor(step)) for step in (2.0, torch.inf))])
def test_another_optimizer_is_left_out_with_a_warning(path, change):
    content = to_content(whole()._replace(run=None))
    change(content["optimizer_state_dict"]["param_groups"], content["optimizer_state_dict"]["state"])
    torch.save(content, path)
    with pytest.warns(UserWarning, match="AdamW"):
        assert same(load_checkpoint(path), Checkpoint(whole().params, TINY))
    torch.save(content | {"run": to_content(whole())["run"]}, path)
    with pytest.warns(UserWarning, match="AdamW"):
        assert_refused(lambda: load_checkpoint(path), " run ", error=ValueError)


@pytest.mark.parametrize("part, value", [
    *((part, MISSING) for part in (*SavedRun._fields, "optimizer_state_dict")), ("settings", 1), ("order_seed", "1"),
    ("order_seed", ""), ("order_seed", 2**70), ("generator_state", 1), ("evaluations", [[9**400] * 3]), ("run", 3)])
def test_a_run_with_a_missing_or_wrong_part_is_refused(path, part, value):
    content = to_content(whole())
    holder = content if part in content else content["run"]
    holder[part] = value
    if value is MISSING:
        del holder[part]
    torch.save(content, path)
    assert_refused(lambda: load_checkpoint(path), str(path), " run ", error=ValueError)


# Section 5.5: GPT-2 as it was published
def openai(params):
    """The parameters as OpenAI's variables: c_attn is query, key and value side by side, weights are (1, in, out)."""
    v = {"wte": params["tok_emb.weight"], "wpe": params["pos_emb.weight"]}
    linear = {"attn/c_attn": ["att.W_query", "att.W_key", "att.W_value"], "attn/c_proj": ["att.out_proj"],
              "mlp/c_fc": ["ff.layers.0"], "mlp/c_proj": ["ff.layers.2"]}
    norms = {"ln_f": "final_norm"}
    for i in range(2):
        norms |= {f"h{i}/ln_1": f"trf_blocks.{i}.norm1", f"h{i}/ln_2": f"trf_blocks.{i}.norm2"}
        for theirs, ours in linear.items():
            parts = [f"trf_blocks.{i}.{name}" for name in ours]
            v[f"h{i}/{theirs}/w"] = torch.cat([params[f"{part}.weight"] for part in parts]).T[None]
            v[f"h{i}/{theirs}/b"] = torch.cat([params[f"{part}.bias"] for part in parts])
    for theirs, ours in norms.items():
        v |= {f"{theirs}/g": params[f"{ours}.scale"], f"{theirs}/b": params[f"{ours}.shift"]}
    return {f"model/{name}": tensor.numpy() for name, tensor in v.items()}


def write_openai(folder, variables, name="model.ckpt"):
    """What OpenAI's folder holds, written by tensorflow."""
    tensorflow = pytest.importorskip("tensorflow")
    folder.mkdir(exist_ok=True)
    (folder / HPARAMS).write_text('{"n_vocab": 50257, "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 2}')
    tensorflow.raw_ops.SaveV2(prefix=str(folder / name), tensor_names=list(variables), tensors=list(variables.values()),
                              shape_and_slices=[""] * len(variables))
    return folder


@pytest.fixture
def published(tmp_path):
    return write_openai(tmp_path / "124M", openai(MODEL))


@pytest.mark.skipif(not (HERE / "gpt2" / "124M" / DATA).exists(), reason="sample.py --weights openai downloads it")
def test_openais_124M_gives_the_sentence_and_the_losses_of_the_chapter():
    assert command(HERE, "sample.py --weights openai --top-k 50 --temperature 1.5").out == (
        "Every effort moves you toward finding an ideal new way to practice something!\n\n"
        "What makes us want to be on top of that?\n")
    losses = command(HERE, "train.py --weights openai --epochs 0").out
    assert "3.75475" in losses and "3.55962" in losses


def test_what_openai_published_arrives_bit_for_bit(published):
    params, config = load_openai(published)
    assert_equals(params, MODEL)
    assert replace(config, drop_rate=0.0) == GPT2


def test_openais_model_is_what_the_chapters_functions_make_of_it(published, path):
    ch04, ch05 = map(pytest.importorskip, ("llms_from_scratch.ch04", "llms_from_scratch.ch05"))
    model = ch04.GPTModel(asdict(GPT2))
    ch05.load_weights_into_gpt(model, ch05.load_gpt2_params_from_tf_ckpt(f"{published}/model.ckpt", {"n_layer": 2}))
    torch.save(model.state_dict(), path)  # its head is a copy, and its weights lie transposed
    assert_equals(load_model(path, n_heads=2).params, load_openai(published)[0])
    torch.testing.assert_close(forward(MODEL, INPUTS, GPT2), model(INPUTS), **ROUNDING)


def test_the_newest_checkpoint_is_found_and_its_optimizer_left_alone(tmp_path):
    variables = openai(MODEL)
    write_openai(tmp_path, {name: array + 1 for name, array in variables.items()}, "model-500")
    slots = {f"{name}/Adam": array for name, array in variables.items()}
    write_openai(tmp_path, variables | slots | {"global_step": np.array(1000)}, "model-1000")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model-1000"\n')
    assert_equals(load_openai(tmp_path)[0], MODEL)


def test_a_conversion_is_kept_until_it_is_damaged_or_another_file_changes(published, monkeypatch):
    load_model(published)
    (published / "converted.pth").write_bytes((published / "converted.pth").read_bytes()[:-100])
    assert_equals(load_model(published).params, MODEL)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", None)
        assert_equals(load_model(published).params, MODEL)
    other, converted = map_params(lambda tensor: tensor + 1, MODEL), (published / "converted.pth").stat()
    while (published / DATA).stat().st_ctime_ns <= converted.st_ctime_ns:  # the clock of files moves on in jumps
        write_openai(published, openai(other))
    assert_equals(load_model(published).params, other)
    (published / "converted.pth").unlink()
    (published / "converted.pth").mkdir()  # it can be neither read nor written
    assert_equals(load_model(published).params, other)


def test_a_tensorflow_that_fails_gives_its_own_reason(tmp_path, monkeypatch):
    (tmp_path / "tensorflow.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    assert_refused(lambda: load_openai(tmp_path), "tensorflow", "Descriptors cannot", error=ImportError)


# Files that people have
def hugging_face(params, is_nanogpt=False):
    """The parameters as Hugging Face's GPT2LMHeadModel has them: model/h0/attn/c_attn/w is h.0.attn.c_attn.weight.

    nanoGPT's weights of linear layers are (out, in).
    """
    head, state = params["out_head.weight"], {}
    for name, array in openai(params).items():
        name = re.sub(r"model/(?:h(\d)/)?", lambda found: f"h.{found[1]}." if found[1] else "", name).replace("/", ".")
        name = name.removesuffix("b") + "bias" if name.endswith(".b") else re.sub(r"\.[wg]$", "", name) + ".weight"
        is_linear, tensor = array.ndim == 3, torch.from_numpy(array).squeeze(0)
        state[name] = (tensor.T if is_linear and is_nanogpt else tensor).contiguous()
    return state if head is params["tok_emb.weight"] else state | {"lm_head.weight": head}


def save_safetensors(state, path):
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)  # it takes no tensor under two names


nanogpt = partial(hugging_face, is_nanogpt=True)
save_before_2020 = partial(torch.save, _use_new_zipfile_serialization=False)
prefixes = st.lists(any_of(["transformer.", "gpt.", "model.", "base_model.model.", "module.", "_orig_mod."]))
heads = any_of([MODEL["tok_emb.weight"], MODEL["tok_emb.weight"].clone(), MODEL["tok_emb.weight"] + 1])
MASKS = {"h.0.attn.bias": torch.ones(8, 8), "h.1.attn.masked_bias": torch.ones(()), "position_ids": torch.arange(8),
         "trf_blocks.1.att.mask": torch.ones(8, 8)}
Payload = type("Payload", (), {"__reduce__": lambda self: (os.mkdir, ("mark",))})  # unpickling it makes a folder


@pytest.mark.parametrize("holder", [None, "model_state_dict", "state_dict", "model", "module"])
@settings(max_examples=settings.default.max_examples // 2)
@given(layout=any_of([dict, hugging_face, nanogpt]), prefix=prefixes.map("".join), head=heads,
       masks=any_of([{}, MASKS]), dtype=any_of([torch.float32, torch.float16]),
       beside=any_of([{}, {"config": None}, {"config": {"n_heads": 7}, "optimizer": {"state": {}}, "epoch": 3}]),
       save=any_of([torch.save, save_before_2020, save_safetensors]))
def test_a_model_is_found_whatever_names_surround_it(path, layout, prefix, head, dtype, masks, holder, beside, save):
    params = map_params(lambda tensor: tensor.to(dtype), MODEL | {"out_head.weight": head})
    state = {prefix + name: tensor.detach().requires_grad_(tensor.is_floating_point())
             for name, tensor in (layout(params) | masks).items()}
    save(state if save is save_safetensors else beside | ({holder: state} if holder else state), path)
    loaded = load_model(path, n_heads=2)
    assert_equals(loaded.params, params)
    assert replace(loaded.config, drop_rate=0.0) == GPT2 and loaded[2:] == (None, None)


def nanogpt_file(folder, **changes):
    """What nanoGPT saves. Its vocabulary has 50304 rows; no token has the last 47."""
    rows = F.pad(MODEL["tok_emb.weight"], (0, 0, 0, 47), value=3.0)
    state = nanogpt(MODEL) | {"wte.weight": rows, "lm_head.weight": rows}
    stated = {"n_layer": 2, "n_head": 2, "n_embd": 4, "block_size": 8, "bias": True, "vocab_size": 50304}
    torch.save({"model": {f"_orig_mod.transformer.{name}": tensor for name, tensor in state.items()},
                "model_args": stated | changes, "config": {"dataset": "openwebtext"}}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def hugging_face_folder(folder, *names, save=save_safetensors):
    """What transformers saves: the tensors, in one file or several, their configuration and GPT-2's vocabulary."""
    state = [(f"transformer.{name}", tensor) for name, tensor in hugging_face(MODEL).items()]
    names = names or ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    for i, name in enumerate(names):
        save(dict(state[i::len(names)]), folder / name)
    stated = {"n_embd": 4, "n_head": 2, "n_layer": 2, "n_positions": 8, "n_ctx": 8, "vocab_size": 50257}
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "vocab.json").write_text(json.dumps({"a": 64, "Ġthe": 262}))
    (folder / "tokenizer.json").write_text('{"vocab": {\n  "Ġthe":262\n}}', encoding="utf-8")
    return folder


@pytest.mark.parametrize("write", [
    nanogpt_file, lambda folder: hugging_face_folder(folder, "model.safetensors") / "model.safetensors",
    lambda folder: hugging_face_folder(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    partial(hugging_face_folder, save=torch.save)])
def test_files_that_state_their_heads_arrive_bit_for_bit(tmp_path, write):
    loaded = load_model(write(tmp_path))
    assert_equals(loaded.params, MODEL)
    assert loaded.config == GPT2
    assert_refused(lambda: load_model(write(tmp_path), n_heads=1), "n_heads", error=ValueError)


@pytest.mark.parametrize("shard_size", ["1GB", "200KB"])
def test_what_transformers_saves_gives_its_logits(tmp_path, shard_size):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=8, n_embd=4, n_layer=2, n_head=2)).eval()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    params, config, *_ = load_model(tmp_path)
    exactly(forward(map_params(torch.Tensor.double, params), INPUTS, config), model.double()(INPUTS).logits)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "average.h.0.ln_1.weight"])
def test_another_head_and_what_is_there_twice_is_left_out_with_a_warning(path, name):
    torch.save(hugging_face(MODEL) | {name: torch.ones(4)}, path)
    with pytest.warns(UserWarning, match=name):
        assert_equals(load_model(path, n_heads=2).params, MODEL)


@pytest.mark.parametrize("width, n_heads", [
    (768, 12), (1024, 16), (1280, 20), (1600, 25), (200, 1), (256, 4), (390, 6), (100, 1), (4, 1)])
def test_heads_that_are_stated_nowhere_are_one_for_each_64_if_possible(width, n_heads):
    assert choose({}, {"emb_dim": width}, None)[1].n_heads == n_heads  # of a fresh model
    params = dict.fromkeys(("tok_emb.weight", "pos_emb.weight", "trf_blocks.0."), torch.empty(2, width, device="meta"))
    with pytest.warns(UserWarning, match="--n-heads"):
        assert infer_config(params, {}).n_heads == n_heads


@pytest.mark.parametrize("name, change", [
    *((HPARAMS, change) for change in ({"n_layer": 1}, {"n_embd": 8}, {"n_vocab": 50256}, {"n_ctx": 9}, {"n_head": 3})),
    *(("config.json", change) for change in (
        None, {"n_layer": 3}, {"n_embd": 8, "n_head": 4}, {"vocab_size": 50258}, {"n_positions": 9, "n_ctx": 9},
        {"n_head": 3}, {"n_head": "many"}, {"layer_norm_epsilon": 1e-6}, {"scale_attn_weights": False})),
    *((name, {"Ġthe": 2620}) for name in ("vocab.json", "encoder.json", "tokenizer.json"))])
def test_what_lies_beside_the_tensors_and_contradicts_them_is_refused(tmp_path, name, change):
    write_openai(tmp_path, openai(MODEL)) if name == HPARAMS else hugging_face_folder(tmp_path, "model.safetensors")
    stated = json.loads((tmp_path / name).read_bytes()) if "config" in name or name == HPARAMS else {}
    (tmp_path / name).write_text("{" if change is None else json.dumps(stated | change))
    assert_refused(lambda: load_model(tmp_path), str(tmp_path), error=ValueError)


def test_a_file_of_nanogpts_that_contradicts_its_tensors_is_refused(tmp_path):
    assert_refused(lambda: load_model(nanogpt_file(tmp_path, block_size=9)), "context_length 9", error=ValueError)


@pytest.mark.parametrize("name", ["model/wte", "model/h1/mlp/c_fc/w", "model/h0/attn/c_attn/b", "model/ln_f/g"])
@pytest.mark.parametrize("shape", [None, (), (3,), (2, 16, 16)])
def test_a_missing_or_misshapen_variable_is_refused_with_the_folder(tmp_path, name, shape):
    variables = {other: array for other, array in openai(MODEL).items() if other != name}
    more = {} if shape is None else {name: np.ones(shape, np.float32)}
    assert_refused(lambda: load_openai(write_openai(tmp_path, variables | more)), str(tmp_path), error=ValueError)


@pytest.mark.parametrize("save", [torch.save, save_before_2020])
@pytest.mark.parametrize("content, word", [
    ([1, 2], ""), ({"wpe.w": INPUTS / 2}, ""), ({}, ""), ({"a": 1}, ""), (torch.zeros(2), ""), ({1: torch.ones(2)}, ""),
    ({"model": MODEL, "more": torch.nn.Linear(1, 1)}, "Linear"), (Payload(), "mkdir"),
    (hugging_face(MODEL) | {"h.0.attn.c_attn.weight": torch.ones(())}, ""),
    (MODEL | {"pos_emb.weight": torch.ones(8, 5)}, "(8, 5)"), (MODEL | {"h.2.b": torch.ones(2)}, "h.2.b"),
    ({name: tensor for name, tensor in MODEL.items() if name != "final_norm.shift"}, "final_norm.shift"),
    ({name: tensor for name, tensor in nanogpt(MODEL).items() if "bias" not in name}, "biases"),
    (MODEL | {name: torch.ones(65, 4) for name in ("tok_emb.weight", "out_head.weight")}, "65")])
def test_another_content_is_refused_with_the_reason_and_runs_nothing(tmp_path, monkeypatch, save, content, word):
    monkeypatch.chdir(tmp_path)
    save(content, "a.pth")
    assert_refused(lambda: load_model("a.pth", n_heads=2), "a.pth", word, error=ValueError)
    assert os.listdir() == ["a.pth"]


@LINUX
def test_what_is_no_file_is_refused_by_its_name(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    reader, writer = os.pipe()
    os.close(writer)
    for name in ("folder.pth", "absent.pth", "/dev/null", f"/dev/fd/{reader}"):
        assert_refused(lambda name=name: load_checkpoint(tmp_path / name), str(tmp_path / name))
    os.close(reader)


# Damage
CHANGES = [lambda piece: bytes(byte ^ 255 for byte in piece), lambda piece: piece[::-1], lambda piece: b"",
           lambda piece: bytes(len(piece[:999])) + piece[999:]]  # 40 KB of zeros take PyTorch 42 s to refuse
places = st.integers(-2**13, 2**16)  # a zip file has its table at the end
edits = st.lists(st.tuples(any_of(CHANGES), places, st.integers(1, 99) | st.just(2**20)), min_size=1, max_size=3)


def damaged(load, path, edits):
    """What is loaded after these edits of a file, or None if one line says that it, or its folder, can't be used."""
    content = bytearray(path.read_bytes())
    for change, start, length in edits:
        start %= len(content) or 1
        content[start:start + length] = change(content[start:start + length])
    path.write_bytes(content)
    try:
        with warnings.catch_warnings(action="ignore"):  # of a name that is none any more
            return load()
    except (OSError, ValueError) as error:
        assert str(path.parent) in str(error) and "\n" not in str(error)
        return None


@settings(max_examples=3 * settings.default.max_examples)
@given(any_of([torch.save, save_before_2020, save_safetensors]), edits)
@example(torch.save, [(CHANGES[2], 4, 60)])  # 60 bytes cut out near the start
def test_a_damaged_file_is_refused_or_with_checksums_equals_the_original(path, save, edits):
    save(whole().params if save is save_safetensors else to_content(whole()), path)
    loaded = damaged(lambda: load_checkpoint(path, n_heads=2), path, edits)
    assert loaded is None or save is not torch.save or same(loaded, whole())


@given(any_of([INDEX, DATA]), edits)
def test_a_damaged_file_of_openais_is_refused_or_equals_the_original(path, name, edits):
    folder = write_openai(path.parent / "openai", openai(MODEL))
    loaded = damaged(lambda: load_openai(folder), folder / name, edits)
    assert loaded is None or same(loaded[0], MODEL)


# The disk
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_litter(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), write_atomically(tmp_path / "a.pth") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "a.pth").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.pth"]


@LINUX
def test_what_a_link_points_to_is_replaced_when_all_is_on_the_disk(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace  # what they do is seen and not changed
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(("fsync", os.fstat(file).st_size)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or rename(*paths))
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.pth").symlink_to(Path("disk", "real.pth"))
    with write_atomically(tmp_path / "a.pth") as file:
        file.write(b"new")
    assert calls == [("fsync", 3), "replace"] and (tmp_path / "a.pth").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["real.pth"] and (tmp_path / "disk" / "real.pth").read_bytes() == b"new"


@LINUX
@pytest.mark.parametrize("name, word", [
    ("folder.pth", ""), ("absent/a.pth", ""), ("b.pth", ""), ("c.pth", "File too large")])
def test_a_place_that_cannot_be_written_is_refused_by_its_name(tmp_path, request, name, word):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "b.pth.partial").mkdir()
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))  # so that c.pth ends as on a full disk
    path, checkpoint = tmp_path / name, Checkpoint(MODEL, GPT2)
    assert_refused(lambda: save_checkpoint(path, checkpoint), str(path), "can't be written", word, error=OSError)


@LINUX
@pytest.mark.parametrize("save", [torch.save, save_safetensors])
def test_tensors_are_mapped(path, save):
    save(init_params(TINY, seeded()), path)
    loaded = load_checkpoint(path, n_heads=2).params
    path.write_bytes(bytes(path.stat().st_size))  # what writes into the file changes them
    assert not any(tensor.any() for tensor in loaded.values())


# Downloads
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name, asked = self.server, Path(self.path).name, self.headers["Range"]
        server.requests.append((name, asked))
        has_ranges = server.has_ranges and asked and "x-ms-version" in self.headers  # as Azure does
        content, start = server.files[self.path], int(asked[6:-1]) if has_ranges else 0
        if "gzip" in self.headers["Accept-Encoding"]:  # of which a range would be another
            content = gzip.compress(content)
        if server.statuses or start >= len(content):
            self.send_error(server.statuses.pop(0) if server.statuses else 416)
        else:
            self.send_response(206 if has_ranges else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            is_broken = name == DATA and server.breaks > 0
            server.breaks -= is_broken
            self.wfile.write(content[start:(start + len(content)) // 2 if is_broken else None])


@pytest.fixture
def server(monkeypatch):
    """It serves `files`, but first answers with `statuses`, and breaks off in the middle of the data `breaks` times."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(weights, "PAUSES", (0, 0, 0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url, server.requests, server.statuses = f"http://127.0.0.1:{server.server_port}/", [], []
        server.has_ranges, server.breaks, sizes = True, 0, {HPARAMS: 1, INDEX: 9, DATA: 999}
        server.files = {f"/124M/{name}": bytes(range(100)) * size for name, size in sizes.items()}
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def fetch(server, folder):
    """Downloads the files and shows that they are whole. Returns where the requests for the data began."""
    assert download_openai("124M", folder, server.url) == folder / "124M"
    assert {f"/124M/{path.name}": path.read_bytes() for path in (folder / "124M").iterdir()} == server.files
    return [int(asked[6:-1]) for name, asked in server.requests if name == DATA]


def test_openais_model_is_downloaded_by_its_size(published, server, tmp_path):
    server.files = {f"/355M/{path.name}": path.read_bytes() for path in published.iterdir()}
    assert_equals(load_model("openai", None, "355M", tmp_path / "new", server.url).params, MODEL)
    assert [name for name, _ in server.requests] == list(weights.OPENAI_FILES)


def test_a_download_goes_on_where_it_broke_also_in_a_later_run(server, tmp_path):
    server.statuses, server.breaks = [500, 503], 5
    assert_refused(lambda: fetch(server, tmp_path), DATA, INDEX, HPARAMS, str(tmp_path / "124M"), error=OSError)
    assert not (tmp_path / "124M" / DATA).exists()
    starts = fetch(server, tmp_path)
    halves = [(start + 99_900) / 2 for start in starts]  # how far each attempt came, but for a chunk at most
    assert len(starts) == 6 and all(0 <= half - start <= 2**13 for half, start in zip(halves, starts[1:], strict=False))
    assert fetch(server, tmp_path) == starts  # what is finished is not fetched again
    (tmp_path / "124M" / DATA).rename(tmp_path / "124M" / f"{DATA}.partial")  # it lacks nothing but its name
    assert fetch(server, tmp_path) == [*starts, 99_899]


def test_a_server_without_ranges_sends_the_file_from_the_start(server, tmp_path):
    server.has_ranges, server.breaks = False, 1
    assert len(fetch(server, tmp_path)) == 2


@LINUX
@pytest.mark.parametrize("trouble, word", [
    *((lambda server, _, status=status: server.statuses.append(status), str(status)) for status in (404, 407)),
    (lambda _, partial: partial.write_bytes(bytes(1000)), "416"),
    (lambda _, partial: partial.symlink_to("/dev/full"), "No space left"),
    (lambda _, partial: partial.symlink_to("/absent/file"), "No such file"),
    *((lambda server, _, url=url: vars(server).update(url=url.format(server.server_port)), word) for url, word in {
        "ftp://x": "ftp:", "no url": "no url", "https://x": "Tunnel", "https://127.0.0.1:{}": "SSL"}.items())])
def test_what_no_other_attempt_would_mend_is_reported_at_once(server, tmp_path, monkeypatch, trouble, word):
    monkeypatch.setattr(weights, "PAUSES", ("a second attempt",))  # time.sleep would raise a TypeError
    monkeypatch.setenv("https_proxy", server.url)  # which is no proxy
    (tmp_path / "124M").mkdir()
    trouble(server, tmp_path / "124M" / f"{HPARAMS}.partial")
    assert_refused(lambda: fetch(server, tmp_path), word, HPARAMS, INDEX, DATA, str(tmp_path / "124M"), error=OSError)
    if word == "416":
        fetch(server, tmp_path)  # what was too long is begun anew in the next run
