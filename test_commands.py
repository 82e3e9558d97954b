"""Both command lines as a user meets them: what they print, where they stop, what they refuse."""
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sample
import train
from conftest import ACCELERATOR, HERE, LONG, NEEDS_ACCELERATOR, ROUNDING, STORY, same, seeded
from gpt import Config, init_params
from weights import Checkpoint, load_checkpoint, save_checkpoint

MAIN = {"train.py": train.main, "sample.py": sample.main}
MODEL = "--n-layers 1 --emb-dim 4 --n-heads 2 --context-length 8 --batch-size 4 --eval-iter 1"
SMALL = f"{MODEL} --train-ratio 0.04"  # of the story: 25 windows, 6 steps an epoch
CONFIG = Config(vocab_size=50257, context_length=8, emb_dim=4, n_heads=2, n_layers=1, drop_rate=0.1, qkv_bias=False)
CPU = ("--device", "cpu")  # with other devices there are other figures
TIMEOUT = 120  # seconds; a busy machine is no failure
POSIX = pytest.mark.skipif(os.name != "posix", reason="only POSIX has these signals and pipes")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which process is which, on Linux alone")


class Result(NamedTuple):
    status: int
    out: str
    err: str


@contextmanager
def known_signals():
    """The handlers that a process has at its start, wherever the tests were started from."""
    handlers = {getattr(signal, name): signal.SIG_DFL for name in ("SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)} | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(folder, line, out="kept", err="kept", stdin="", **environment):
    """What a command line does in a folder, on a CPU, in this process. An output or input of None is a closed one."""
    script, *arguments = shlex.split(line)
    out, err = (io.StringIO() if each == "kept" else each for each in (out, err))
    with (pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), known_signals(),
          pytest.raises((SystemExit, KeyboardInterrupt)) as ended):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *CPU, *arguments])
        patch.setattr(sys, "stdin", stdin if stdin is None else io.StringIO(stdin))
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        sample.run_command(MAIN[script])
    status = getattr(ended.value, "code", None)  # a KeyboardInterrupt has none: it should not come as far as here
    return Result(status, *(each.getvalue() if isinstance(each, io.StringIO) else "" for each in (out, err)))


class Listener(io.StringIO):
    """An output that calls a function with each text that is written to it."""
    def __init__(self, listen):
        super().__init__()
        self.listen = listen

    def write(self, text):
        count = super().write(text)
        self.listen(text)
        return count


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps(path):
    opt_state = load_checkpoint(path).opt_state
    return opt_state.step if opt_state else 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small model after two epochs, and its log; no test changes it."""
    folder = tmp_path_factory.mktemp("trained")
    result = run(folder, f"train.py {SMALL} --epochs 2 --eval-freq 1")
    assert result.status == 0, result.err
    (folder / "log.txt").write_text(result.out, encoding="utf-8")
    return folder


@pytest.fixture
def model(trained, tmp_path):
    """The checkpoint of `trained`, in a folder of the test's own."""
    (tmp_path / "model.pth").write_bytes((trained / "model.pth").read_bytes())
    return tmp_path / "model.pth"


# Training

def test_the_log_is_on_standard_output_and_the_rest_on_standard_error(tmp_path):
    status, out, err = run(tmp_path, f"train.py {SMALL} --epochs 1")
    lines = out.splitlines()
    assert status == 0 and len(lines) == 3
    pattern = r"Ep 1 \(Step 00000[05]\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}"
    assert all(re.fullmatch(pattern, line) for line in lines[:2])
    assert lines[2].startswith("Every effort moves you")
    shapes = init_params(CONFIG, seeded()).values()
    windows = re.search(r"\+ (\d+) windows", err)[1]
    megabytes = f"{(tmp_path / 'model.pth').stat().st_size / 1e6:.1f}"
    assert err.splitlines() == [
        f"{sum(tensor.numel() for tensor in shapes):,} parameters, 25 + {windows} windows of 8 tokens, 6 steps, on cpu",
        f"saved model.pth ({megabytes} MB) and loss.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "model.pth"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [tokens for tokens, *_ in load_checkpoint(tmp_path / "model.pth").run["evaluations"]] == [32, 6 * 32]


def test_a_terminal_gets_a_bar_beside_the_same_log(trained, tmp_path):
    status, out, err = run(tmp_path, f"train.py {SMALL} --epochs 2 --eval-freq 1", err=Terminal())
    assert status == 0 and out == (trained / "log.txt").read_text(encoding="utf-8")
    assert "training: 100%" in err and "tokens/s" in err and "loss=" in err


def test_epochs_are_the_total_also_with_resume(trained, tmp_path):
    line = f"train.py {SMALL} --eval-freq 1"
    first = run(tmp_path, f"{line} --epochs 1")
    rest = run(tmp_path, "train.py --resume --epochs 2")
    assert rest.status == 0 and first.out + rest.out == (trained / "log.txt").read_text(encoding="utf-8")
    picture = (tmp_path / "loss.png").read_bytes()
    (tmp_path / "loss.png").unlink()
    status, nothing, err = run(tmp_path, "train.py --resume")
    assert (status, nothing) == (0, "") and "all 2 epochs are done: --epochs asks for more" in err
    assert (tmp_path / "loss.png").read_bytes() == picture  # it is drawn again


def test_no_epochs_print_losses_and_perplexities_and_write_nothing(tmp_path):
    status, out, _ = run(tmp_path, f"train.py {SMALL} --epochs 0")
    number = r"(\d+\.\d+)"
    found = re.fullmatch(rf"Training loss {number}, validation loss {number}\n"
                         rf"Training perplexity {number}, validation perplexity {number}\n", out)
    assert status == 0 and found
    losses, perplexities = [*map(float, found.groups()[:2])], [*map(float, found.groups()[2:])]
    # The loss is printed to 5 digits, so its exponential is known to 0.5e-5 of itself.
    assert perplexities == pytest.approx([*map(math.exp, losses)], rel=1e-5)
    assert not list(tmp_path.iterdir())


def test_the_file_has_the_last_multiple_of_save_every_at_each_time(tmp_path):
    saved = []

    def look(text):
        if text.startswith("Ep "):
            saved.append(steps(tmp_path / "model.pth"))
    run(tmp_path, f"train.py {SMALL} --epochs 2 --eval-freq 1 --save-every 5", out=Listener(look))
    # A line is printed before its step is saved. The file is there from the start.
    assert saved == [0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 10, 10] and steps(tmp_path / "model.pth") == 12


@POSIX
def test_a_disk_too_small_for_the_checkpoint_is_noticed_at_the_start(tmp_path):
    import resource
    (tmp_path / "model.pth").write_bytes(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        status, out, err = run(tmp_path, f"train.py {SMALL} --epochs 1 --checkpoint new.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and out == "" and err.splitlines()[1:] == ["train.py: error: new.pth: File too large"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_a_new_run_takes_the_place_of_another_only_with_overwrite(model):
    before = model.read_bytes()
    line = f"train.py {SMALL} --epochs 1"
    status, out, err = run(model.parent, line)
    assert (status, out) == (2, "") and model.read_bytes() == before
    assert err == ("train.py: error: model.pth is there: --resume goes on with it, --overwrite replaces it, or use "
                   "another name\n")
    assert run(model.parent, f"{line} --overwrite").status == 0 and steps(model) == 6
    assert sorted(path.name for path in model.parent.iterdir()) == ["loss.png", "model.pth"]


def test_a_resumed_run_may_replace_its_own_best_model(tmp_path):
    assert run(tmp_path, f"train.py {SMALL} --epochs 1 --eval-freq 100 --best best.pth").status == 0
    before = (tmp_path / "best.pth").read_bytes()
    assert run(tmp_path, "train.py --resume --epochs 2").status == 0
    assert (tmp_path / "best.pth").read_bytes() != before


def test_a_run_that_goes_on_in_another_folder_leaves_a_best_model_there_alone(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    assert run(here, f"train.py {SMALL} --epochs 1 --eval-freq 100 --best best.pth").status == 0
    before = (here / "best.pth").read_bytes()
    (there / "best.pth").write_bytes(before)
    assert run(there, "train.py --resume --checkpoint ../here/model.pth --epochs 2").status == 0
    assert (there / "best.pth").read_bytes() == before != (here / "best.pth").read_bytes()


def test_a_run_that_starts_from_a_model_leaves_its_file_alone(model):
    before = model.read_bytes()
    status, out, _ = run(model.parent, "train.py --weights model.pth --checkpoint new.pth --context-length 4 "
                                       "--train-ratio 0.01 --epochs 1")
    assert status == 0 and out.startswith("Ep 1 (Step 000000)") and model.read_bytes() == before
    new = load_checkpoint(model.with_name("new.pth"))
    assert new.config.context_length == 8 and new.run["settings"]["context_length"] == 4


def test_a_run_goes_on_with_its_own_text_alone(tmp_path):
    story = STORY.read_text(encoding="utf-8")
    (tmp_path / "a.txt").write_text(story, encoding="utf-8")
    (tmp_path / "b.txt").write_text(story.replace("Jack", "John"), encoding="utf-8")  # as many tokens
    run(tmp_path, f"train.py {SMALL} --data a.txt --epochs 1")
    status, _, err = run(tmp_path, "train.py --resume --data b.txt --epochs 2")
    assert status == 2 and "model.pth: it was made with other data than b.txt" in err
    assert run(tmp_path, "train.py --resume --epochs 2").status == 0


def test_the_data_option_given_twice_is_the_option_with_two_files(tmp_path):
    story = STORY.read_text(encoding="utf-8")
    (tmp_path / "a.txt").write_text(story[:900], encoding="utf-8")
    (tmp_path / "b.txt").write_text(story[900:2000], encoding="utf-8")
    twice, once, other = (run(tmp_path, f"train.py {MODEL} --epochs 0 {data}") for data in (
        "--data a.txt --data b.txt", "--data a.txt b.txt", "--data b.txt a.txt"))
    assert twice.status == 0 and twice == once and once.out != other.out


def test_the_story_is_found_from_another_folder_unless_that_has_one(tmp_path):
    line = f"train.py {SMALL} --epochs 0"
    found = run(tmp_path, line)
    assert found.status == 0 and found == run(tmp_path, f"{line} --data {shlex.quote(str(STORY))}")
    (tmp_path / "the-verdict.txt").write_text("Another story, which is long enough. " * 90, encoding="utf-8")
    assert run(tmp_path, line).out != found.out


def test_of_the_options_of_a_model_the_embedding_size_alone_is_enough(tmp_path):
    assert train.choose({"emb_dim": 128}, None, None)[1].n_heads == 2  # one for each 64
    assert train.choose({"emb_dim": 8}, None, None)[1].n_heads == 1
    assert train.choose({"emb_dim": 128, "n_heads": 4}, None, None)[1].n_heads == 4
    (tmp_path / "text.txt").write_text("A text of a few words. " * 20, encoding="utf-8")
    line = "train.py --data text.txt --emb-dim 64 --n-layers 1 --context-length 8 --epochs 0"
    assert run(tmp_path, line).status == 0


@pytest.mark.parametrize("script", MAIN)
def test_help_tells_every_option_on_standard_output(tmp_path, script):
    status, out, err = run(tmp_path, f"{script} --help")
    assert (status, err) == (0, "")
    options = fields(sample.SampleOptions) if script == "sample.py" else fields(train.Settings) + fields(train.Files)
    names = {sample.flag(each.name) for each in options}
    assert names <= set(re.findall(r"--[a-z0-9-]+", out)) and "examples:" in out


# Sampling

def test_sampling_needs_nothing_but_the_checkpoint(model):
    line = "sample.py --prompt 'Hello <|endoftext|> 你' --max-new-tokens 70 --temperature 1 --top-k 5"
    status, out, err = run(model.parent, line)
    assert status == 0 and out.startswith("Hello <|endoftext|> 你") and out.endswith("\n")
    assert re.fullmatch(r"\d+ tokens in \d+\.\d\d s, \d+\.\d tokens/s, seed 123\n", err)
    assert run(model.parent, line).out == out != run(model.parent, f"{line} --seed 1").out
    assert run(model.parent, "sample.py --dtype bfloat16").status == 0
    assert [path.name for path in model.parent.iterdir()] == ["model.pth"]


def test_a_dash_reads_the_prompt_from_standard_input(trained):
    typed = run(trained, "sample.py --prompt 'Two\n lines 你'")
    assert typed.out.startswith("Two\n lines 你")
    assert run(trained, "sample.py --prompt -", stdin="Two\n lines 你\n").out == typed.out


@pytest.mark.parametrize("stdin", ["", "\n", None])
def test_a_standard_input_that_is_empty_or_closed_costs_one_line(trained, stdin):
    status, _, err = run(trained, "sample.py --prompt -", stdin=stdin)
    assert status == 2 and len(err.splitlines()) == 1 and err.startswith("sample.py: error: ")


def test_several_samples_are_several_continuations_and_the_seed_gives_them_again(trained):
    line = "sample.py --num-samples 3 --temperature 2 --max-new-tokens 9"
    status, out, err = run(trained, line)
    one, two, three, end = out.split("\n\n")
    assert status == 0 and end == "" and all(text.startswith("Every effort moves you") for text in (one, two, three))
    assert len({one, two, three}) == 3 and err.startswith("27 tokens in ")
    assert run(trained, line).out == out != run(trained, f"{line} --seed 1").out
    greedy = run(trained, "sample.py --num-samples 3 --max-new-tokens 9").out
    assert greedy == 3 * (run(trained, "sample.py --max-new-tokens 9").out + "\n")


def test_several_samples_are_cut_at_their_end_of_text_and_counted_without_it(capsys):
    rows = torch.tensor([[15496, 50256, 50256], [15496, 995, 0]])
    assert sample.write_several("A ", rows, sample.gpt2_tokenizer()) == 4
    assert capsys.readouterr().out == "A Hello\n\nA Hello world!\n\n"


@pytest.mark.parametrize("samples", [1, 3])
def test_no_new_tokens_leave_the_prompt(trained, samples):
    status, out, _ = run(trained, f"sample.py --max-new-tokens 0 --num-samples {samples}")
    assert status == 0 and out.count("Every effort moves you") == samples


def test_a_plain_state_dict_is_sampled_and_trained_on(trained, tmp_path):
    torch.save(load_checkpoint(trained / "model.pth").params, tmp_path / "plain.pth")
    sampled = run(tmp_path, "sample.py --weights plain.pth --n-heads 2")
    assert sampled.status == 0 and sampled.out == run(trained, "sample.py").out
    options = "--n-heads 2 --batch-size 4 --train-ratio 0.04 --epochs 1 --eval-iter 1"
    status, out, _ = run(tmp_path, f"train.py --weights plain.pth {options}")
    assert status == 0 and out.startswith("Ep 1 (Step 000000)")
    resumed = run(tmp_path, f"train.py --resume --checkpoint plain.pth {options}")
    assert resumed.status == 0 and resumed.out == out
    assert same(load_checkpoint(tmp_path / "plain.pth").params, load_checkpoint(tmp_path / "model.pth").params)


def test_an_interrupted_sample_ends_its_line(trained):
    pieces = []

    def interrupt(text):
        pieces.append(text)
        if len(pieces) == 4:
            signal.raise_signal(signal.SIGINT)
    status, out, err = run(trained, "sample.py", out=Listener(interrupt))
    assert status == 130 and err == "" and out.startswith("".join(pieces[:4])) and out.endswith("\n")


# What can't be printed, or computed

def test_a_console_without_unicode_is_no_failure(trained):
    console = io.TextIOWrapper(io.BytesIO(), "latin-1", newline="\n")
    assert run(trained, "sample.py --prompt 'naïve 你 \udcff'", out=console).status == 0
    assert console.buffer.getvalue().startswith("naïve ? ?".encode("latin-1"))


@pytest.mark.parametrize("line", [f"train.py {SMALL} --epochs 1 --checkpoint new.pth", "sample.py"])
def test_outputs_that_were_closed_before_the_start_are_no_failure(model, line):
    assert run(model.parent, line, out=None, err=None).status == 0


@pytest.mark.parametrize("options", [
    "",                              # the next step's loss is nan
    "--eval-freq 1",                 # the evaluation's
    "--eval-freq 5 --save-every 1",  # the model that is to be saved
])
def test_a_run_that_computes_nan_ends_in_one_line_and_leaves_the_file_as_it_was(model, options):
    before = model.read_bytes()
    status, out, err = run(model.parent, f"train.py --resume --lr 1e9 --epochs 3 --eval-freq 5 {options}")
    assert status == 2 and len(err.splitlines()) == 2 and "nan" not in out and model.read_bytes() == before
    failure, kept = err.splitlines()[1].split(": perhaps the learning rate is too high. ")
    assert kept == "model.pth has the model after 12 steps"
    assert re.fullmatch(r"train\.py: error: .*\bnan\b.*", failure) and re.search("step 13|after 13 steps", failure)


@pytest.mark.parametrize("options", ["", "--temperature 1 --top-k 5", "--temperature 1 --num-samples 2"])
def test_a_model_of_nan_is_not_sampled_and_the_message_begins_a_line(tmp_path, options):
    params = init_params(CONFIG, seeded())
    params["final_norm.scale"] *= math.nan
    save_checkpoint(tmp_path / "model.pth", Checkpoint(params, CONFIG))
    together = io.StringIO()
    assert run(tmp_path, f"sample.py {options}", out=together, err=together).status == 2
    message = together.getvalue().splitlines()[-1]
    assert message.startswith("sample.py: error: ") and "nan" in message and together.getvalue().count("error") == 1


# Signals

STOPS = [
    ("SIGINT", 0),
    ("SIGTERM", 5),  # the last step of an epoch
    ("SIGHUP", 6),
    ("SIGUSR1", 10),
]


@pytest.mark.parametrize("name, step", STOPS)
def test_a_signal_finishes_the_step_and_the_run_goes_on_as_if_nothing_had_happened(trained, tmp_path, name, step):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"there is no {name} here")

    def send(text):
        if f"(Step {step:06d})" in text:
            for _ in range(1 if name in ("SIGINT", "SIGTERM") else 2):  # a closed terminal sends SIGHUP twice
                assert signal.getsignal(number) != signal.SIG_DFL  # which would end the tests
                signal.raise_signal(number)
    out = Listener(send)
    first = run(tmp_path, f"train.py {SMALL} --epochs 2 --eval-freq 1 --checkpoint 'a model.pth'", out=out)
    assert first.status == 128 + number and steps(tmp_path / "a model.pth") == step + 1
    hint = re.fullmatch(rf"stopped after {step + 1} steps: `python (.*)` goes on", first.err.splitlines()[-1])
    rest = run(tmp_path, hint[1])
    assert rest.status == 0 and first.out + rest.out == (trained / "log.txt").read_text(encoding="utf-8")
    assert same(load_checkpoint(tmp_path / "a model.pth"), load_checkpoint(trained / "model.pth"))


@POSIX
def test_signals_that_are_ignored_stay_so_and_a_second_ctrl_c_is_the_systems_own():
    with known_signals():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        with train.caught_signals() as caught:
            signal.raise_signal(signal.SIGHUP)
            assert caught == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)  # the first one asks, whatever came before
            assert caught == [signal.SIGUSR1, signal.SIGTERM]
            assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert {number: signal.getsignal(number) for number in before} == before


def test_a_platform_with_few_signals_is_enough(tmp_path, monkeypatch):
    for name in ("SIGHUP", "SIGPIPE", "SIGUSR1"):  # Windows has none of them
        monkeypatch.delattr(signal, name, raising=False)

    def send(text):
        if "(Step 000000)" in text:
            signal.raise_signal(signal.SIGINT)
    assert run(tmp_path, f"train.py {SMALL} --epochs 1", out=Listener(send)).status == 130
    assert run(tmp_path, "sample.py").status == 0


@POSIX
@pytest.mark.parametrize("is_for_both", [False, True])
def test_a_log_that_none_reads_any_more_ends_the_run_which_is_saved(tmp_path, is_for_both):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as out:
        status, _, err = run(tmp_path, f"train.py {SMALL} --epochs 1", out=out, err=out if is_for_both else "kept")
    assert status == 141 and steps(tmp_path / "model.pth") == 1
    assert is_for_both or "`python train.py --resume --checkpoint model.pth` goes on" in err.splitlines()[-1]


# Processes

# What a shell gives to its commands, also where the tests run under nohup or in the background of a script.
FRESH = """import os, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGPIPE"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execvp(sys.argv[1], sys.argv[1:])"""
# One step an epoch, and then a sample that is more than a pipe takes: until someone reads it, the run is held there.
HELD = f"{MODEL} --train-ratio 0.01 --epochs 2000 --start-context '{'word ' * 20000}'"


def children(pid):
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@contextmanager
def started(folder, line, *before, **options):
    """A command line in a process of its own, on a CPU, which is killed at the end, or when it takes too long."""
    script, *arguments = shlex.split(line)
    command = [sys.executable, "-c", FRESH, *(before or [sys.executable]), str(HERE / script), *CPU, *arguments]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=folder, bufsize=0, **(pipes | options)) as process:
        def kill():
            for each in (*children(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        alarm = threading.Timer(TIMEOUT, kill)
        alarm.start()
        try:
            yield process
        finally:
            alarm.cancel()
            if process.poll() is None:
                kill()


@POSIX
def test_a_process_under_nohup_outlives_its_terminal_and_its_log_is_in_order(tmp_path):
    with started(tmp_path, f"train.py {HELD}", "nohup", sys.executable, stderr=subprocess.STDOUT) as process:
        first = process.stdout.readline()
        byte = process.stdout.read(1)  # of the log of the first step: it is in the middle of the run
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=TIMEOUT)
    patterns = [r"[\d,]+ parameters, .*", r"Ep 1 \(Step 000000\): .*", "word .*", r"saved model\.pth .*",
                "stopped after 1 steps: `python train.py --resume --checkpoint model.pth` goes on"]
    lines = (first + byte + rest).decode().splitlines()
    assert all(map(re.fullmatch, patterns, lines)) and len(lines) == len(patterns)
    assert process.returncode == 143 and steps(tmp_path / "model.pth") == 1


@POSIX
def test_a_second_signal_ends_a_process_at_once(tmp_path):
    with started(tmp_path, f"train.py {HELD}") as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        while process.poll() is None:  # a signal that comes while the first is being handled is one with it
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
    assert process.returncode == -signal.SIGTERM
    assert steps(tmp_path / "model.pth") == 0 and not (tmp_path / "loss.png").exists()


@LONG
@POSIX
def test_training_into_head_saves_its_work_and_exits_141(tmp_path):
    with started(tmp_path, f"train.py {HELD}", stderr=subprocess.STDOUT) as process:
        process.stdout.readline()
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=TIMEOUT) == 141
    assert steps(tmp_path / "model.pth") == 1


@POSIX
def test_sampling_into_a_closed_pipe_says_nothing_and_exits_141(trained):
    with started(trained, "sample.py") as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=TIMEOUT) == 141


@LONG
@POSIX
def test_a_process_whose_outputs_were_closed_before_the_start_trains_all_the_same(tmp_path):
    shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable]
    with started(tmp_path, f"train.py {SMALL} --epochs 1", *shell) as process:
        assert process.communicate(timeout=TIMEOUT) == (b"", b"")
    assert process.returncode == 0 and steps(tmp_path / "model.pth") == 6


@POSIX
def test_ipython_runs_both_scripts(tmp_path):
    pytest.importorskip("IPython")
    lines = (f"train.py {SMALL} --epochs 1", "sample.py", "sample.py --weights absent.pth")
    cell = "\n".join(f"%run {shlex.quote(str(HERE))}/{line}" for line in lines)
    done = subprocess.run([sys.executable, "-m", "IPython", "--colors=NoColor", "-c", cell], cwd=tmp_path,
                          env=os.environ | {"IPYTHONDIR": str(tmp_path)}, capture_output=True, encoding="utf-8",
                          timeout=TIMEOUT)
    assert done.stdout.startswith("Ep 1 (Step 000000)") and done.stdout.count("\nEvery effort moves you") == 2
    assert "sample.py: error: there is no absent.pth" in done.stderr and "Traceback" not in done.stdout + done.stderr


@NEEDS_ACCELERATOR
def test_an_accelerator_is_used_where_there_is_one_and_its_file_goes_on_anywhere(tmp_path):
    def outcome(line):
        done = subprocess.run([sys.executable, *shlex.split(f"{HERE}/{line}")], cwd=tmp_path, timeout=TIMEOUT,
                              capture_output=True, encoding="utf-8")
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done
    first = outcome(f"train.py {SMALL} --epochs 1")
    assert f"on {ACCELERATOR.type}" in first.stderr and "the chapter's figures are a CPU's" in first.stderr
    assert "on cpu" in outcome("train.py --resume --epochs 2 --device cpu").stderr
    outcome("train.py --resume --epochs 3 --dtype bfloat16")
    assert steps(tmp_path / "model.pth") == 18
    for options in ("", "--dtype bfloat16 --temperature 1 --top-k 5 --num-samples 3"):
        assert outcome(f"sample.py {options}").stdout.startswith("Every effort moves you")


# Many processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}  # it asks for no name of this machine
TOGETHER = dict(env=os.environ | LOOPBACK)


@POSIX
def test_two_processes_train_as_one_does(tmp_path):
    line = f"train.py {SMALL} --epochs 4 --eval-freq 1 --drop-rate 0"  # 24 steps
    one = run(tmp_path, f"{line} --checkpoint one.pth")
    with started(tmp_path, f"{line} --checkpoint two.pth", *TORCHRUN, **TOGETHER) as launcher:
        out, _ = launcher.communicate(timeout=TIMEOUT)
    assert one.status == launcher.returncode == 0

    def log(text):
        """The lines without their figures, and the figures."""
        lines = [line for line in text.splitlines() if line.startswith("Ep ")]
        return [re.sub(r"\d+\.\d+", "#", line) for line in lines], re.findall(r"\d+\.\d+", " ".join(lines))
    (words, figures), (same_words, same_figures) = log(one.out), log(out.decode())
    assert words == same_words and len(words) == 24
    assert [*map(float, same_figures)] == pytest.approx([*map(float, figures)], abs=0.00101)  # the last printed digit
    one, two = (load_checkpoint(tmp_path / name) for name in ("one.pth", "two.pth"))
    # Two processes add the same terms in another order: a few roundings in each step.
    tolerance = 4 * ROUNDING * two.opt_state.step
    for ours, theirs in zip(one.run["evaluations"], two.run["evaluations"], strict=True):
        assert theirs == pytest.approx(ours, rel=tolerance)
    for name, tensor in one.params.items():
        assert (tensor - two.params[name]).abs().max() <= tolerance * tensor.abs().max(), name


def kill_rank(launcher, rank):
    """Kills one of the processes that torchrun has started."""
    ranks = {child: Path(f"/proc/{child}/environ").read_bytes() for child in children(launcher.pid)}
    os.kill(next(child for child in ranks if b"\0RANK=%d\0" % rank in ranks[child]), signal.SIGKILL)


@LONG
@LINUX
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_in_one_line_and_the_run_goes_on(tmp_path, rank):
    line = f"train.py {SMALL} --epochs 2000 --eval-freq 1 --save-every 1"
    with started(tmp_path, line, *TORCHRUN, **TOGETHER) as launcher:
        for _ in range(3):
            launcher.stdout.readline()
        kill_rank(launcher, rank)
        _, err = launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode != 0
    ours = [line for line in err.decode().splitlines() if line.startswith("train.py: ")]
    assert ours == ["train.py: error: another process has ended: --resume goes on from the last save"]
    done = steps(tmp_path / "model.pth")
    status, out, _ = run(tmp_path, f"train.py --resume --epochs {done // 6 + 1}")
    assert done >= 1 and status == 0 and out.startswith(f"Ep {done // 6 + 1} (Step {done:06d})")


@LONG
@LINUX
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(tmp_path):
    line = f"train.py {SMALL} --epochs 5 --eval-freq 1 --save-every 1"
    with started(tmp_path, line, *TORCHRUN, "--max-restarts", "1", **TOGETHER) as launcher:
        for _ in range(3):
            launcher.stdout.readline()
        kill_rank(launcher, 1)
        out, err = launcher.communicate(timeout=TIMEOUT)
    assert launcher.returncode == 0 and steps(tmp_path / "model.pth") == 30
    assert err.count(b"another process has ended") == 1 and b"(Step 000029)" in out


@LONG
@POSIX
def test_a_run_of_two_processes_is_bitwise_repeatable(tmp_path):
    for name in ("one.pth", "two.pth"):
        with started(tmp_path, f"train.py {SMALL} --epochs 2 --checkpoint {name}", *TORCHRUN, **TOGETHER) as launcher:
            launcher.communicate(timeout=TIMEOUT)
    one, two = (load_checkpoint(tmp_path / name) for name in ("one.pth", "two.pth"))
    assert one.run.pop("launcher") != two.run.pop("launcher") and same(one, two)


@LONG
@POSIX
def test_a_network_that_is_not_there_costs_a_process_one_line(tmp_path):
    absent = dict(env=os.environ | {"GLOO_SOCKET_IFNAME": "absent"})
    with started(tmp_path, f"train.py {SMALL}", *TORCHRUN, **absent) as launcher:
        out, err = launcher.communicate(timeout=TIMEOUT)
    ours = [line for line in err.decode().splitlines() if line.startswith("train.py: ")]
    assert launcher.returncode != 0 and out == b""
    assert len(ours) in (1, 2)  # when one has ended, torchrun ends the other, which may not have come to its line
    assert all(line.startswith("train.py: error: the processes can't meet: ") for line in ours)
    # torchrun adds a traceback of its own
    assert f'File "{HERE}/train.py' not in err.decode() and not list(tmp_path.iterdir())


def test_a_run_that_torchrun_starts_again_goes_on_from_its_own_checkpoint_alone(trained, tmp_path):
    line = f"train.py {SMALL} --epochs 2 --eval-freq 1"

    def send(text):
        if "(Step 000007)" in text:
            signal.raise_signal(signal.SIGINT)
    first = run(tmp_path, line, out=Listener(send), TORCHELASTIC_RESTART_COUNT="0")
    rest = run(tmp_path, line, TORCHELASTIC_RESTART_COUNT="1")
    assert rest.status == 0 and first.out + rest.out == (trained / "log.txt").read_text(encoding="utf-8")
    line = "train.py --weights model.pth --checkpoint new.pth --train-ratio 0.01 --epochs 1"
    new = run(tmp_path, line, TORCHELASTIC_RESTART_COUNT="1")  # it had not come to saving anything
    assert new.status == 0 and new.out.startswith("Ep 1 (Step 000000)")
    again = run(tmp_path, line, TORCHELASTIC_RESTART_COUNT="2")
    assert again.status == 0 and again.out == "" and "all 1 epochs are done" in again.err
    (tmp_path / "other.pth").write_bytes((trained / "model.pth").read_bytes())  # of a run that torchrun did not start
    other = run(tmp_path, f"train.py {SMALL} --checkpoint other.pth", TORCHELASTIC_RESTART_COUNT="1")
    assert other.status == 2 and "other.pth is there" in other.err and steps(tmp_path / "other.pth") == 12


def test_a_rank_without_other_processes_is_of_no_account(trained, tmp_path):
    result = run(tmp_path, f"train.py {SMALL} --epochs 2 --eval-freq 1", RANK="1")
    assert result.status == 0 and result.out == (trained / "log.txt").read_text(encoding="utf-8")


# The pages

README, EXERCISES = HERE / "README.md", HERE / "docs" / "exercises.md"


@pytest.mark.parametrize("page", [README, EXERCISES], ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_print_what_it_says(tmp_path, monkeypatch, capsys, page):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5 or page == README
    for code, printed in blocks:
        exec(code, names)
        assert capsys.readouterr().out == printed, code
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in tmp_path.glob("*.png"))


def test_the_command_lines_of_the_pages_are_understood():
    pages = [page.read_text(encoding="utf-8") for page in (README, EXERCISES) if page.exists()]
    pattern = r"\b((?:python|torchrun)\b[^`\n]*?) (train|sample)\.py\b([^`#\n]*)"
    lines = re.findall(pattern, "".join(pages).replace("\\\n", ""))
    assert len(lines) > 9
    for launcher, script, arguments in lines:
        arguments = re.split(r"\s\d?[>|&]", arguments)[0]
        typed = vars({"train": train, "sample": sample}[script].build_parser().parse_args(shlex.split(arguments)))
        if script == "sample":
            assert launcher == "python" and sample.SampleOptions(**typed)
        else:
            files = {each.name: typed.pop(each.name) for each in fields(train.Files) if each.name in typed}
            assert train.Files(**files) and train.choose(typed, None, None)


# Mistakes: a command line, and words of the one line that it costs

RESUME = "train.py --resume --checkpoint run.pth"
MISTAKES = [
    ("train.py --data absent.txt", "absent.txt: No such file"),
    ("train.py --data empty.txt", "empty.txt is empty"),
    ("train.py --data latin1.txt", "latin1.txt is not UTF-8", "byte 2", "iconv -f latin1 -t utf-8 latin1.txt"),
    ("train.py --data binary.bin", "binary.bin is not"),
    ("train.py --data zeros.txt", "zeros.txt is not text"),
    ("train.py --data .", "Is a directory"),
    ("train.py --data ''", "--data"),
    ("train.py --data", "--data"),
    ("train.py --data short.txt", "too short", "training part"),
    ("train.py --batch-size 5000", "too short", "5000 or more"),
    ("train.py --train-ratio 0.999", "too short", "validation part"),
    ("train.py --context-length 100000", "too short", "--context-length"),
    ("train.py --epochs -1", "--epochs", "-1"),
    ("train.py --epochs 1.5", "--epochs", "1.5"),
    ("train.py --epochs nan", "--epochs"),
    ("train.py --batch-size 0", "--batch-size"),
    ("train.py --batch-size -2", "--batch-size"),
    ("train.py --batch-size x", "--batch-size", "'x'"),
    ("train.py --lr 0", "--lr", "above 0"),
    ("train.py --lr -1", "--lr"),
    ("train.py --lr nan", "--lr"),
    ("train.py --lr inf", "--lr"),
    ("train.py --lr fast", "--lr", "fast"),
    ("train.py --weight-decay -0.1", "--weight-decay"),
    ("train.py --weight-decay nan", "--weight-decay"),
    ("train.py --warmup-steps -1", "--warmup-steps"),
    ("train.py --initial-lr -1", "--initial-lr"),
    ("train.py --min-lr -1", "--min-lr"),
    ("train.py --min-lr nan", "--min-lr"),
    ("train.py --max-norm 0", "--max-norm", "above 0"),
    ("train.py --eval-freq 0", "--eval-freq"),
    ("train.py --eval-iter 0", "--eval-iter"),
    ("train.py --eval-iter -1", "--eval-iter"),
    (f"train.py --eval-iter {'9' * 20}", "--eval-iter"),
    ("train.py --save-every -1", "--save-every"),
    ("train.py --seed -1", "--seed"),
    ("train.py --seed abc", "--seed"),
    ("train.py --train-ratio 0", "--train-ratio"),
    ("train.py --train-ratio 1", "--train-ratio"),
    ("train.py --train-ratio nan", "--train-ratio"),
    ("train.py --context-length 0", "--context-length"),
    ("train.py --start-context ''", "--start-context"),
    ("train.py --dtype float16", "--dtype", "float16", "bfloat16"),
    ("train.py --drop-rate 1", "--drop-rate"),
    ("train.py --drop-rate -0.1", "--drop-rate"),
    ("train.py --drop-rate nan", "--drop-rate"),
    ("train.py --n-layers 0", "--n-layers"),
    ("train.py --emb-dim 0", "--emb-dim"),
    (f"train.py --emb-dim {'9' * 20}", "--emb-dim"),
    ("train.py --n-heads -3", "--n-heads"),
    ("train.py --n-heads 5", "emb_dim 4 must be a multiple of n_heads 5"),
    ("train.py --emb-dim 10 --n-heads 3", "emb_dim 10 must be a multiple of n_heads 3"),
    ("train.py --n-layers 1.5", "--n-layers"),
    ("train.py --qkv-bias yes", "yes"),
    ("train.py --vocab-size 100", "--vocab-size"),
    ("train.py --frobnicate", "--frobnicate"),
    ("train.py book.txt", "book.txt"),
    ("train.py --model x", "--model"),  # no abbreviation of --models-dir
    ("train.py --epoch 3", "--epoch"),
    ("train.py --device abacus", "no device 'abacus'", "cpu"),
    ("train.py --device cuda:x", "no device 'cuda:x'"),
    ("train.py --device ''", "--device"),
    ("train.py --weights openai --size 1B", "124M, 355M"),
    ("train.py --weights openai --resume", "--resume", "--weights"),
    ("train.py --weights run.pth --resume", "--resume", "--weights"),
    ("train.py --weights absent.pth", "absent.pth"),
    ("train.py --weights folder", "folder", "model.safetensors"),
    ("train.py --weights ''", "--weights"),
    ("train.py --weights run.pth --n-heads 4", "--n-heads 4 contradicts", "2 there"),
    ("train.py --weights run.pth --emb-dim 16", "--emb-dim 16 contradicts run.pth: 4"),
    ("train.py --weights run.pth --context-length 32", "--context-length 32 is more than run.pth can see: 8"),
    ("train.py --resume", "there is no model.pth: `python train.py --checkpoint model.pth` makes it"),
    ("train.py --resume --checkpoint binary.bin", "binary.bin is not a checkpoint"),
    ("train.py --resume --checkpoint folder", "folder"),
    (f"{RESUME} --emb-dim 16", "--emb-dim 16 contradicts run.pth: 4"),
    (f"{RESUME} --n-layers 2", "--n-layers 2 contradicts run.pth: 1"),
    (f"{RESUME} --n-heads 4", "--n-heads 4 contradicts", "2 there"),
    (f"{RESUME} --qkv-bias", "--qkv-bias True contradicts run.pth: False"),
    (f"{RESUME} --seed 4", "--seed 4 contradicts run.pth: 123"),
    (f"{RESUME} --train-ratio 0.5", "--train-ratio 0.5 contradicts run.pth: 0.04"),
    (f"{RESUME} --context-length 16", "--context-length 16 contradicts run.pth: 8"),
    (f"{RESUME} --context-length 4", "--context-length 4 contradicts run.pth: 8"),
    (f"{RESUME} --batch-size 3 --epochs 9", "--batch-size 3 contradicts run.pth: 4"),
    (f"{RESUME} --data other.txt --epochs 9", "run.pth: it was made with other data than other.txt"),
    (f"{RESUME} --best gone.pth --epochs 9", "gone.pth is there"),
    (f"{RESUME} --data absent.txt", "absent.txt: No such file"),
    ("train.py --resume --checkpoint gone.pth", "gone.txt, which gone.pth was trained on, is not here: use --data"),
    ("train.py --resume --checkpoint never.pth", "never.pth: --eval-freq"),
    ("train.py --resume --checkpoint fast.pth", "fast.pth: --lr", "'fast'"),
    ("train.py --resume --checkpoint unknown.pth", "unknown.pth: ", "'momentum'"),
    ("train.py --resume --checkpoint list.pth", "list.pth"),
    ("train.py --resume --checkpoint ratio.pth", "ratio.pth: --train-ratio"),
    ("train.py --resume --checkpoint order.pth", "order.pth: the state of the run in it is damaged"),
    ("train.py --resume --checkpoint generator.pth", "generator.pth: the state of the run in it is damaged"),
    ("train.py --resume --checkpoint evaluations.pth", "evaluations.pth: the state of the run in it is damaged"),
    ("train.py --resume --checkpoint hash.pth", "hash.pth"),
    ("train.py --resume --checkpoint moments.pth --epochs 3", "moments.pth: the state of the run in it is damaged"),
    ("train.py --resume --checkpoint cut.pth", "cut.pth is not a checkpoint, or it is damaged"),
    ("train.py --checkpoint run.pth", "run.pth is there: --resume goes on with it, --overwrite replaces it"),
    ("train.py --best run.pth", "run.pth is there", "another name"),
    ("train.py --checkpoint absent/model.pth", "absent/model.pth can't be written: there is no folder absent"),
    ("train.py --best absent/best.pth", "absent/best.pth can't be written: there is no folder /", "/absent\n"),
    ("train.py --plot absent/loss.png", "absent/loss.png can't be written: there is no folder absent"),
    ("train.py --checkpoint empty.txt/model.pth", "empty.txt/model.pth can't be written"),
    ("train.py --checkpoint absent/m.pth/", "absent/m.pth can't be written"),
    ("train.py --checkpoint folder", "folder is there and is no checkpoint"),
    ("train.py --checkpoint folder/ --overwrite", "folder is there and is no checkpoint"),
    ("train.py --checkpoint latin1.txt --overwrite", "latin1.txt is there and is no checkpoint"),
    ("train.py --checkpoint ''", "is no checkpoint"),
    ("train.py --plot loss.txt", "--plot", "loss.txt", ".png, .pdf or .svg"),
    ("train.py --plot .png", "--plot", "'.png'", ".png, .pdf or .svg"),
    ("train.py --plot x.png --checkpoint x.png", "different files"),
    ("train.py --best x.pth --checkpoint ./x.pth", "different files"),
    ("train.py --data story.txt --checkpoint story.txt --overwrite", "different files"),
    ("sample.py", "there is no model.pth: `python train.py --checkpoint model.pth` makes it"),
    ("sample.py --weights absent.safetensors", "there is no absent.safetensors\n"),
    ("sample.py --prompt ''", "--prompt"),
    ("sample.py --top-k 0", "--top-k"),
    ("sample.py --top-k -1", "--top-k"),
    ("sample.py --top-k x", "--top-k"),
    ("sample.py --temperature -1", "--temperature"),
    ("sample.py --temperature nan", "--temperature"),
    ("sample.py --temperature inf", "--temperature"),
    ("sample.py --max-new-tokens -1", "--max-new-tokens"),
    ("sample.py --max-new-tokens many", "many"),
    ("sample.py --num-samples 0", "--num-samples"),
    ("sample.py --seed 1.5", "--seed"),
    ("sample.py --seed -1", "--seed"),
    ("sample.py --dtype int8", "--dtype"),
    ("sample.py --device tpu", "no device 'tpu'"),
    ("sample.py --device cpu:x", "no device 'cpu:x'"),
    ("sample.py --max 3", "--max"),
    ("sample.py --weights run.pth --n-heads 4", "--n-heads 4 contradicts", "2 there"),
    ("sample.py --weights absent.pth", "there is no absent.pth", "python train.py --checkpoint absent.pth"),
    ("sample.py --weights binary.bin", "binary.bin is not a checkpoint"),
    ("sample.py --weights empty.txt", "empty.txt is not a checkpoint"),
    ("sample.py --weights cut.pth", "cut.pth is not a checkpoint, or it is damaged"),
    ("sample.py --weights folder", "folder", "model.safetensors"),
    ("sample.py --weights small-vocabulary.pth", "50257"),
    ("sample.py --weights openai --size 124m", "124M, 355M, 774M, 1558M"),
    ("sample.py --weights openai --base-url ftp://x --models-dir ../models", "ftp://x/124M/hparams.json"),
]
if hasattr(os, "mkfifo"):
    MISTAKES.append(("train.py --checkpoint pipe --overwrite", "pipe is there and is no checkpoint"))
    MISTAKES.append(("train.py --plot pipe.png", "pipe.png is there and is no picture"))
if not torch.cuda.is_available():
    MISTAKES.append(("train.py --device cuda", "no device 'cuda'"))
    MISTAKES.append(("sample.py --device cuda:1", "no device 'cuda:1'"))


@pytest.fixture(scope="module")
def litter(trained, tmp_path_factory):
    """The files that the mistakes are made with; no test changes them."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "folder").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
        os.mkfifo(folder / "pipe.png")
    whole = (trained / "model.pth").read_bytes()
    contents = {"empty.txt": b" \n", "latin1.txt": "naïve".encode("latin-1"), "binary.bin": bytes(range(256)),
                "zeros.txt": b"a\0b", "short.txt": b"Too short. " * 9, "other.txt": b"Another text. " * 900,
                "story.txt": STORY.read_bytes(), "run.pth": whole, "cut.pth": whole[:-1000]}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    content = torch.load(trained / "model.pth", weights_only=True)
    saved, settings = content["run"], content["run"]["settings"]
    damage = {"gone": dict(settings=settings | {"data": ("gone.txt",)}),
              "never": dict(settings=settings | {"eval_freq": 0}),
              "fast": dict(settings=settings | {"lr": "fast"}),
              "unknown": dict(settings=settings | {"momentum": 0.9}),
              "list": dict(settings=[1, 2]),
              "ratio": dict(settings=settings | {"train_ratio": math.nan}),
              "order": dict(order=saved["order"] + 60),
              "generator": dict(generator_state=torch.zeros(3)),
              "evaluations": dict(evaluations=[("a", "b")]),
              "hash": dict(text_hash=torch.zeros(3))}
    for name, values in damage.items():
        torch.save(content | {"run": saved | values}, folder / f"{name}.pth")
    del content["optimizer_state_dict"]
    torch.save(content, folder / "moments.pth")
    tiny = Config(100, 64, 8, 2, 1, 0.1, False)
    save_checkpoint(folder / "small-vocabulary.pth", Checkpoint(init_params(tiny, seeded()), tiny))
    return folder


def fingerprint(folder):
    """What changes when a file is written to or replaced, and, in a folder, when one comes or goes."""
    return {path: (stat.st_mode, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            for path in (folder, *folder.rglob("*")) for stat in (path.lstat(),)}


@pytest.mark.parametrize("line, words", [pytest.param(line, words, id=line) for line, *words in MISTAKES])
def test_a_mistake_costs_one_line_and_changes_nothing(litter, line, words):
    before = fingerprint(litter)
    # What is typed later counts. A new run that is not refused, as it should be, is at least a small one.
    status, out, err = run(litter, line if "--resume" in line else line.replace("train.py", f"train.py {SMALL}"))
    assert status == 2 and out == ""
    assert len(err.splitlines()) == 1 and err.startswith(f"{line.split()[0]}: error: ")
    assert all(word in err for word in words), err
    assert fingerprint(litter) == before


# What a file may hold in place of what belongs there.
junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just({}), st.just([1, 2]),
    st.builds(torch.zeros, st.integers(0, 3)), st.just(torch.ones(2, 2, dtype=torch.int64)))
SETTINGS = [each.name for each in fields(train.Settings)]


@given(st.dictionaries(st.sampled_from([*SETTINGS, "momentum"]), junk))
def test_the_settings_in_a_file_are_taken_if_they_make_sense_and_refused_else(saved):
    loaded = Checkpoint({}, CONFIG, None, {"settings": saved})
    try:
        settings, _ = train.choose({}, loaded, "model.pth")
    except ValueError as error:
        assert str(error).startswith("model.pth")
    else:
        assert all(same(getattr(settings, name), value) for name, value in saved.items())
