"""Ctrl-C ends a program at whatever moment it comes."""

import subprocess
import sys

import pytest

from tests.train_runs import ROOT, quick_environment

# What Python calls without heeding what it raises.
SWALLOWING = """
import gc, os, signal, sys
from hart_jax.errors import run_cli

# A job in the background inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Sends:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass

sent = []

def collected(phase, info):
    if not sent:
        sent.append(1)
        Sends.__del__(None)

def main():
    if sys.argv[1] == "collection":
        gc.callbacks.append(collected)
        gc.collect()
    else:
        thing = Sends()
        del thing
    while True:
        pass

run_cli(main)
"""

# Sends Ctrl-C when a module begins to be imported, from a collection of garbage if `collected`.
AT_IMPORT = """
import gc, os, runpy, signal, sys

# A job in the background inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
program, module, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = program

class Moment:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            print("sent", flush=True)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Moment())
sys.path.insert(0, os.getcwd())
runpy.run_path(program, run_name="__main__")
"""


def ends_of(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("where", ["collection", "end of an object"])
def test_where_python_ignores_exceptions(where):
    ended = ends_of(SWALLOWING, where)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.splitlines()[-1] == "interrupted; the same command goes on where complete work ends"


STARTS = {
    "train.py": ("--config=configs/emoji_tokenizer.py", "--workdir=/absent/run"),
    "sample.py": ("--config=configs/emoji_hart.py", "--prompt=a dog", "--out=/absent/out"),
    "evaluate.py": ("--config=configs/emoji_hart.py", "--what=generation", "--out=/absent/out"),
}


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("train.py", "jax._src.lib"),
        ("train.py", "orbax.checkpoint"),
        ("train.py", "hart_jax.training.tokenizer_task"),
        ("sample.py", "hart_jax.sampling.pipeline"),
        ("evaluate.py", "hart_jax.evaluation.run"),
    ],
)
def test_while_a_program_is_starting(program, module):
    ended = ends_of(AT_IMPORT, program, module, *STARTS[program])
    assert ended.stdout.splitlines() == ["sent"]
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
