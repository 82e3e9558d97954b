"""Both command lines as a user meets them: what they print, where they stop, what they refuse."""
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from weights import load_checkpoint, save_checkpoint

HERE = Path(__file__).parent
LONG = os.environ.get("LONG_TESTS")
DATA = ["--data", str(HERE / "the-verdict.txt")]
MODEL = ["--n-layers", "1", "--emb-dim", "8", "--n-heads", "2", "--context-length", "16"]
SMALL = [*DATA, *MODEL, "--train-ratio", "0.2", "--batch-size", "10", "--eval-iter", "1"]  # 6 steps an epoch


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command line in a folder of its own and in this process: its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "tune_allocator", lambda: None)  # it is for good, and the other tests share the process
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            sample.run_command({"train.py": train.main, "sample.py": sample.main}[script])
        return ended.value.code, *capsys.readouterr()
    yield run
    for each, handler in handlers.items():
        signal.signal(each, handler)


@pytest.fixture
def stop_after(monkeypatch):
    """Makes training receive a signal during its k-th step."""
    def arrange(k, signum=signal.SIGINT):
        steps, caught, step = [], [], train.train_step

        def counted(*arguments, **options):
            steps.append(1)
            if len(steps) == k:
                caught.append(signum)
            return step(*arguments, **options)
        monkeypatch.setattr(train, "train_step", counted)
        monkeypatch.setattr(train, "catch_signals", lambda: caught)
    return arrange


# Training, resuming, sampling

def state(path):
    """All that the rest of a run depends on, flat."""
    params, config, opt_state, run = load_checkpoint(path)
    moments = {f"{key}.{name}": tensor for name, state in opt_state.items() for key, tensor in state.items()}
    tensors = {key: run["progress"].pop(key) for key in ("generator_state", "order")}
    return {**params, **moments, **tensors}, config, run["progress"]


@pytest.mark.parametrize("k", [1, 3, 5, 6, 7, 11])
def test_a_stopped_and_resumed_run_is_bitwise_the_run_straight_through(command, stop_after, monkeypatch, k):
    options = [*SMALL, "--epochs", "2", "--eval-freq", "4"]
    status, straight, _ = command("train.py", *options, "--checkpoint", "straight.pth")
    assert status == 0
    with monkeypatch.context():
        stop_after(k)
        status, first, errors = command("train.py", *options)
    assert status == 130 and "python train.py --resume --checkpoint model.pth" in errors
    assert load_checkpoint("model.pth").run["progress"]["step"] == k
    monkeypatch.setattr(train, "catch_signals", list)
    status, rest, _ = command("train.py", "--resume")
    assert status == 0 and first + rest == straight
    (one, *others), (two, *same) = state("straight.pth"), state("model.pth")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one) and others == same


def test_epochs_are_the_total_also_with_resume(command):
    _, whole, _ = command("train.py", *SMALL, "--epochs", "3", "--checkpoint", "whole.pth")
    _, first, _ = command("train.py", *SMALL, "--epochs", "1")
    status, rest, _ = command("train.py", "--resume", "--epochs", "3")
    assert status == 0 and first + rest == whole
    picture = Path("loss.png").read_bytes()
    Path("loss.png").unlink()
    status, nothing, errors = command("train.py", "--resume")
    assert (status, nothing) == (0, "") and "--epochs" in errors
    assert Path("loss.png").read_bytes() == picture  # it is drawn again


def test_sigterm_exits_143(command, stop_after):
    stop_after(2, signal.SIGTERM)
    assert command("train.py", *SMALL)[0] == 143


def test_saving_along_the_way_saves_every_so_many_steps(command, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "save_checkpoint", lambda *_, progress, **__: saved.append(progress["step"]))
    command("train.py", *SMALL, "--epochs", "2", "--save-every", "5")
    assert saved == [5, 10, 12]


def test_the_log_is_on_standard_output_and_the_bar_on_standard_error(command):
    status, output, errors = command("train.py", *SMALL, "--epochs", "1")
    lines = output.splitlines()
    assert status == 0 and len(lines) == 3
    pattern = r"Ep 1 \(Step 00000[05]\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}"
    assert all(re.fullmatch(pattern, line) for line in lines[:2])
    assert lines[2].startswith("Every effort moves you")
    assert "tokens/s" in errors and "Ep 1" not in errors
    assert sorted(path.name for path in Path().iterdir()) == ["loss.png", "model.pth"]
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")
    evaluations = load_checkpoint("model.pth").run["progress"]["evaluations"]
    assert [tokens for tokens, *_ in evaluations] == [10 * 16, 6 * 10 * 16]


def test_the_losses_are_drawn_against_epochs_and_tokens_seen(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    train.plot_losses([(512, 9.8, 9.9), (9216, 8.1, 8.3)], 4608, tmp_path / "loss.png")
    axes = drawn[0].axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[512 / 4608, 9.8], [2, 8.1]], [[512 / 4608, 9.9], [2, 8.3]]]
    drawn[0].draw_without_rendering()
    assert axes.child_axes[0].get_xlim() == pytest.approx([4608 * x for x in axes.get_xlim()])


def test_no_epochs_print_the_losses_and_write_nothing(command):
    status, output, _ = command("train.py", *SMALL, "--epochs", "0")
    assert status == 0 and re.fullmatch(r"Training loss \d+\.\d{5}, validation loss \d+\.\d{5}\n", output)
    assert not list(Path().iterdir())


def test_a_disk_too_small_for_the_checkpoint_is_noticed_at_the_start(command, monkeypatch):
    needed = 12 * sum(map(torch.numel, train.init_params(train.Config(50257, 16, 8, 2, 1, 0.1, False),
                                                         torch.Generator()).values()))
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, needed))
    assert command("train.py", *SMALL, "--epochs", "1")[0] == 0
    status, output, errors = command("train.py", *SMALL, "--epochs", "1", "--save-every", "1")  # two files at a time
    assert status == 2 and not output and "the disk has 0.0 GB left" in errors


def test_a_console_without_unicode_is_no_failure(command, monkeypatch):
    command("train.py", *SMALL, "--epochs", "1")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "naïve 你"])
    with pytest.raises(SystemExit) as ended:
        sample.run_command(sample.main)
    sys.stdout.seek(0)
    assert not ended.value.code and sys.stdout.read().startswith("naïve ?")


def test_a_fresh_run_keeps_the_checkpoint_that_it_finds(command):
    command("train.py", *SMALL, "--epochs", "1")
    found = Path("model.pth").read_bytes()
    status, _, errors = command("train.py", *SMALL, "--epochs", "1", "--seed", "1")
    assert status == 0 and "model.pth is there: it is kept as model.pth.old" in errors
    assert Path("model.pth.old").read_bytes() == found != Path("model.pth").read_bytes()


def test_a_converted_file_of_openais_is_kept_too(command):
    config = train.Config(50257, 16, 8, 2, 1, 0.0, True)
    save_checkpoint("converted.pth", train.init_params(config, torch.Generator()), config, source=[[1, 2]])
    found = Path("converted.pth").read_bytes()
    assert command("train.py", *DATA, "--resume", "--checkpoint", "converted.pth", "--epochs", "1", "--batch-size", "9",
                   "--eval-iter", "1")[0] == 0
    assert Path("converted.pth.old").read_bytes() == found


def test_a_run_goes_on_with_its_own_text_alone(command):
    story = Path(DATA[1]).read_text(encoding="utf-8")
    Path("a.txt").write_text(story, encoding="utf-8")
    Path("b.txt").write_text(story.replace("Jack", "John"), encoding="utf-8")  # as many tokens
    command("train.py", *SMALL, "--data", "a.txt", "--epochs", "1")
    status, _, errors = command("train.py", "--resume", "--data", "b.txt", "--epochs", "2")
    assert status == 2 and "model.pth was made with other data than b.txt" in errors
    assert command("train.py", "--resume", "--epochs", "2")[0] == 0


def test_sampling_needs_nothing_but_the_checkpoint(command):
    command("train.py", *SMALL, "--epochs", "1")
    status, output, errors = command("sample.py", "--prompt", "Hello <|endoftext|> 你", "--max-new-tokens", "70",
                                     "--temperature", "1", "--top-k", "5")
    assert status == 0 and output.startswith("Hello <|endoftext|> 你") and output.endswith("\n")
    assert re.fullmatch(r"\d+ tokens in \d+\.\d\d s, \d+\.\d tokens/s\n", errors)
    again = command("sample.py", "--prompt", "Hello <|endoftext|> 你", "--max-new-tokens", "70", "--temperature", "1",
                    "--top-k", "5")
    assert again[1] == output
    assert command("sample.py", "--dtype", "bfloat16")[0] == 0


def test_a_plain_state_dict_is_sampled_and_resumed(command):
    command("train.py", *SMALL, "--epochs", "1")
    torch.save(load_checkpoint("model.pth").params, "plain.pth")
    assert command("sample.py", "--weights", "plain.pth", "--n-heads", "2")[1] == command("sample.py")[1]
    status, output, _ = command("train.py", *DATA, "--resume", "--checkpoint", "plain.pth", "--n-heads", "2",
                                "--batch-size", "10", "--epochs", "1", "--eval-iter", "1")
    assert status == 0 and output.startswith("Ep 1 (Step 000000)")
    assert torch.load("plain.pth.old", weights_only=True).keys() == load_checkpoint("plain.pth").params.keys()


def test_several_files_are_one_text_with_end_of_text_between(tmp_path):
    (tmp_path / "a").write_text("one", encoding="utf-8")
    (tmp_path / "b").write_text("zwö\r\n", encoding="utf-8")
    assert train.read_text([tmp_path / "a", tmp_path / "b"]) == "one<|endoftext|>zwö\n"


# Signals and processes

def start(*arguments, cwd):
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), *SMALL, "--epochs", "2000", "--eval-freq", "1",
                             *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, signum, status):
    with start(cwd=tmp_path) as process:
        assert process.stdout.readline().startswith("Ep 1")
        process.send_signal(signum)
        _, errors = process.communicate()
    assert process.returncode == status and "Traceback" not in errors
    assert "--resume --checkpoint model.pth` goes on" in errors
    assert load_checkpoint(tmp_path / "model.pth").run["progress"]["step"] >= 1


def test_a_second_signal_ends_at_once(tmp_path):
    with start(cwd=tmp_path) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode in (130, 143, -signal.SIGTERM)


def test_after_the_first_signal_the_second_is_the_systems_own(command):
    caught = train.catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_output_into_a_closed_pipe_is_no_traceback(tmp_path):
    params = train.init_params(train.Config(50257, 8, 8, 1, 1, 0.0, False), torch.Generator())
    save_checkpoint(tmp_path / "model.pth", params, train.Config(50257, 8, 8, 1, 1, 0.0, False))
    with subprocess.Popen([sys.executable, str(HERE / "sample.py"), "--max-new-tokens", "300"], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("closed", ["a pipe", "a pipe for both", "from the start"])
def test_training_whose_log_none_can_read_any_more_saves_its_work(tmp_path, closed):
    piped = closed != "from the start"
    arguments = [sys.executable, str(HERE / "train.py"), *SMALL, "--epochs", "200" if piped else "1"]
    errors = ""
    if closed == "a pipe for both":
        with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            process.stdout.readline()
            process.stdout.close()
        assert process.returncode == 141
    elif piped:
        with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            errors = process.stderr.read().decode()
        assert process.returncode == 141 and "--resume --checkpoint model.pth` goes on" in errors
    else:
        done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *arguments], cwd=tmp_path, capture_output=True)
        errors = done.stderr.decode()
        assert done.returncode == 0
    assert "Traceback" not in errors and load_checkpoint(tmp_path / "model.pth").run["progress"]["step"] >= 1


# The README

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readmes_python_blocks_print_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "the-verdict.txt").symlink_to(HERE / "the-verdict.txt")
    names = {}
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)
    assert len(blocks) == 7
    for code, printed in blocks:
        exec(code, names)
        assert capsys.readouterr().out == printed, code
    assert (tmp_path / "temperatures.png").read_bytes().startswith(b"\x89PNG")


def test_the_readmes_command_lines_are_understood():
    lines = re.findall(r"python (train|sample)\.py ?([^`#\n]*)", README.replace("\\\n", ""))
    assert len(lines) > 9
    for script, arguments in lines:
        parser = {"train": train.build_parser, "sample": sample.build_parser}[script]()
        parser.parse_args(shlex.split(arguments))


# Many processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "train.py")]
WITHOUT_DROPOUT = [*SMALL, "--epochs", "4", "--eval-freq", "1", "--drop-rate", "0"]  # 24 steps


def test_two_processes_train_as_one_does(command, tmp_path):
    status, one, _ = command("train.py", *WITHOUT_DROPOUT, "--checkpoint", "one.pth")
    two = subprocess.run([*TORCHRUN, *WITHOUT_DROPOUT], cwd=tmp_path, capture_output=True, text=True)
    assert status == two.returncode == 0 and two.stdout == one
    (one, _, progress_of_one), (two, _, progress_of_two) = state("one.pth"), state("model.pth")
    assert len(progress_of_one["evaluations"]) == 24
    for ours, theirs in zip(progress_of_one["evaluations"], progress_of_two["evaluations"], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-6)
    params, _ = load_checkpoint("one.pth")[:2]
    assert max((one[name] - two[name]).abs().max() for name in params) < 1e-6


def test_each_process_and_step_has_masks_of_its_own():
    def first_draw(step, rank, seed=1):
        generator = train.dropout_generator(
            torch.Generator().manual_seed(seed), step, torch.device("cpu"), rank)
        return torch.rand((), generator=generator).item()
    draws = [first_draw(step, rank, seed) for step in range(20) for rank in (1, 2, 3) for seed in (1, 2)]
    assert len({*draws, first_draw(0, rank=0)}) == len(draws) + 1  # rank 0 goes on with the run's own stream
    assert draws[0] == first_draw(0, 1)


@pytest.mark.skipif(not LONG, reason="takes 20 s: set LONG_TESTS=1")
def test_a_run_of_two_processes_is_bitwise_repeatable(tmp_path):
    for name in ("a.pth", "b.pth"):
        subprocess.run([*TORCHRUN, *SMALL, "--epochs", "2", "--checkpoint", name], cwd=tmp_path, check=True)
    (one, *others), (two, *same) = state(tmp_path / "a.pth"), state(tmp_path / "b.pth")
    assert all(torch.equal(one[name], two[name]) for name in one) and others == same


@pytest.mark.parametrize("rank", [1] if not LONG else [0, 1])
def test_a_killed_process_ends_the_others_and_one_process_goes_on(command, tmp_path, rank):
    options = [*SMALL, "--epochs", "2000", "--eval-freq", "1", "--save-every", "1"]
    with subprocess.Popen([*TORCHRUN, *options], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as launcher:
        [launcher.stdout.readline() for _ in range(3)]
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(next(int(child) for child in children
                     if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text()), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "train.py: error: another process has ended: --resume goes on from the last save" in errors
    steps = load_checkpoint("model.pth").run["progress"]["step"]
    assert steps >= 1
    status, output, _ = command("train.py", "--resume", "--epochs", str(steps // 6 + 1))
    assert status == 0 and output.startswith(f"Ep {steps // 6 + 1} (Step {steps:06d})")


def test_a_rank_without_other_processes_is_of_no_account(command, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert command("train.py", *SMALL, "--epochs", "1")[0] == 0


def test_a_batch_that_cannot_be_split_is_refused(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: None)
    status, _, errors = command("train.py", *SMALL)
    assert status == 2 and "--batch-size 10 can't be split evenly over 3 processes" in errors


def test_processes_that_have_not_the_same_file_and_text_are_refused(command, monkeypatch):
    monkeypatch.setattr(train, "reduce", lambda tensors, _: [tensor + 1 for tensor in tensors])  # another had more
    status, _, errors = command("train.py", *SMALL)
    assert status == 2 and "do not have the same checkpoint and data" in errors


# Mistakes: arguments, and words of the one line that they cost

TRAIN_MISTAKES = [
    (["--data", "absent.txt"], "absent.txt: No such file"),
    (["--data", "empty.txt"], "empty.txt is empty"),
    (["--data", "latin1.txt"], "latin1.txt is not UTF-8"),
    (["--data", "binary.bin"], "binary.bin is not"),
    (["--data", "zeros.txt"], "zeros.txt is not text"),
    (["--data", "."], "Is a directory"),
    (["--data", "short.txt"], "too short", "training part"),
    ([*DATA, "--batch-size", "5000"], "too short", "5000 or more"),
    ([*DATA, "--train-ratio", "0.999"], "too short", "validation part"),
    ([*DATA, "--context-length", "100000"], "too short"),
    (["--epochs", "-1"], "--epochs", "-1"), (["--epochs", "1.5"], "--epochs", "1.5"),
    (["--epochs", "nan"], "--epochs"),
    (["--batch-size", "0"], "--batch-size"), (["--batch-size", "-2"], "--batch-size"), (["--batch-size", "x"], "x"),
    (["--lr", "0"], "--lr", "above 0"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"),
    (["--lr", "fast"], "--lr", "fast"), (["--weight-decay", "-0.1"], "--weight-decay"),
    (["--weight-decay", "nan"], "--weight-decay"), (["--eval-freq", "0"], "--eval-freq"),
    (["--eval-iter", "0"], "--eval-iter"), (["--eval-iter", "-1"], "--eval-iter"),
    (["--save-every", "-1"], "--save-every"),
    (["--seed", "-1"], "--seed"), (["--seed", "abc"], "--seed"), (["--train-ratio", "0"], "--train-ratio"),
    (["--train-ratio", "1"], "--train-ratio"), (["--train-ratio", "nan"], "--train-ratio"),
    (["--drop-rate", "1"], "--drop-rate"), (["--drop-rate", "-0.1"], "--drop-rate"),
    (["--drop-rate", "nan"], "--drop-rate"),
    (["--n-layers", "0"], "--n-layers"), (["--emb-dim", "0"], "--emb-dim"), (["--n-heads", "-3"], "--n-heads"),
    ([*DATA, "--emb-dim", "10", "--n-heads", "3"], "emb_dim 10"), (["--context-length", "0"], "--context-length"),
    (["--eval-iter", "9" * 20], "--eval-iter"), (["--emb-dim", "9" * 20], "--emb-dim"),
    (["--resume", "--checkpoint", "crafted.pth"], "--eval-freq"),
    ([*DATA, "--vocab-size", "100"], "--vocab-size", "50257"), ([*DATA, "--start-context", ""], "--start-context"),
    (["--device", "abacus"], "no device 'abacus'", "cpu"), (["--dtype", "float16"], "--dtype", "float16"),
    (["--weights", "model.pth"], "--weights", "openai"),
    ([*DATA, "--weights", "openai", "--size", "1B"], "124M, 355M"),
    (["--weights", "openai", "--resume"], "--resume", "--weights"), (["--frobnicate"], "--frobnicate"),
    (["--resume", "--checkpoint", "absent.pth"], "absent.pth", "python train.py --checkpoint absent.pth"),
    (["--resume", "--checkpoint", "binary.bin"], "binary.bin", "not a checkpoint"),
    (["--resume", "--emb-dim", "16"], "--emb-dim 16 contradicts model.pth: 8"),
    (["--resume", "--n-heads", "4"], "--n-heads 4 contradicts model.pth: 2"),
    (["--resume", "--seed", "4"], "--seed 4 contradicts"),
    (["--resume", "--train-ratio", "0.5"], "--train-ratio 0.5 contradicts"), (["--resume", "--qkv-bias"], "--qkv-bias"),
    (["--resume", "--context-length", "32"], "--context-length 32 contradicts"),
    (["--resume", "--context-length", "8"], "--context-length 8 contradicts"),
    (["--resume", "--batch-size", "3", "--epochs", "9"], "--batch-size 3 contradicts model.pth: 10"),
    (["--resume", "--data", "other.txt", "--epochs", "9"], "made with other data"),
    (["--device", "cuda:x"], "no device 'cuda:x'"),
    ([*SMALL, "--checkpoint", "absent/model.pth"], "absent/model.pth", "No such file"),
    ([*SMALL, "--checkpoint", "empty.txt/model.pth"], "empty.txt/model.pth", "Not a directory"),
    ([*SMALL, "--checkpoint", "folder"], "folder is there and is no checkpoint"),
    ([*SMALL, "--checkpoint", "folder/"], "folder is there and is no checkpoint"),
    ([*SMALL, "--checkpoint", "absent/m.pth/"], "absent/m.pth", "No such file"),
    ([*SMALL, "--checkpoint", "pipe"], "pipe is there and is no checkpoint"),
    ([*SMALL, "--plot", "pipe.png"], "pipe.png is there and is no picture"),
    ([*SMALL, "--checkpoint", "latin1.txt"], "latin1.txt is there and is no checkpoint"),
    ([*SMALL, "--plot", "absent/loss.png"], "absent/loss.png"),
    ([*SMALL, "--plot", "loss.txt"], "loss.txt must end in"),
    ([*SMALL, "--plot", "x.png", "--checkpoint", "x.png"], "different files"),
]
SAMPLE_MISTAKES = [
    (["--prompt", ""], "prompt must have"), (["--top-k", "0"], "--top-k"), (["--top-k", "-1"], "--top-k"),
    (["--top-k", "x"], "--top-k"), (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"),
    (["--temperature", "inf"], "--temperature"), (["--max-new-tokens", "-1"], "--max-new-tokens"),
    (["--max-new-tokens", "many"], "many"), (["--seed", "1.5"], "--seed"), (["--device", "tpu"], "no device 'tpu'"),
    (["--n-heads", "4"], "--n-heads 4 contradicts model.pth: 2"),
    (["--weights", "absent.pth"], "absent.pth", "python train.py --checkpoint absent.pth"),
    (["--weights", "binary.bin"], "not a checkpoint"), (["--weights", "empty.txt"], "not a checkpoint"),
    (["--weights", "folder"], "folder"), (["--weights", "small-vocabulary.pth"], "50257"),
    (["--weights", "openai", "--size", "124m"], "124M, 355M, 774M, 1558M"), (["--dtype", "int8"], "--dtype"),
    (["--weights", "openai", "--base-url", "ftp://x"], "hparams.json"), (["--device", "cpu:x"], "no device 'cpu:x'"),
]
if not torch.cuda.is_available():
    TRAIN_MISTAKES.append((["--device", "cuda"], "no device 'cuda'"))
    SAMPLE_MISTAKES.append((["--device", "cuda:1"], "no device 'cuda:1'"))


@pytest.fixture(scope="module")
def litter(tmp_path_factory):
    """The files that the mistakes are made with; no test changes them."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.png")
    contents = {"empty.txt": b" \n", "latin1.txt": "naïve".encode("latin-1"), "binary.bin": bytes(range(256)),
                "zeros.txt": b"a\0b", "short.txt": b"Too short. " * 9, "other.txt": b"Another text. " * 900}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    config = train.Config(50257, 16, 8, 2, 1, 0.1, False)
    params = train.init_params(config, torch.Generator())
    settings = train.Settings([DATA[1]], train_ratio=0.2, epochs=1, batch_size=10, eval_iter=1, context_length=16)
    progress = train.Progress("a hash", torch.Generator().get_state())
    save_checkpoint(folder / "model.pth", params, config, train.init_optimizer(params), progress=progress._asdict(),
                    settings=settings._asdict())
    save_checkpoint(folder / "crafted.pth", params, config, settings={**settings._asdict(), "eval_freq": 0})
    tiny = train.Config(100, 64, 8, 2, 1, 0.1, False)
    save_checkpoint(folder / "small-vocabulary.pth", train.init_params(tiny, torch.Generator()), tiny)
    return folder


def fingerprint(folder):
    return {path: hashlib.md5(path.read_bytes()).digest() if path.is_file() else path.stat().st_mode
            for path in folder.rglob("*")}


@pytest.mark.parametrize("script, arguments, words", [
    *(("train.py", arguments, words) for arguments, *words in TRAIN_MISTAKES),
    *(("sample.py", arguments, words) for arguments, *words in SAMPLE_MISTAKES)])
def test_a_mistake_costs_one_line_and_changes_nothing(command, litter, monkeypatch, script, arguments, words):
    monkeypatch.chdir(litter)
    monkeypatch.setattr("weights.RETRY_PAUSES", ())
    before = fingerprint(litter)
    models = [] if "--models-dir" in arguments or "openai" not in arguments else ["--models-dir", "folder"]
    status, output, errors = command(script, *arguments, *models)
    assert status == 2 and output == ""
    assert len(errors.splitlines()) == 1 and "error: " in errors and "Traceback" not in errors
    assert all(word in errors for word in words), errors
    (litter / "folder" / "124M").rmdir() if (litter / "folder" / "124M").exists() else None
    assert fingerprint(litter) == before
