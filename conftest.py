"""What the test files share: strategies and tolerances, seeds, small models, and one way to run a command line."""
import io
import os
import shlex
import subprocess
import sys
import threading
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # for speed on a busy machine: see sample.py

import torch
from hypothesis import settings
from hypothesis import strategies as st

import sample
import train
from gpt import Config, init_params, map_params
from weights import load_checkpoint

HERE = Path(__file__).parent
LONG = pytest.mark.skipif(not os.environ.get("LONG_TESTS"), reason="takes minutes: set LONG_TESTS=1")
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # what kernels of float32 may differ in
TINY = Config(vocab_size=31, context_length=12, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.3, qkv_bias=True)
SMALL = Config(context_length=8, emb_dim=4, n_heads=2, n_layers=1)  # with GPT-2's vocabulary
SMALL_RUN = "--n-layers 1 --emb-dim 4 --n-heads 2 --context-length 8 --batch-size 4 --train-ratio 0.04 --eval-iter 1"
Result = namedtuple("Result", "status out err")  # of a command line
MAIN = {"train.py": train.main, "sample.py": sample.main}

# A busy machine is no failure, so there is no deadline. The quick tests try fewer examples.
settings.register_profile("ours", deadline=None, max_examples=100 if os.environ.get("LONG_TESTS") else 20)
settings.load_profile("ours")


def pytest_configure(config):
    """A warning is an error, but for those that other libraries give each other."""
    config.addinivalue_line("filterwarnings", "error")
    for module in ("tensorflow", "keras", "google", "transformers", "torch.jit", "torch._inductor"):
        config.addinivalue_line("filterwarnings", f"ignore:::{module}")


seeds = st.integers(0, 2**63 - 1)
configs = st.builds(  # of every shape; the head's size is emb_dim / n_heads
    lambda heads, size, **rest: Config(emb_dim=heads * size, n_heads=heads, **rest), heads=st.integers(1, 3),
    size=st.integers(1, 5), vocab_size=st.integers(2, 40), context_length=st.integers(1, 24),
    n_layers=st.integers(1, 2), drop_rate=st.sampled_from([0.0, 0.3]), qkv_bias=st.booleans())


def seeded(seed=123):
    return torch.Generator().manual_seed(seed)


def random_ids(config, *shape):
    return torch.randint(config.vocab_size, shape, generator=seeded())


def examples(config, length, batch=2):
    """Inputs and targets of random tokens, each (batch, length)."""
    ids = random_ids(config, batch, length + 1)
    return ids[:, :-1], ids[:, 1:]


def noisy_params(config, dtype=torch.float64, seed=123):
    """Initial parameters plus noise: the norms and biases of fresh ones have no effect."""
    generator = seeded(seed)
    return map_params(lambda tensor: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype),
                      init_params(config, generator))


def parrot(config, scores, others=0.0):
    """Parameters of a model that gives each token the same score, whatever it reads.

    A score is a sum of two numbers. That of 256.5 and -256 is 0.5, but 0 in bfloat16, which has no 256.5.
    """
    params = init_params(config, seeded())
    params["final_norm.scale"].zero_()
    params["final_norm.shift"].zero_()[:2] = 1
    params["out_head.weight"].zero_()[:, 0] = others
    for token, two_numbers in scores.items():
        params["out_head.weight"][token, :2] = torch.tensor(two_numbers)
    return params


def saved_steps(path):
    return load_checkpoint(path).opt_state.step


def tie(params):
    """The parameters with the token embedding as the output head, one tensor under two names."""
    return params | {"out_head.weight": params["tok_emb.weight"]}


def same(one, two):
    """Whether two values are equal: tensors bit for bit, and what is in tuples, lists and dicts likewise."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def assert_refused(action, *words, error=(ValueError, OSError)):
    """The action ends in an error whose message is one line with these words."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


class Listener(io.StringIO):
    """An output that first calls `listen` with each text."""
    def __init__(self, listen):
        super().__init__()
        self.listen = listen

    def write(self, text):
        self.listen(text)
        return super().write(text)


def command(folder, line, stdin=b"", out=None, **environment):
    """What a command line does in a folder, on a CPU, in this process. `out` is another place for its output."""
    script, *arguments = shlex.split(line)
    out, err = out or io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, "--device", "cpu", *arguments])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            sample.run_command(MAIN[script])
            status = 0
        except SystemExit as ended:
            status = ended.code
    return Result(status, out.getvalue() if isinstance(out, io.StringIO) else "", err.getvalue())


def start(folder, *arguments, timeout=120, **environment):
    """A process of its own in a folder: `with start(folder, "train.py", ...) as process`; see Popen.

    It is killed if it takes longer than `timeout` seconds, so that whoever reads its output does not wait for ever.
    """
    arguments = [HERE / each if each in MAIN else each for each in arguments]
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdin=subprocess.DEVNULL, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)
    alarm = threading.Timer(timeout, process.kill)
    alarm.daemon = True
    alarm.start()
    return process


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a small model after two epochs, and its log; no test changes it."""
    folder = tmp_path_factory.mktemp("trained")
    result = command(folder, f"train.py {SMALL_RUN} --epochs 2 --eval-freq 1")
    assert result.status == 0, result.err
    (folder / "log.txt").write_bytes(result.out.encode())
    return folder


@pytest.fixture(scope="session")
def untrained():
    """The chapter's state before its first step, without AdamW's. No test changes it."""
    return train.start_state(train.make_run(train.read_text(()), Config(), train.Settings()))._replace(opt_state=None)
