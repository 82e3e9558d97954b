"""Both command lines as a user meets them: what they print and write, how a run stops and goes on, what they refuse."""
import io
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import sample
import train
from conftest import (HERE, LONG, SMALL, SMALL_RUN, Listener, assert_refused, command, parrot, same, saved_steps,
                      seeded, start, tie)
from gpt import Config, distinct, init_params
from weights import Checkpoint, SavedRun, load_checkpoint, save_checkpoint

PROMPT = "Every effort moves you"
LOG = (HERE / "docs" / "training-log.txt").read_text(encoding="utf-8")
TRAIN = ("train.py", "--device", "cpu")  # for processes of their own
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ENDLESS = (*TRAIN, *SMALL_RUN.split(), "--epochs", "2000", "--eval-freq", "1")
# A step an epoch, and then a sample that is more than a pipe takes: until someone reads it, the run is held there.
HELD = (*TRAIN, *SMALL_RUN.split(), "--train-ratio", "0.01", "--epochs", "9", "--start-context", "word " * 20000)
OPTIONS = {"train.py": (train.Settings, Config, train.Files), "sample.py": (sample.SampleOptions,)}
PAGES = [HERE / "README.md", HERE / "docs" / "exercises.md"]


def fingerprint(folder):
    """What changes when a file is written to or replaced, and, in a folder, when one comes or goes."""
    stats = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {path: (stat.st_mode, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


# The chapter's log and sentences (sections 5.2 and 5.3)
@LONG
def test_the_log_and_the_sentences_of_the_chapter(tmp_path):
    with start(tmp_path, *TRAIN, timeout=3600) as process:
        assert process.communicate()[0] == LOG
    greedy = 'know," was one of the axioms he laid down across the Sevres and silver of an exquisitely appointed lun'
    assert command(tmp_path, "sample.py").out == f"{PROMPT} {greedy}\n"
    line = "sample.py --max-new-tokens 15 --top-k 25 --temperature 1.4"
    assert command(tmp_path, line).out == f"{PROMPT} stand to work on surprise, a one of us had gone with random-\n"


@LONG
def test_the_log_of_a_run_that_is_stopped_and_then_resumed_by_torchrun(tmp_path):
    with start(tmp_path, *TRAIN, timeout=3600) as process:
        out = "".join(process.stdout.readline() for _ in range(13))  # up to step 40, in the middle of the fifth epoch
        process.terminate()
        out += process.communicate()[0]
    assert process.returncode == -signal.SIGTERM and len(out) < len(LOG) / 2
    with start(tmp_path, *TORCHRUN, "1", *TRAIN, "--resume", timeout=3600) as process:
        assert out + process.communicate()[0] == LOG


def test_the_log_is_on_standard_output_and_the_rest_on_standard_error(tmp_path):
    _, out, err = command(tmp_path, f"train.py {SMALL_RUN} --epochs 1")
    line = r"Ep 1 \(Step 00000%d\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}\n"
    assert re.fullmatch(line % 0 + line % 5 + f"{PROMPT}.*\n", out)
    # The embedding and the head, positions, q, k, v and out_proj with its bias, the feed-forward network, three norms
    count = 2 * 50257 * 4 + 8 * 4 + 4 * 4 * 4 + 4 + 4 * 16 + 16 + 16 * 4 + 4 + 3 * 2 * 4
    assert f"{count:,} parameters" in err and "6 steps" in err and len(err.splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.png", "model.pth"]


# A run is saved and goes on
@pytest.mark.parametrize("line, environment", [
    ("train.py --resume --epochs 2", {}),
    *((f"train.py {SMALL_RUN} --epochs 2 --eval-freq 1", {f"{launcher}_RESTART_COUNT": "1"})  # the same command again
      for launcher in ("TORCHELASTIC", "SLURM"))])
def test_a_run_that_goes_on_is_as_if_it_never_stopped_and_epochs_are_the_total(trained, tmp_path, line, environment):
    first = command(tmp_path, f"train.py {SMALL_RUN} --epochs 1 --eval-freq 1", **environment)  # there is no file yet
    rest = command(tmp_path, line, **environment)
    assert first.out + rest.out == (trained / "log.txt").read_bytes().decode()
    assert same(load_checkpoint(tmp_path / "model.pth"), load_checkpoint(trained / "model.pth"))
    assert command(tmp_path, "train.py --resume")[:2] == (0, "")  # there is nothing left to do
    assert command(tmp_path, f"train.py {SMALL_RUN}", TORCHELASTIC_RESTART_COUNT="0").status == 2  # a first start


def test_no_epochs_print_losses_and_perplexities_and_write_nothing(trained):
    before, line = fingerprint(trained), f"train.py {SMALL_RUN} --epochs 0 --train-ratio 0.5"
    status, out, _ = command(trained, f"{line} --data '{HERE}/docs/training-log.txt'")
    *losses, one, two = map(float, re.findall(r"\d+\.\d+", out))
    assert re.findall("[a-z]+ (?=[0-9])", out) == ["loss ", "loss ", "perplexity ", "perplexity "]
    assert [*map(math.exp, losses)] == pytest.approx([one, two], rel=1e-5)  # the losses' last digit
    assert status == 0 and fingerprint(trained) == before


def test_a_new_run_and_its_best_model_take_the_place_of_others_with_overwrite(trained, tmp_path):
    for name in ("model.pth", "model-best.pth"):
        shutil.copy(trained / "model.pth", tmp_path / name)
    line = f"train.py {SMALL_RUN} --epochs 2 --eval-freq 1 --lr 0.1 --overwrite --keep-best"
    assert command(tmp_path, line).status == 0
    evaluations = load_checkpoint(tmp_path / "model.pth").run.evaluations
    best, _, _ = min(evaluations, key=lambda each: each[2])  # by the validation loss, which grows in the end
    assert 1 < saved_steps(tmp_path / "model-best.pth") == best < saved_steps(tmp_path / "model.pth") == 12


def test_a_new_run_starts_from_another_model_and_leaves_its_file_alone(tmp_path):
    path, params = tmp_path / "other.pth", tie(init_params(SMALL, seeded()))
    save_checkpoint(path, Checkpoint(params, SMALL))
    before, line = fingerprint(path), f"train.py {SMALL_RUN} --context-length 4 --lr 1e-30 --epochs 1"
    _, out, err = command(tmp_path, f"{line} --weights other.pth")
    new = load_checkpoint(tmp_path / "model.pth")
    assert out.startswith("Ep 1 (Step 000000)") and fingerprint(path) == before and new.config == SMALL
    assert new.run.settings["context_length"] == 4
    torch.testing.assert_close(new.params, params)  # such a small learning rate changes nothing
    assert f"{sum(map(torch.numel, distinct(params))):,} parameters" in err  # a tied one counts once


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_loads_the_model_before_the_others(trained, tmp_path, rank):
    path = shutil.copy(trained / "model.pth", tmp_path / ("other.pth", "another.pth")[rank])

    def average(flags):  # here each waits for the others: the first is done with the file, and the second finds it
        os.rename(path, tmp_path / ("another.pth", "other.pth")[rank])
        return flags
    files = train.Files(checkpoint=str(tmp_path / "new.pth"), weights=str(tmp_path / "other.pth"))
    train.prepare({"context_length": 8}, {}, files, torch.device("cpu"), train.Processes(rank, 2, average))
    assert not os.path.exists(path)


def test_a_script_that_is_called_by_a_link_finds_what_lies_beside_it(tmp_path, monkeypatch):
    for script in ("train.py", "sample.py"):
        (tmp_path / script).symlink_to(HERE / script)
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path("train.py")["read_text"](()).startswith("I HAD always thought Jack Gisburn")
    assert runpy.run_path("sample.py")["gpt2_tokenizer"]().n_vocab == 50257


# Signals, pipes, processes
@pytest.mark.parametrize("name, step", [("SIGINT", 0), ("SIGHUP", 6), ("SIGUSR1", 10)])
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(trained, tmp_path, name, step):
    number = getattr(signal, name, signal.SIGINT)
    out = Listener(lambda text: signal.raise_signal(number) if f"(Step {step:06d})" in text else None)
    before = signal.signal(number, signal.default_int_handler)  # so that each ends the command as Ctrl-C does
    first = command(tmp_path, f"train.py {SMALL_RUN} --epochs 2 --eval-freq 1 --checkpoint 'a model.png'", out=out)
    signal.signal(number, before)
    assert first.status == 130 and saved_steps(tmp_path / "a model.png") == step + 1
    _, script, *arguments = shlex.split(first.err.split("`")[1])  # the command that goes on, as it says
    assert (tmp_path / script).samefile(HERE / "train.py")
    rest = command(tmp_path, shlex.join(["train.py", *arguments]))
    assert first.out + rest.out == (trained / "log.txt").read_bytes().decode()


def test_sigterm_ends_a_process_after_its_step(tmp_path):
    with start(tmp_path, *HELD, MPLBACKEND="module://nonexistent") as process:  # a picture needs no screen
        out = process.stdout.readline() + process.stdout.read(1)  # it is in the middle of the run
        process.terminate()
        _, err = process.communicate()
    assert process.returncode == -signal.SIGTERM and saved_steps(tmp_path / "model.pth") == 1
    assert out.startswith("Ep 1 (Step 000000)") and len(err.splitlines()) == 2 and (tmp_path / "model.png").exists()


def test_a_log_that_none_reads_any_more_ends_a_process_which_saves(tmp_path):
    with start(tmp_path, *ENDLESS) as process:
        process.stdout.readline()
        process.stdout.close()
        _, err = process.communicate()
    assert process.returncode == 141 and len(err.splitlines()) == 2 and saved_steps(tmp_path / "model.pth") > 0


def test_two_processes_train_as_one_and_the_first_alone_prints_and_saves(tmp_path):
    line = f"{SMALL_RUN} --epochs 2 --eval-freq 1 --drop-rate 0 --checkpoint"
    out = command(tmp_path, f"train.py {line} one.pth").out
    with start(tmp_path, *TORCHRUN, "2", *TRAIN, *line.split(), "two.pth") as process:
        same_out, err = process.communicate()
    assert process.returncode == 0 and same_out.count("\n") == out.count("\n") and err.count("saved two.pth") == 1
    one, two = (load_checkpoint(tmp_path / name) for name in ("one.pth", "two.pth"))
    for ours, expected in ((two.params, one.params), (two.opt_state, one.opt_state)):  # summed in another order
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@LONG
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says which process is which, on Linux alone")
def test_torchrun_starts_a_run_again_whose_process_was_killed(tmp_path):
    with start(tmp_path, *TORCHRUN, "2", "--max-restarts", "1", *HELD, "--save-every", "1") as process:
        out = process.stdout.readline() + process.stdout.read(1)  # the first process is held now
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        [second] = [pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(int(second), signal.SIGKILL)
        rest, err = process.communicate()
    out += rest
    assert process.returncode == 0 and "error: the processes have lost each other" in err
    assert out.count("(Step 000000)") == out.count("(Step 000005)") == 1 and saved_steps(tmp_path / "model.pth") == 9


@LONG
def test_a_process_that_is_killed_when_it_begins_to_save_leaves_a_whole_file(tmp_path):
    def stamps():
        return [path.stat().st_mtime_ns for path in (tmp_path, tmp_path / "model.pth")]
    with start(tmp_path, *ENDLESS, "--save-every", "1") as process:
        first_lines = [process.stdout.readline() for _ in range(5)]
        before = stamps()
        while stamps() == before and process.poll() is None:
            pass  # until it begins to write
        process.kill()
    assert saved_steps(tmp_path / "model.pth") >= len(first_lines) - 1  # all that is read is checked


# Sampling, from a model whose scores are known
@pytest.fixture(scope="module")
def parrots(tmp_path_factory):
    """A folder with a model that scores " you" 0.5 (0 in bfloat16), " moves" 0.3, " effort" 0.25 and all else -100.

    In end.pth it is <|endoftext|> that scores 0.5.
    """
    folder = tmp_path_factory.mktemp("parrots")
    for name, token in {"model.pth": 345, "end.pth": 50256}.items():
        scores = {token: (256.5, -256), 6100: (0.3, 0), 3626: (0.25, 0)}
        save_checkpoint(folder / name, Checkpoint(parrot(SMALL, scores, others=-100), SMALL))
    return folder


def test_the_prompt_is_printed_and_then_the_tokens(parrots):
    status, out, err = command(parrots, "sample.py --max-new-tokens 3 --prompt 'Hello <|endoftext|> 你'")
    assert (status, out) == (0, "Hello <|endoftext|> 你 you you you\n")
    assert re.fullmatch(r"3 tokens in \d+\.\d\d s, \d+\.\d tokens/s, seed 123\n", err)
    assert command(parrots, "sample.py --max-new-tokens 0").out == f"{PROMPT}\n"
    assert command(parrots, "sample.py --weights end.pth").out == f"{PROMPT}\n"  # the end of the text is not printed
    assert command(parrots, "sample.py --max-new-tokens 1 --dtype bfloat16").out == f"{PROMPT} moves\n"


def test_temperature_and_top_k_are_those_that_were_typed(parrots):
    line = "sample.py --prompt Hello --max-new-tokens 100 --temperature 0.15"
    two, three = command(parrots, f"{line} --top-k 2").out, command(parrots, line).out
    you, moves, effort = (math.exp(score / 0.15) for score in (0.5, 0.3, 0.25))  # abs: four standard deviations
    assert two.count(" you") == pytest.approx(100 * you / (you + moves), abs=16) and " effort" not in two
    assert three.count(" effort") == pytest.approx(100 * effort / (you + moves + effort), abs=13)


def test_several_samples_differ_and_the_seed_gives_them_again(parrots):
    line = "sample.py --num-samples 3 --temperature 1 --max-new-tokens 20"
    status, out, err = command(parrots, line)
    lines = out.splitlines()
    assert status == 0 and len(set(lines)) == len(lines) == 3 and all(each.startswith(PROMPT) for each in lines)
    assert err.startswith("60 tokens in ")
    assert command(parrots, line).out == out and command(parrots, f"{line} --seed 1").out != out


@pytest.mark.parametrize("stdin, status, out", [
    ("\ufeffTwo\r\n lines 你\n".encode(), 0, "Two\n lines 你 you\n"), (b"caf\xe9", 2, ""), (b"", 2, "")])
def test_a_dash_reads_a_prompt_in_utf8_from_standard_input(parrots, stdin, status, out):
    result = command(parrots, "sample.py --prompt - --max-new-tokens 1", stdin=stdin)
    assert result[:2] == (status, out) and len(result.err.splitlines()) == 1


def test_a_console_that_lacks_a_character_is_no_failure(parrots):
    console = io.TextIOWrapper(io.BytesIO(), "ascii", newline="\n")
    assert command(parrots, "sample.py --prompt 'naïve 你' --max-new-tokens 1", out=console).status == 0
    assert console.buffer.getvalue() == b"na?ve ? you\n" and console.line_buffering  # a pipe gets each line at once


def test_streams_that_were_closed_before_the_start_are_no_failure(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    sample.run_command(lambda: print(sys.stdin.read(), file=sys.stderr))
    for file in (sys.stdin, sys.stdout, sys.stderr):
        file.close()


def test_a_warning_is_printed_without_its_place_in_the_code():
    sample.run_command(lambda: None)
    assert warnings.formatwarning("words", UserWarning, "sample.py", 1) == "words\n"


# The pages
@pytest.mark.parametrize("script", OPTIONS)
def test_help_lists_every_option(tmp_path, script):
    out = command(tmp_path, f"{script} --help").out
    assert all(f"--{each.name.replace('_', '-')}" in out for kind in OPTIONS[script] for each in fields(kind))


def test_the_command_lines_of_the_pages_are_understood(monkeypatch):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", "")
    lines = re.findall(r"\b(?:python|torchrun)\b[^`\n]*? ((?:train|sample)\.py\b[^`#\n]*)", text)
    assert len(lines) > 9
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(re.split(r"\s\d?[>|&]", line)[0]))
        kinds = OPTIONS[sys.argv[0]]
        typed = sample.typed_options("", *kinds)
        kinds[-1](**typed[-1])
        assert sys.argv[0] == "sample.py" or train.choose(*typed[:2], None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_and_print_what_it_says(tmp_path, monkeypatch, capsys, page):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(train.read_text(())[:7000], encoding="utf-8")
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL)
    blocks += [(code.replace("\n    ", "\n"), None) for code in re.findall(r"(?m)^    (from .*\n(?:    .*\n)+)", text)]
    for code, printed in blocks:
        if "make_run" not in code or os.environ.get("LONG_TESTS"):  # a large model takes a while
            exec(code, names)
            assert printed in (capsys.readouterr().out, None), code


# Mistakes, each with words of the one line that it ends in. In these tables `--option a|b` is two, and that line names
# the option or, in the second table, the value.
OF_OPTIONS = {"train.py": f"""
    --train-ratio 0|1  --context-length 0  --epochs -1|1.5  --batch-size 0  --lr 0|inf|nan  --weight-decay -1|inf
    --warmup-steps -1  --initial-lr -1|inf  --min-lr -1|inf  --max-norm 0  --seed -1|{2**63}  --eval-freq 0
    --eval-iter 0  --start-context ''  --dtype float16  --save-every -1  --keep-best=yes  --vocab-size 100
    --emb-dim {2**16}  --n-heads 0|5  --data ''  --checkpoint ''
    --models-dir ''  --size 1B  --epoch 3""",
    "train.py --weights run.pth": "--n-layers 2  --context-length 16",
    "train.py --resume --checkpoint run.pth": """
    --seed 4  --batch-size 3  --train-ratio 0.5  --context-length 4  --weights run.pth""",
    "sample.py": f"""
    --n-heads 0  --prompt ''  --max-new-tokens -1  --num-samples 0  --temperature -1|inf|nan  --top-k 0|x
    --seed -1|{2**63}  --dtype int8""",
    "sample.py --weights run.pth": "--n-heads 4"}
OF_VALUES = {"train.py": """
    --data absent.txt|folder|latin1.txt|zero.txt  --batch-size 5000  --qkv-bias yes  --device abacus|cuda:99
    --checkpoint run.pth  --weights absent.pth|folder""",
    "train.py --overwrite": "--checkpoint latin1.txt|folder|pipe",
    "train.py --resume": "--checkpoint cut.pth|model.pth",
    "train.py --models-dir ../models --weights openai": "--models-dir run.pth  --base-url ftp://x",
    "sample.py": "--weights absent.pth|small.pth"}
MISTAKES = [
    ("train.py --data", "--data expected"), ("train.py --data empty.txt", "short"),
    ("train.py --data absent.txt --data latin1.txt", "absent.txt"),  # all count, not the last alone
    ("train.py --resume --checkpoint run.pth --data other.txt", "another text"),
    (f"train.py --emb-dim {2**16 - 1} --n-heads 1 --context-length {10**9}", "space"),
    ("train.py --checkpoint new.pth", "new-best.pth"), ("train.py --checkpoint absent/model.pth", "absent")]
for table in (OF_OPTIONS, OF_VALUES):
    for start_of_line, options in table.items():
        for option, values in re.findall(r"(--[a-z-]+[ =])(\S+)", options):
            for value in values.split("|"):
                named = value if table is OF_VALUES else option.strip("-= ")
                MISTAKES.append((f"{start_of_line} {option}{value}", named))


@pytest.fixture(scope="module")
def litter(trained, tmp_path_factory):
    """The files that the mistakes are made with; no test changes them."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "folder").mkdir()
    getattr(os, "mkfifo", os.mkdir)(folder / "pipe")
    whole, small = (trained / "model.pth").read_bytes(), replace(SMALL, vocab_size=100)
    for name, content in {"empty.txt": b"", "latin1.txt": "naïve".encode("latin-1"), "zero.txt": b"a\0b",
                          "other.txt": b"Another text. " * 9000, "run.pth": whole, "new-best.pth": whole,
                          "cut.pth": whole[:-1000]}.items():
        (folder / name).write_bytes(content)
    save_checkpoint(folder / "small.pth", Checkpoint(init_params(small, seeded()), small))
    return folder


@pytest.mark.parametrize("line, words", MISTAKES)
def test_a_mistake_ends_in_one_line_and_status_2_and_changes_nothing(litter, line, words):
    before = fingerprint(litter)
    # What is typed later counts. A new run that is not refused, as it should be, is at least a small one.
    full = line if "--resume" in line else line.replace("train.py", f"train.py {SMALL_RUN}")
    status, out, err = command(litter, full)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith(f"{line.split()[0]}: error: ")
    assert all(word in err or word.replace("-", "_") in err for word in words.split()), err
    assert fingerprint(litter) == before


@pytest.mark.parametrize("name, value", [
    ("momentum", 1), ("lr", "0.1"), ("lr", math.nan), ("epochs", 1.0), ("batch_size", True), ("data", [1]),
    ("data", "a"), ("dtype", None), ("seed", []), ("min_lr", {}), ("keep_best", 1), ("context_length", torch.ones(()))])
def test_junk_in_the_settings_of_a_saved_run_is_refused_by_name(name, value):
    saved = SavedRun({"context_length": 8} | {name: value}, "", torch.zeros(1), None, ())
    assert_refused(lambda: train.choose({}, {}, Checkpoint({}, SMALL, None, saved)), name, error=ValueError)


@pytest.mark.parametrize("action, outcome", [
    (Mock(side_effect=RuntimeError("shape")), RuntimeError), (Mock(side_effect=KeyError("lr")), KeyError),
    (Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")), SystemExit),
    (lambda: bytearray(2**62), SystemExit), (lambda: torch.empty(2**55), SystemExit)])
def test_a_bug_stays_a_traceback_and_want_of_memory_costs_one_line(capsys, action, outcome):
    with pytest.raises(outcome) as ended:
        sample.run_command(action)
    lines = capsys.readouterr().err.splitlines()
    assert (ended.value.code, len(lines)) == (2, 1) if outcome is SystemExit else lines == []
